"""Checks across keys of a configuration: values that are valid alone but not together."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from diffusion_nft.algorithms import algorithm_class
from diffusion_nft.data.prompts import SPLITS, split_file
from diffusion_nft.shapes import BUILT_IN_LENGTH, BUILT_IN_MODEL, BUILT_IN_RESOLUTION
from diffusion_nft.solvers import STOCHASTIC_SOLVERS, check_solver

# Rewards that read a prompt's metadata.
METADATA_REWARDS = ("geneval", "shapes")


def _some_sigma_is_trained(num_steps: int, sigma_range: float, fraction: float) -> str | None:
    available = int(num_steps * sigma_range)
    if int(available * fraction) >= 1:
        return None
    return (
        "leave no sigma to train at; int(int(num_steps * sigma_range) * timestep_fraction) must be "
        f"at least 1; the first factors give {available}"
    )


def _steps_share_groups(gradient_steps: int, images: int) -> str | None:
    if gradient_steps <= images:
        return None
    return f"each optimizer step takes an equal share of every group: at most {images} steps"


def _resolution_fits(resolution: Any, model: str) -> str | None:
    right = model != BUILT_IN_MODEL or resolution in (
        *(0, BUILT_IN_RESOLUTION),
        *((BUILT_IN_RESOLUTION,) * 2, [BUILT_IN_RESOLUTION] * 2),
    )
    return None if right else f"the built-in model draws {BUILT_IN_RESOLUTION} pixels only"


def _length_fits(length: int, model: str) -> str | None:
    if model != BUILT_IN_MODEL or length == BUILT_IN_LENGTH:
        return None
    return f"the built-in model was trained at {BUILT_IN_LENGTH} tokens"


def _negative_prompt_is_used(negative: str, rollouts: float, evaluation: float) -> str | None:
    used = not negative or rollouts > 1 or evaluation > 1
    return None if used else "without guidance (a scale above 1) a negative prompt is not used"


def _one_start(resume_from: str, lora_path: str) -> str | None:
    return "a run can start from only one of them" if resume_from and lora_path else None


def _noise_level_fits(solver: str, noise_level: float) -> str | None:
    try:
        check_solver(solver, noise_level)
    except ValueError as error:
        return str(error)
    return None


def _steps_are_random(algorithm: str, solver: str, noise_level: float) -> str | None:
    """A step without noise has no density and so no policy gradient."""
    if not algorithm_class(algorithm).on_trajectories or (
        solver in STOCHASTIC_SOLVERS and noise_level > 0
    ):
        return None
    return (
        "the algorithm trains on the steps of a stochastic solver; choose from "
        f"{', '.join(sorted(STOCHASTIC_SOLVERS))}, with a noise_level above 0"
    )


def _trained_steps_are_random(
    algorithm: str,
    solver: str,
    num_steps: int,
    choice: str,
    sigma_range: float,
    fraction: float,
) -> str | None:
    if not algorithm_class(algorithm).on_trajectories or solver != "ddim":
        return None
    available = int(num_steps * sigma_range)
    if available < num_steps or (choice == "first" and int(available * fraction) < num_steps):
        return None
    return (
        "the last step of ddim has no noise and cannot be trained on: sigma_range must leave it "
        "out, or sigma_choice must be 'first' and int(num_steps * timestep_fraction) less than "
        f"{num_steps}"
    )


def _some_are_left_out(algorithm: str, best_of: int, images: int) -> str | None:
    if algorithm != "best_of_n" or best_of < images:
        return None
    return f"the best of {images} images of a prompt must be fewer than {images}"


def _metadata_is_there(
    splits: Collection[str], rewards: Collection[str], dataset: str
) -> str | None:
    blind = [name for name in METADATA_REWARDS if name in rewards]
    suffixes = {split_file(dataset, split).suffix for split in splits}
    if not blind or suffixes == {".jsonl"}:
        return None
    files = " and ".join(f"{split}_metadata.jsonl" for split in splits)
    return f"reward {blind[0]!r} reads the metadata of each prompt; the prompt set needs {files}"


def _held_out(reward_fn: Collection[str], rewards: Collection[str]) -> str | None:
    trained = [name for name in rewards if name in reward_fn]
    return f"{trained[0]!r} is in reward_fn, and so evaluated anyway" if trained else None


def _in_use(
    chosen: Collection[str], reward_fn: Collection[str], rewards: Collection[str]
) -> str | None:
    idle = [name for name in chosen if name not in reward_fn and name not in rewards]
    return f"{idle[0]!r} is neither in reward_fn nor in eval.held_out_rewards" if idle else None


def _options_are_local(options: Collection[str], reward_servers: Collection[str]) -> str | None:
    served = [name for name in options if name in reward_servers]
    return f"{served[0]!r} is served: its options belong to its server" if served else None


def _kl_is_there(
    section: str, algorithm: str, action: str, max_kl: float, weight: float
) -> str | None:
    if weight or section != algorithm_class(algorithm).section:
        return None
    if action == "raise_kl":
        return "a weight of 0 cannot be raised"
    return "loss/kl is not measured without a KL term" if max_kl else None


def _sizes_are_few(batch_size: int, compiled: bool) -> str | None:
    return "every batch size tried would be compiled" if compiled and not batch_size else None


# Keys, and a check that takes their values in this order.
COMBINATIONS: tuple[tuple[tuple[str, ...], Callable[..., str | None]], ...] = (
    *(
        (
            ("algorithm", "monitor.action", "monitor.max_kl", f"{section}.kl_weight"),
            partial(_kl_is_there, section),
        )
        for section in ("nft", "grpo", "matching")
    ),
    (("sample.num_steps", "train.sigma_range", "train.timestep_fraction"), _some_sigma_is_trained),
    (("train.gradient_step_per_epoch", "sample.num_image_per_prompt"), _steps_share_groups),
    (("resolution", "pretrained.model"), _resolution_fits),
    (("eval.resolution", "pretrained.model"), _resolution_fits),
    (("pretrained.max_sequence_length", "pretrained.model"), _length_fits),
    (
        ("sample.negative_prompt", "sample.guidance_scale", "eval.guidance_scale"),
        _negative_prompt_is_used,
    ),
    (("resume_from", "train.lora_path"), _one_start),
    (("sample.solver", "sample.noise_level"), _noise_level_fits),
    (("algorithm", "sample.solver", "sample.noise_level"), _steps_are_random),
    (
        (
            "algorithm",
            "sample.solver",
            "sample.num_steps",
            "train.sigma_choice",
            "train.sigma_range",
            "train.timestep_fraction",
        ),
        _trained_steps_are_random,
    ),
    (("algorithm", "matching.best_of", "sample.num_image_per_prompt"), _some_are_left_out),
    (("train.batch_size", "perf.compile"), _sizes_are_few),
    (("reward_fn", "dataset"), partial(_metadata_is_there, SPLITS)),
    (("eval.held_out_rewards", "dataset"), partial(_metadata_is_there, ("test",))),
    (("reward_fn", "eval.held_out_rewards"), _held_out),
    (("reward_servers", "reward_fn", "eval.held_out_rewards"), _in_use),
    (("reward_options", "reward_fn", "eval.held_out_rewards"), _in_use),
    (("reward_options", "reward_servers"), _options_are_local),
)
