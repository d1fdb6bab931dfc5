"""The one check of a whole configuration, before any model is loaded.

``SCHEMA`` says what each key of config/base.py may hold, ``constraints.py`` which values cannot go
together, ``PUBLISHED_KEYS`` what became of the keys of the published code.  ``validate`` reports
every problem at once, one a line: the key, its value, and what would be valid.
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
from diffusion_nft.validation.constraints import COMBINATIONS, PIXELS_PER_TOKEN
from diffusion_nft.validation.stages import merged_configs, stage_problems

# Keys whose value is a path, or may be one; a dataset is expanded where it is looked up.
PATHS = ("save_dir", "resume_from", "pretrained.model", "train.lora_path")
# Characters of a value that an error quotes.
MAX_SHOWN = 400


class ConfigError(ValueError):
    """A configuration that cannot run; ``problems`` holds one line for each thing to repair."""

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
    "pretrained.model_type": checks.one_of(MODELS),
    "pretrained.max_sequence_length": checks.integer(1, 512),
    "resolution": checks.integer(PIXELS_PER_TOKEN),
    "dataset": checks.dataset,
    "allow_changed_prompts": checks.flag,
    "reward_fn": checks.reward_weights,
    "reward_servers": checks.reward_addresses,
    # Beyond, the clocks of sockets and collectives overflow.
    "reward_server_timeout_seconds": checks.number("(0, 1e6]"),
    "reward_options": checks.reward_options,
    "max_unscored": checks.integer(0),
    "sample.num_groups": checks.integer(1),
    # An image alone in its group is its own mean: its advantage is 0, and nothing is learnt.
    "sample.num_image_per_prompt": checks.integer(2),
    "sample.batch_size": checks.integer(1),
    "sample.solver": checks.solver,
    "sample.num_steps": checks.integer(1),
    "sample.noise_level": checks.number("[0, inf)"),
    "sample.guidance_scale": checks.number("[1, inf)"),
    "sample.global_std": checks.flag,
    "sample.standardize_rewards": checks.flag,
    "train.batch_size": checks.integer(0),
    "train.gradient_step_per_epoch": checks.integer(1),
    "train.num_inner_epochs": checks.integer(1),
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
    "num_checkpoint_limit": ("checkpoint.keep", "the best one is kept besides; 0 keeps all"),
    "debug": ("", "for a run of seconds take the preset shapes_smoke"),
    "sample.train_batch_size": ("sample.batch_size", "a memory knob, free of the group size"),
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

# Abbreviations that are no part of the name of a key -> a part of it.
ABBREVIATIONS = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "wd": "weight_decay",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
}


def validate(config: ConfigDict) -> None:
    """Raise ConfigError, listing every problem, unless ``config`` can run, on any number of ranks.

    Of a run in stages each is checked as a whole, and what is wrong in all of them is said once.
    """
    values = dict(_leaves(config))
    missing = _missing(values)
    if "stages" in missing or not values["stages"]:
        return _raise(_problems(values))
    # Only what is whole can be merged.
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
    """Expands ``~`` in the paths of a valid ``config``, in place."""
    flat = dict(_leaves(config))
    config.update_from_flattened_dict({key: expand(flat[key]) for key in PATHS})


def _raise(problems: list[str]) -> None:
    """ConfigError if there are any ``problems``."""
    if problems:
        raise ConfigError(problems)


def _missing(values: Mapping[str, Any]) -> dict[str, str]:
    """Key -> what it must hold, of every key that ``values`` lacks."""
    return {
        key: f"{key} is missing: {check(None)}"
        for key, check in SCHEMA.items()
        if key not in values and key.rpartition(".")[0] not in values
    }


def _problems(values: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with a whole configuration without stages."""
    problems: dict[str, str] = {}
    for key, value in values.items():
        complaint = SCHEMA[key](value) if key in SCHEMA else unknown_key(key)
        if complaint:
            problems[key] = f"{key} = {_show(value)}: {complaint}"
    return _with_combinations(problems | _missing(values), values)


def validate_settings(values: Mapping[str, Any]) -> None:
    """Raise ConfigError unless those keys of a configuration that ``values`` has can go together.

    For scripts that need a part of a configuration; keys that no configuration has are ignored.
    """
    complaints = {key: SCHEMA[key](value) for key, value in values.items() if key in SCHEMA}
    problems = {k: f"{k} = {_show(values[k])}: {c}" for k, c in complaints.items() if c}
    _raise(_with_combinations(problems, values))


def _with_combinations(problems: Mapping[str, str], values: Mapping[str, Any]) -> list[str]:
    """The ``problems`` of single keys, and those of combinations of the other ones."""
    combined = []
    for combination in COMBINATIONS:
        if all(key in values and key not in problems for key in combination.keys):
            complaint = combination.check(*(values[key] for key in combination.keys))
            given = ", ".join(f"{key} = {_show(values[key])}" for key in combination.keys)
            combined += [f"{given}: {complaint}"] if complaint else []
    return [*problems.values(), *combined]


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value; a mapping that is itself a key, or empty, is a value."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if is_section(value) and key not in SCHEMA and (len(value) or key in SECTIONS):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _show(value: Any) -> str:
    """``value`` as Python writes it, in one line, its middle left out where it is long."""
    line = " ".join(repr(value.to_dict() if isinstance(value, ConfigDict) else value).split())
    half = MAX_SHOWN // 2
    return line if len(line) <= MAX_SHOWN else f"{line[:half]} ... {line[-half:]}"


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
    close = _namesakes(key) or difflib.get_close_matches(key, SCHEMA, n=1)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    return f"is an unknown key{hint or '; the keys are in config/base.py'}"


def _namesakes(key: str) -> list[str]:
    """The known keys whose name is that of ``key``, or holds it as whole words, of which the last
    may be cut short: those with the fewest other words, of the same section if there are any.
    """
    section, _, name = key.rpartition(".")
    name = ABBREVIATIONS.get(name, name)
    others: dict[str, tuple[int, bool]] = {}
    for known in SCHEMA:
        last = known.rpartition(".")[2]
        if len(name) > 1 and re.search(rf"(^|_){re.escape(name)}", last):
            others[known] = (last.count("_") - name.count("_"), last != name)
    found = [known for known in others if others[known] == min(others.values())]
    return [known for known in found if known.rpartition(".")[0] == section] or found
