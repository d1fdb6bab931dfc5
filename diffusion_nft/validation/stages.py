"""Runs in stages, which change prompts, rewards or hyper-parameters at given epochs.

``config.stages`` is a tuple of mappings, one per stage: ``num_epochs``, and changed values by
dotted key.  Policies, optimizer state, EMA and the counts of epochs and optimizer steps continue
from stage to stage, and so do the schedules of the old policy's decay and the learning rate.  The
paper's multi-reward recipe relies on it: its last stage, of 100 steps, raises the cap of the decay
min(0.001 s, .95), which would end at .1 if the steps were counted per stage.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from diffusion_nft.validation.checks import is_section

# Keys and sections that a stage may set, in addition to its num_epochs.
KEYS, SECTIONS = ("dataset", "reward_fn"), ("sample", "train", "nft", "grpo", "matching", "eval")
# The LoRA's shape and the optimizer's constants belong to the state that continues.
FIXED_PREFIXES = ("train.lora_", "train.adam_")
SETTABLE_KEYS = (
    "a stage may set num_epochs, dataset, reward_fn, nft.*, grpo.*, matching.*, sample.*, eval.* "
    "and train.*, without train.lora_* and train.adam_*"
)


@dataclass(frozen=True)
class Stage:
    """The epochs of a run from ``first_epoch`` up to ``config.num_epochs``."""

    config: ConfigDict  # complete, without stages
    number: int = 0  # from 1; 0 in a run without stages
    count: int = 1  # number of stages that begin before the run's num_epochs
    first_epoch: int = 0  # number of epochs in all previous stages

    @property
    def title(self) -> str:
        """``"stage 2 of 5"``, or "" in a run without stages."""
        return f"stage {self.number} of {self.count}" if self.number else ""

    @property
    def folder(self) -> str:
        """Subfolder of the stage's results, or "" in a run without stages."""
        return f"stage-{self.number}" if self.number else ""

    @property
    def column(self) -> dict[str, int]:
        """Entry of the stage in each row of the log; empty in a run without stages."""
        return {"stage": self.number} if self.number else {}


def stage_problems(stages: Any) -> list[str]:
    """The problems of the form of ``config.stages``, one per line; values are not checked."""
    if not isinstance(stages, tuple | list) or not all(map(is_section, stages)):
        shown = stages.to_dict() if isinstance(stages, ConfigDict) else stages
        return [
            f"stages = {shown!r}: must be a tuple of mappings, such as "
            "({'num_epochs': 100, 'dataset': 'ocr'}, {'num_epochs': 50, 'nft.beta': 0.1})"
        ]
    problems = []
    for number, stage in enumerate(stages, start=1):
        epochs = stage.get("num_epochs")
        if type(epochs) is not int or epochs < 1:
            problems.append(f"stage {number}: num_epochs = {epochs!r}: must be an integer >= 1")
        problems += [
            f"stage {number}: {key} = {value!r}: must be the same in all stages; {SETTABLE_KEYS}"
            for key, value in stage.items()
            if key != "num_epochs" and not _is_settable(key)
        ]
    return problems


def merged_configs(config: ConfigDict) -> list[ConfigDict]:
    """The complete configuration of each of ``config.stages``, or ``config`` itself without any.

    ``num_epochs`` becomes the epoch at which the stage ends, regardless of ``config.num_epochs``.
    ``reward_servers`` and ``reward_options``, which belong to the whole run, are reduced to the
    stage's rewards.  The form of ``stages`` must be valid (``stage_problems``); values need not be.
    """
    if not config.stages:
        return [config]
    merged, epochs = [], 0
    for stage in config.stages:
        epochs += stage["num_epochs"]
        merged.append(_merge(config, {**stage, "num_epochs": epochs}))
    used = [_names(one.reward_fn) | _names(one.eval.held_out_rewards) for one in merged]
    elsewhere = set().union(*used)
    for one, own in zip(merged, used, strict=True):
        for options in (one.reward_servers, one.reward_options):
            with options.unlocked():
                for name in _names(options) & elsewhere - own:
                    del options[name]
    return merged


def stages_of(config: ConfigDict) -> list[Stage]:
    """The stages of a valid ``config`` that begin before its ``num_epochs``, where the run ends.

    Without ``config.stages`` the whole run is one stage.
    """
    if not config.stages:
        return [Stage(config)]
    merged = merged_configs(config)
    starts = [0, *(one.num_epochs for one in merged)]
    count = sum(start < config.num_epochs for start in starts[:-1])
    for one in merged:
        one.num_epochs = min(one.num_epochs, config.num_epochs)
    return [Stage(merged[i], i + 1, count, starts[i]) for i in range(count)]


def _is_settable(key: Any) -> bool:
    if not isinstance(key, str) or key.startswith(FIXED_PREFIXES):
        return False
    section, *path = key.split(".")
    return key in KEYS or (section in SECTIONS and len(path) == 1)


def _merge(config: ConfigDict, stage: Mapping[str, Any]) -> ConfigDict:
    """A copy of ``config`` with the unchecked values of ``stage``."""
    merged = copy.deepcopy(config)
    with merged.unlocked(), merged.ignore_type():
        merged.stages = ()
        for key, value in stage.items():
            *section, name = key.split(".")
            if key == "reward_fn" and is_section(value):
                value = ConfigDict(dict(value), allow_dotted_keys=True)
            (merged[section[0]] if section else merged)[name] = value
    return merged


def _names(rewards: Any) -> set[str]:
    """The names in a mapping or tuple of rewards; empty for an invalid value."""
    listed = is_section(rewards) or isinstance(rewards, tuple | list)
    return {name for name in rewards if isinstance(name, str)} if listed else set()
