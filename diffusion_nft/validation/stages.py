"""A run in stages: other prompts, rewards or hyper-parameters from some epoch on.

``config.stages`` is a tuple of mappings, one a stage: ``num_epochs``, and what it sets by dotted
key.  Policies, optimizer state, EMA, and the counts of epochs and optimizer steps go on from stage
to stage.  So do the schedules that are functions of them: the old policy's decay, and the learning
rate's halving.  The paper's multi-reward recipe needs that: its last stage caps the decay
min(0.001 s, .95) higher than the others, and lasts 100 steps; counted from its own start, the decay
would end at .1 and never come near the cap.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

# What a stage may set, beside its num_epochs: these keys, and those of these sections.
KEYS, SECTIONS = ("dataset", "reward_fn"), ("sample", "train", "nft", "grpo", "matching", "eval")
# The shape of the LoRA and the constants of the optimizer go with the state that goes on.
FIXED_PREFIXES = ("train.lora_", "train.adam_")
SETTABLE_KEYS = (
    "a stage sets num_epochs, dataset, reward_fn, nft.*, grpo.*, matching.*, sample.*, eval.* and "
    "train.*, without train.lora_* and train.adam_*"
)


@dataclass(frozen=True)
class Stage:
    """A part of a run: the epochs from ``first_epoch`` on, to the ``num_epochs`` of ``config``."""

    config: ConfigDict  # complete, without stages
    number: int = 0  # from 1; 0: the run has no stages
    count: int = 1  # of the run's stages that num_epochs leaves
    first_epoch: int = 0  # epochs that all stages before have made

    @property
    def title(self) -> str:
        """``"stage 2 of 5"``; empty if the run has no stages."""
        return f"stage {self.number} of {self.count}" if self.number else ""

    @property
    def folder(self) -> str:
        """Where results of this stage lie apart from those of others; empty without stages."""
        return f"stage-{self.number}" if self.number else ""

    @property
    def column(self) -> dict[str, int]:
        """What every row of the log says of the stage; nothing if the run has no stages."""
        return {"stage": self.number} if self.number else {}


def stage_problems(stages: Any) -> list[str]:
    """What is wrong with the form of ``config.stages``, a line for each thing; values are not
    looked at.
    """
    if not isinstance(stages, tuple | list) or not all(map(_is_mapping, stages)):
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
    """A complete configuration for each of ``config.stages``, or ``config`` itself without any.

    ``num_epochs`` is the epoch at which the stage ends, whatever ``config.num_epochs`` is.  Of
    ``reward_servers`` and ``reward_options``, which hold for the whole run, a stage has what its
    rewards need.  ``stage_problems`` must have found none; values are taken as they are.
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
    """The stages of a valid ``config`` that begin before its ``num_epochs``, which ends the last.

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


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping | ConfigDict)


def _is_settable(key: Any) -> bool:
    if not isinstance(key, str) or key.startswith(FIXED_PREFIXES):
        return False
    section, *path = key.split(".")
    return key in KEYS or (section in SECTIONS and len(path) == 1)


def _merge(config: ConfigDict, stage: Mapping[str, Any]) -> ConfigDict:
    """A copy of ``config`` with the values of ``stage``, of whatever type: they are checked as
    those of any configuration.
    """
    merged = copy.deepcopy(config)
    with merged.unlocked(), merged.ignore_type():
        merged.stages = ()
        for key, value in stage.items():
            *section, name = key.split(".")
            if key == "reward_fn" and _is_mapping(value):
                value = ConfigDict(dict(value), allow_dotted_keys=True)
            (merged[section[0]] if section else merged)[name] = value
    return merged


def _names(rewards: Any) -> set[str]:
    """The names in a mapping or tuple of rewards; none in what is neither."""
    listed = _is_mapping(rewards) or isinstance(rewards, tuple | list)
    return {name for name in rewards if isinstance(name, str)} if listed else set()
