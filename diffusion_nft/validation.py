"""The one check of a whole configuration, before any model is loaded.

``SCHEMA`` says what each key of config/base.py may hold, ``COMBINATIONS`` which values cannot go
together, ``PUBLISHED_KEYS`` what became of the keys of the published code.  ``validate`` reports
every problem at once, one a line: the key, its value, and what would be valid.
"""

import difflib
import math
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion_nft import data
from diffusion_nft.advantages import ADV_MODES
from diffusion_nft.algorithms import ALGORITHMS
from diffusion_nft.algorithms.nft import OLD_POLICY_DECAYS, WEIGHTINGS
from diffusion_nft.models import MODELS
from diffusion_nft.precision import COMPUTE_DTYPES
from diffusion_nft.rewards import REWARDS
from diffusion_nft.solvers import SOLVERS, check_solver

# Returns what is wrong with a value and what would be valid; None if it is fine.
Check = Callable[[Any], str | None]

EMBEDDED_MODEL = "shapes"
EMBEDDED_RESOLUTION = 48
# SD3: its VAE makes a latent of 8 x 8 pixels, its transformer a token of 2 x 2 latents.
PIXELS_PER_TOKEN = 16
# Rewards that read the metadata of a prompt, not only its text.
METADATA_REWARDS = ("geneval", "shapes")


class ConfigError(ValueError):
    """A configuration that cannot run; ``problems`` holds one line for each thing to repair."""

    def __init__(self, problems: list[str]):
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join((f"{count} in the configuration:", *problems)))


def _is_finite_number(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and (isinstance(value, numbers.Integral) or math.isfinite(value))


def _did_you_mean(name: Any, choices: Collection[str]) -> str:
    close = difflib.get_close_matches(str(name), choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _integer(low: int, high: int | None = None) -> Check:
    valid = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"

    def check(value: Any) -> str | None:
        fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        fits = fits and low <= int(value) and (high is None or int(value) <= high)
        return None if fits else f"must be {valid}"

    return check


def _number(interval: str) -> Check:
    """A finite number in ``interval``, written as in mathematics: ``[0, 1)``, ``(0, inf)``."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def check(value: Any) -> str | None:
        fits = _is_finite_number(value) and low <= value <= high
        fits = fits and (value != low or interval[0] == "[")
        fits = fits and (value != high or interval[-1] == "]")
        return None if fits else f"must be a finite number in {interval}"

    return check


def _one_of(choices: Collection[str]) -> Check:
    def check(value: Any) -> str | None:
        if isinstance(value, str) and value in choices:
            return None
        return f"choose from {', '.join(choices)}{_did_you_mean(value, choices)}"

    return check


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be True or False"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "must be text"


def _name(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "must be text, not empty"


def _new_folder(value: Any) -> str | None:
    if not isinstance(value, str) or not value.strip():
        return "must be the path of the run directory, not empty"
    if value.startswith("~"):
        return "must be a path without '~', which nothing expands here"
    if Path(value).is_file():
        return "is a file; must be a folder, which is created if need be"
    return None


def _folder_or_empty(value: Any) -> str | None:
    if isinstance(value, str) and (not value or Path(value).is_dir()):
        return None
    return "must be the path of a folder that exists, or empty for none"


def _lora_or_empty(value: Any) -> str | None:
    if _folder_or_empty(value) or (value and not Path(value, "adapter_config.json").is_file()):
        return "must be a PEFT folder that exists (it holds adapter_config.json), or empty for none"
    return None


def _model(value: Any) -> str | None:
    if isinstance(value, str):
        parts = value.split("/")
        hub = len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")
        if value == EMBEDDED_MODEL or hub or (value and Path(value).is_dir()):
            return None
    return (
        f"must be a diffusers folder that exists, a hub name (owner/name), or {EMBEDDED_MODEL!r}"
        f"{_did_you_mean(value, (EMBEDDED_MODEL,))}"
    )


def _solver(value: Any) -> str | None:
    if not isinstance(value, str):
        return "must be the name of a solver"
    try:
        check_solver(value)
    except ValueError as error:
        return f"{error}{_did_you_mean(value, SOLVERS)}"
    return None


def _dataset(value: Any) -> str | None:
    if not isinstance(value, str):
        return "must be the name of a prompt set, or the path of a folder"
    try:
        for split in data.SPLITS:
            data.split_file(value, split)
    except ValueError as error:
        return str(error).removeprefix(f"dataset = {value!r}: ")
    return None


def _rewards(value: Any) -> str | None:
    if not _is_section(value):
        return "must map reward names to weights"
    if not value:
        return f"needs at least one reward; choose from {', '.join(REWARDS)}"
    unknown = [str(name) for name in value if name not in REWARDS]
    complaints = [f"{name!r} is unknown{_did_you_mean(name, REWARDS)}" for name in unknown]
    if unknown:
        complaints.append(f"choose from {', '.join(REWARDS)}")
    for name, weight in value.items():
        if not _is_finite_number(weight) or weight == 0:
            complaints.append(f"the weight of {name!r} must be a finite number other than 0")
    return "; ".join(complaints) or None


SCHEMA: dict[str, Check] = {
    "run_name": _text,
    "save_dir": _new_folder,
    "seed": _integer(0),
    "algorithm": _one_of(ALGORITHMS),
    "num_epochs": _integer(1),
    "save_freq": _integer(0),
    "eval_freq": _integer(0),
    "mixed_precision": _one_of(COMPUTE_DTYPES),
    "allow_tf32": _flag,
    "resume_from": _folder_or_empty,
    "pretrained.model": _model,
    "pretrained.revision": _text,
    "pretrained.model_type": _one_of(MODELS),
    "pretrained.max_sequence_length": _integer(1, 512),
    "resolution": _integer(PIXELS_PER_TOKEN),
    "dataset": _dataset,
    "reward_fn": _rewards,
    "sample.num_groups": _integer(1),
    # An image alone in its group is its own mean: its advantage is 0, and nothing is learnt.
    "sample.num_image_per_prompt": _integer(2),
    "sample.batch_size": _integer(1),
    "sample.solver": _solver,
    "sample.num_steps": _integer(1),
    "sample.noise_level": _number("[0, inf)"),
    "sample.guidance_scale": _number("[1, inf)"),
    "sample.global_std": _flag,
    "train.batch_size": _integer(1),
    "train.gradient_step_per_epoch": _integer(1),
    "train.num_inner_epochs": _integer(1),
    "train.timestep_fraction": _number("(0, 1]"),
    "train.learning_rate": _number("(0, inf)"),
    "train.lr_half_life": _number("[0, inf)"),
    "train.adam_beta1": _number("[0, 1)"),
    "train.adam_beta2": _number("[0, 1)"),
    "train.adam_weight_decay": _number("[0, inf)"),
    "train.adam_epsilon": _number("(0, inf)"),
    "train.max_grad_norm": _number("(0, inf)"),
    "train.adv_clip_max": _number("(0, inf)"),
    "train.adv_mode": _one_of(ADV_MODES),
    "train.lora_rank": _integer(1),
    "train.lora_alpha": _integer(1),
    "train.lora_path": _lora_or_empty,
    "train.ema_decay": _number("[0, 1)"),
    "train.max_skipped_steps": _integer(0),
    "nft.beta": _number("(0, inf)"),
    "nft.kl_weight": _number("[0, inf)"),
    "nft.weighting": _one_of(WEIGHTINGS),
    "nft.negative_branch": _flag,
    "nft.old_policy_decay": _one_of(OLD_POLICY_DECAYS),
    "eval.num_prompts": _integer(0),
    "eval.num_steps": _integer(1),
    "eval.solver": _solver,
    "eval.guidance_scale": _number("[1, inf)"),
    "eval.batch_size": _integer(1),
    "eval.at_start": _flag,
    "checkpoint.keep": _integer(0),
    "perf.embed_cache_gb": _number("[0, inf)"),
    "perf.offload_text_encoders": _flag,
    "perf.vae_batch_size": _integer(1),
    "perf.gradient_checkpointing": _flag,
    "log.wandb": _one_of(("online", "offline", "off")),
    "log.wandb_project": _name,
    "log.tensorboard": _flag,
    "log.num_images": _integer(0),
    "log.image_freq": _integer(0),
    "distributed.timeout_minutes": _number("(0, inf)"),
}
SECTIONS = frozenset(key.rpartition(".")[0] for key in SCHEMA) - {""}


@dataclass(frozen=True)
class Combination:
    """Keys whose values, each valid, cannot go together; ``check`` takes them in this order."""

    keys: tuple[str, ...]
    check: Callable[..., str | None]


def _some_sigma_is_trained(num_steps: int, timestep_fraction: float) -> str | None:
    if int(num_steps * timestep_fraction) >= 1:
        return None
    return (
        "leave no sigma to train at; int(num_steps * timestep_fraction) must be at least 1 "
        f"(with {num_steps} steps, a fraction of at least 1/{num_steps})"
    )


def _steps_share_groups(gradient_steps: int, images: int) -> str | None:
    if gradient_steps <= images:
        return None
    return f"each optimizer step takes an equal share of every group: at most {images} steps"


def _resolution_fits(resolution: int, model: str) -> str | None:
    if model == EMBEDDED_MODEL:
        right = resolution == EMBEDDED_RESOLUTION
        return None if right else f"the embedded model draws at {EMBEDDED_RESOLUTION} pixels only"
    if resolution % PIXELS_PER_TOKEN == 0:
        return None
    below = resolution - resolution % PIXELS_PER_TOKEN
    return f"resolution must be a multiple of 16, such as {below} or {below + PIXELS_PER_TOKEN}"


def _noise_level_fits(solver: str, noise_level: float) -> str | None:
    try:
        check_solver(solver, noise_level)
    except ValueError as error:
        return str(error)
    return None


def _metadata_is_there(reward_fn: Mapping[str, float], dataset: str) -> str | None:
    blind = [name for name in METADATA_REWARDS if name in reward_fn]
    suffixes = {data.split_file(dataset, split).suffix for split in data.SPLITS}
    if not blind or suffixes == {".jsonl"}:
        return None
    return (
        f"reward {blind[0]!r} reads the metadata of each prompt; the prompt set needs "
        "train_metadata.jsonl and test_metadata.jsonl"
    )


COMBINATIONS = (
    Combination(("sample.num_steps", "train.timestep_fraction"), _some_sigma_is_trained),
    Combination(
        ("train.gradient_step_per_epoch", "sample.num_image_per_prompt"), _steps_share_groups
    ),
    Combination(("resolution", "pretrained.model"), _resolution_fits),
    Combination(("sample.solver", "sample.noise_level"), _noise_level_fits),
    Combination(("reward_fn", "dataset"), _metadata_is_there),
)

# Key of the published code -> (our key, what differs); an empty key: there is nothing to set.
PUBLISHED_KEYS: dict[str, tuple[str, str]] = {
    "beta": ("nft.beta", "the mixing strength of the implicit policies"),
    "train.beta": ("nft.kl_weight", "the weight of the KL term"),
    "decay_type": (
        "nft.old_policy_decay",
        "0 is on_policy, 1 is linear_to_half, 2 is delayed_linear",
    ),
    "prompt_fn": ("dataset", "the files of the folder tell the format"),
    "per_prompt_stat_tracking": (
        "sample.global_std",
        "the mean is the group's; the deviation is the epoch's (True) or the group's (False)",
    ),
    "use_lora": ("", "training is always of a LoRA; its size is train.lora_rank"),
    "logdir": ("save_dir", "logs lie in the run directory"),
    "debug": ("", "for a run of seconds take the preset shapes_smoke"),
    "sample.train_batch_size": ("sample.batch_size", "a memory knob, free of the group size"),
    "sample.num_batches_per_epoch": (
        "sample.num_groups",
        "prompts per epoch, on all GPUs together",
    ),
    "sample.eval_num_steps": ("eval.num_steps", ""),
    "sample.test_batch_size": ("eval.batch_size", ""),
    "sample.deterministic": (
        "sample.solver",
        "dpm1, dpm2 and heun are deterministic, and so are flow, dance and ddim at "
        "sample.noise_level 0",
    ),
    "train.gradient_accumulation_steps": (
        "train.gradient_step_per_epoch",
        "optimizer steps per epoch; how much is accumulated follows from it",
    ),
    "train.ema": ("train.ema_decay", "0 turns it off"),
    "test.*": ("eval.*", "num_steps, batch_size, guidance_scale, num_prompts, solver"),
}


def validate(config: ConfigDict, *, world_size: int = 1) -> None:
    """Raise ConfigError, listing every problem, unless ``config`` can run on ``world_size`` ranks.

    No key depends on the number of ranks: a configuration that is valid is valid on any number.
    """
    assert world_size >= 1, world_size
    values = dict(_leaves(config))
    problems: dict[str, str] = {}
    for key, value in values.items():
        complaint = SCHEMA[key](value) if key in SCHEMA else unknown_key(key)
        if complaint:
            problems[key] = f"{key} = {_show(value)}: {complaint}"
    for key, check in SCHEMA.items():
        if key not in values and key.rpartition(".")[0] not in values:
            problems[key] = f"{key} is missing: {check(None)}"
    combined = []
    for combination in COMBINATIONS:
        if all(key in values and key not in problems for key in combination.keys):
            complaint = combination.check(*(values[key] for key in combination.keys))
            given = ", ".join(f"{key} = {_show(values[key])}" for key in combination.keys)
            combined += [f"{given}: {complaint}"] if complaint else []
    if problems or combined:
        raise ConfigError([*problems.values(), *combined])


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping | ConfigDict)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value; a mapping that is itself a key, or empty, is a value."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if _is_section(value) and key not in SCHEMA and (len(value) or key in SECTIONS):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _show(value: Any) -> str:
    return repr(value.to_dict() if isinstance(value, ConfigDict) else value)


def unknown_key(key: str) -> str:
    """What to write instead of a key that base.py does not have."""
    if key in SECTIONS:
        keys = ", ".join(known for known in SCHEMA if known.startswith(f"{key}."))
        return f"is a section, not a value; it holds {keys}"
    published = PUBLISHED_KEYS.get(key) or PUBLISHED_KEYS.get(f"{key.split('.')[0]}.*")
    if published:
        ours, note = published
        advice = f"use {ours}" if ours else "drop it"
        return f"is a key of the published code; {advice}{f' ({note})' if note else ''}"
    name = key.rpartition(".")[2]
    namesakes = [known for known in SCHEMA if known.rpartition(".")[2] == name]
    close = namesakes or difflib.get_close_matches(key, SCHEMA, n=1)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"is an unknown key{hint or '; the keys are in config/base.py'}"
