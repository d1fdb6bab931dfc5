"""Validation of a whole configuration, before any model is loaded.

``SCHEMA`` maps each key of config/base.py to its check, ``constraints.py`` holds the checks across
keys, and ``PUBLISHED_KEYS`` maps the keys of the published code to ours.  ``validate`` reports all
problems together, one per line: the key, its value, and what would be valid.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusion_nft.advantages import ADV_MODES
from diffusion_nft.algorithms import ALGORITHMS
from diffusion_nft.algorithms.nft import WEIGHTINGS
from diffusion_nft.models import MODELS
from diffusion_nft.models.precision import COMPUTE_DTYPES
from diffusion_nft.utils.paths import expand
from diffusion_nft.validation import checks
from diffusion_nft.validation.checks import Check, is_section
from diffusion_nft.validation.constraints import COMBINATIONS
from diffusion_nft.validation.stages import merged_configs, stage_problems

# Keys whose value is or may be a path (a dataset's path is expanded where it is looked up).
PATHS = ("save_dir", "resume_from", "pretrained.model", "train.lora_path")
# Longest quotation of a value in an error, in characters.
MAX_SHOWN = 400


class ConfigError(ValueError):
    """An invalid configuration; ``problems`` holds one line per problem."""

    def __init__(self, problems: list[str]):
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join((f"{count} in the configuration:", *problems)))


SCHEMA: dict[str, Check] = {
    "run_name": checks.text,
    "save_dir": checks.new_folder,
    "seed": checks.integer(0),
    "algorithm": checks.one_of(ALGORITHMS),
    "num_epochs": checks.integer(1),
    "stages": lambda value: "; ".join(stage_problems(value)) or None,
    "save_freq": checks.integer(0),
    "eval_freq": checks.integer(0),
    "mixed_precision": checks.one_of(COMPUTE_DTYPES),
    "allow_tf32": checks.flag,
    "resume_from": checks.folder_or_empty,
    "pretrained.model": checks.model,
    "pretrained.revision": checks.revision,
    "pretrained.model_type": checks.default_or("", checks.one_of(MODELS)),
    "pretrained.max_sequence_length": checks.integer(1, 1024),
    "pretrained.embedded_guidance": checks.number("[0, inf)"),
    "pretrained.allow_distilled": checks.flag,
    "resolution": checks.resolution,
    "dataset": checks.dataset,
    "allow_changed_prompts": checks.flag,
    "reward_fn": checks.reward_weights,
    "reward_servers": checks.reward_addresses,
    # Larger values overflow the clocks of sockets and collectives.
    "reward_server_timeout_seconds": checks.number("(0, 1e6]"),
    "reward_options": checks.reward_options,
    "max_unscored": checks.integer(0),
    "sample.num_groups": checks.integer(1),
    # In a group of one image the advantage is always 0.
    "sample.num_image_per_prompt": checks.integer(2),
    "sample.batch_size": checks.integer(1),
    "sample.solver": checks.solver,
    "sample.num_steps": checks.integer(1),
    "sample.noise_level": checks.number("[0, inf)"),
    "sample.guidance_scale": checks.number("[1, inf)"),
    "sample.negative_prompt": checks.text,
    "sample.global_std": checks.flag,
    "sample.standardize_rewards": checks.flag,
    "train.batch_size": checks.integer(0),
    "train.gradient_step_per_epoch": checks.integer(1),
    "train.num_inner_epochs": checks.integer(1),
    "train.sigma_range": checks.number("(0, 1]"),
    "train.timestep_fraction": checks.number("(0, 1]"),
    "train.sigma_choice": checks.one_of(("random", "stratified", "first")),
    "train.shared_noise": checks.flag,
    "train.filter_zero_std_groups": checks.flag,
    "train.learning_rate": checks.number("(0, inf)"),
    "train.lr_half_life": checks.number("[0, inf)"),
    "train.adam_beta1": checks.number("[0, 1)"),
    "train.adam_beta2": checks.number("[0, 1)"),
    "train.adam_weight_decay": checks.number("[0, inf)"),
    "train.adam_epsilon": checks.number("(0, inf)"),
    "train.max_grad_norm": checks.number("(0, inf)"),
    "train.adv_clip_max": checks.number("(0, inf)"),
    "train.adv_mode": checks.one_of(ADV_MODES),
    "train.lora_targets": checks.lora_targets,
    "train.lora_rank": checks.integer(1),
    "train.lora_alpha": checks.integer(1),
    "train.lora_path": checks.lora_or_empty,
    "train.ema_decay": checks.number("[0, 1)"),
    "train.max_skipped_steps": checks.integer(0),
    "nft.beta": checks.number("(0, inf)"),
    "nft.kl_weight": checks.number("[0, inf)"),
    "nft.weighting": checks.one_of(WEIGHTINGS),
    "nft.negative_branch": checks.flag,
    "nft.old_policy_decay": checks.old_policy_decay,
    "grpo.clip_range": checks.number("(0, 1)"),
    "grpo.kl_weight": checks.number("[0, inf)"),
    "matching.weighting": checks.one_of(WEIGHTINGS),
    "matching.kl_weight": checks.number("[0, inf)"),
    "matching.temperature": checks.number("(0, inf)"),
    "matching.best_of": checks.integer(1),
    "matching.clip_range": checks.number("(0, inf)"),
    "eval.held_out_rewards": checks.reward_names,
    "eval.num_prompts": checks.integer(0),
    "eval.num_steps": checks.integer(1),
    "eval.solver": checks.solver,
    "eval.guidance_scale": checks.number("[1, inf)"),
    "eval.batch_size": checks.integer(1),
    "eval.resolution": checks.default_or(0, checks.resolution),
    "eval.seed": checks.integer(0),
    "eval.at_start": checks.flag,
    "monitor.action": checks.one_of(("off", "warn", "stop", "raise_kl")),
    "monitor.image_statistics": checks.flag,
    "monitor.max_drop": checks.number("(0, inf)"),
    "monitor.max_diversity_drop": checks.number("(0, 1]"),
    "monitor.max_image_change": checks.number("(0, inf)"),
    "monitor.max_kl": checks.number("[0, inf)"),
    "checkpoint.keep": checks.integer(0),
    "perf.embed_cache_gb": checks.number("[0, inf)"),
    "perf.offload_text_encoders": checks.flag,
    "perf.vae_batch_size": checks.integer(1),
    "perf.gradient_checkpointing": checks.flag,
    "perf.compile": checks.flag,
    "log.wandb": checks.one_of(("online", "offline", "off")),
    "log.wandb_project": checks.filled_text,
    "log.tensorboard": checks.flag,
    "log.num_images": checks.integer(0),
    "log.image_freq": checks.integer(0),
    "distributed.timeout_minutes": checks.number("(0, 1e6]"),
}
SECTIONS = frozenset(key.rpartition(".")[0] for key in SCHEMA) - {""}


# Key of the published code -> (our key or "" if there is none, what differs).
PUBLISHED_KEYS: dict[str, tuple[str, str]] = {
    "beta": ("nft.beta", "the mixing strength of the implicit policies"),
    "train.beta": ("nft.kl_weight", "the weight of the KL term"),
    "decay_type": (
        "nft.old_policy_decay",
        "0 is on_policy, 1 is linear_to_half, 2 is delayed_linear",
    ),
    "prompt_fn": ("dataset", "the format follows from the files in the folder"),
    "per_prompt_stat_tracking": (
        "sample.global_std",
        "the mean is the group's; the deviation is the epoch's (True) or the group's (False)",
    ),
    "use_lora": ("", "a LoRA is always trained; its size is train.lora_rank"),
    "logdir": ("save_dir", "logs are written to the run directory"),
    "num_checkpoint_limit": ("checkpoint.keep", "the best one is also kept; 0 keeps all"),
    "debug": ("", "for a run of seconds use the preset shapes_smoke"),
    "sample.train_batch_size": (
        "sample.batch_size",
        "limits memory only, independent of the group size",
    ),
    "sample.num_batches_per_epoch": (
        "sample.num_groups",
        "prompts per epoch, on all GPUs together",
    ),
    "sample.eval_num_steps": ("eval.num_steps", ""),
    "sample.eval_guidance_scale": ("eval.guidance_scale", ""),
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
    "train.clip_range": ("grpo.clip_range", "of Flow-GRPO"),
    "train.ema": ("train.ema_decay", "0 turns it off"),
    "test.*": ("eval.*", "num_steps, batch_size, guidance_scale, num_prompts, solver"),
}

# Abbreviations that users may write for a part of a key's name.
ABBREVIATIONS = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "wd": "weight_decay",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
}


def validate(config: ConfigDict) -> None:
    """Raises ConfigError with every problem of ``config``.

    For a run in stages, the merged configuration of each stage is checked; a problem that all
    stages share is reported once.
    """
    values = dict(_leaves(config))
    missing = _missing(values)
    if "stages" in missing or not values["stages"]:
        return _raise(_problems(values))
    # Only a complete configuration can be merged.
    _raise([*missing.values(), *stage_problems(values["stages"])])
    total = SCHEMA["num_epochs"](values["num_epochs"])
    own = [f"num_epochs = {_show(values['num_epochs'])}: {total}"] if total else []
    found = [_problems(dict(_leaves(merged))) for merged in merged_configs(ConfigDict(config))]
    common = [line for line in found[0] if all(line in others for others in found)]
    each = [
        f"stage {number}: {line}"
        for number, lines in enumerate(found, start=1)
        for line in lines
        if line not in common
    ]
    _raise([*own, *common, *each])


def expand_paths(config: ConfigDict) -> None:
    """Expands ``~`` in the paths of a valid ``config`` in place."""
    flat = dict(_leaves(config))
    config.update_from_flattened_dict({key: expand(flat[key]) for key in PATHS})


def _raise(problems: list[str]) -> None:
    if problems:
        raise ConfigError(problems)


def _missing(values: Mapping[str, Any]) -> dict[str, str]:
    """Missing key -> its problem."""
    return {
        key: f"{key} is missing: {check(None)}"
        for key, check in SCHEMA.items()
        if key not in values and key.rpartition(".")[0] not in values
    }


def _problems(values: Mapping[str, Any]) -> list[str]:
    """The problems of a whole configuration without stages."""
    problems: dict[str, str] = {}
    for key, value in values.items():
        complaint = SCHEMA[key](value) if key in SCHEMA else unknown_key(key)
        if complaint:
            problems[key] = f"{key} = {_show(value)}: {complaint}"
    return _with_combinations(problems | _missing(values), values)


def validate_settings(values: Mapping[str, Any]) -> None:
    """Raises ConfigError with the problems of a part of a configuration, as a script's options.

    Keys outside of the schema are ignored.
    """
    complaints = {key: SCHEMA[key](value) for key, value in values.items() if key in SCHEMA}
    problems = {k: f"{k} = {_show(values[k])}: {c}" for k, c in complaints.items() if c}
    _raise(_with_combinations(problems, values))


def _with_combinations(problems: Mapping[str, str], values: Mapping[str, Any]) -> list[str]:
    """The ``problems`` of single keys, then those of combinations of valid keys."""
    combined = []
    for keys, check in COMBINATIONS:
        if all(key in values and key not in problems for key in keys):
            complaint = check(*(values[key] for key in keys))
            given = ", ".join(f"{key} = {_show(values[key])}" for key in keys)
            combined += [f"{given}: {complaint}"] if complaint else []
    return [*problems.values(), *combined]


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value; a mapping that is a key or empty counts as a value."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if is_section(value) and key not in SCHEMA and (len(value) or key in SECTIONS):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _show(value: Any) -> str:
    """``repr`` of ``value`` in one line, shortened in the middle to MAX_SHOWN characters."""
    line = " ".join(repr(value.to_dict() if isinstance(value, ConfigDict) else value).split())
    half = MAX_SHOWN // 2
    return line if len(line) <= MAX_SHOWN else f"{line[:half]} ... {line[-half:]}"


def unknown_key(key: str) -> str:
    """The problem of a key that is not in the schema, with a suggestion."""
    if key in SECTIONS:
        keys = ", ".join(known for known in SCHEMA if known.startswith(f"{key}."))
        return f"is a section, not a value; it holds {keys}"
    published = PUBLISHED_KEYS.get(key) or PUBLISHED_KEYS.get(f"{key.split('.')[0]}.*")
    if published:
        ours, note = published
        advice = f"use {ours}" if ours else "drop it"
        return f"is a key of the published code; {advice}{f' ({note})' if note else ''}"
    similar = " or ".join(_similar_keys(key))
    hint = f"did you mean {similar}?" if similar else "the keys are in config/base.py"
    return f"is an unknown key; {hint}"


def _similar_keys(key: str) -> list[str]:
    """The known keys whose name contains that of ``key`` as words, of which the last may be cut
    short, or else is spelled similarly.

    Keys of the same section or of none come first, then names with the fewest words.
    """
    section, _, name = key.rpartition(".")
    name = ABBREVIATIONS.get(name, name)
    names = {known: known.rpartition(".")[2] for known in SCHEMA}
    words = re.compile(rf"(^|_){re.escape(name)}")
    found = [known for known in names if len(name) > 1 and words.search(names[known])]
    if not found:
        close = difflib.get_close_matches(name, names.values(), n=1)
        found = [known for known in names if names[known] in close]
    found = [known for known in found if known.rpartition(".")[0] in (section, "")] or found
    fewest = min((names[known].count("_") for known in found), default=0)
    return [known for known in found if names[known].count("_") == fewest]
