"""Planned runs of an experiment: one configuration per variant and seed."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion_nft.data.prompts import PromptHashes, changed_prompts, hash_splits
from diffusion_nft.runs.run_dir import CONFIG_FILE
from diffusion_nft.utils.files import read_object
from diffusion_nft.validation.config_files import load_file
from diffusion_nft.validation.flat import flatten
from diffusion_nft.validation.schema import SCHEMA, expand_paths, unknown_key, validate
from diffusion_nft.validation.stages import stages_of

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "scripts" / "train_nft.py"
LOG_FILE = "experiment.log"
# Keys, or prefixes of keys, that may differ between two runs that count as the same.  The limits
# of alarms are among them: experiments only warn.
IRRELEVANT_KEYS = (
    *("run_name", "save_dir", "save_freq", "checkpoint.", "log.", "distributed.", "monitor.max_"),
)


@dataclass(frozen=True)
class PlannedRun:
    """One variant of an experiment with one seed."""

    name: str  # of the experiment
    experiment: Any  # of config/experiments.py
    variant: str
    seed: int
    config: ConfigDict
    result: Path

    @property
    def preset(self) -> str:
        """file:name."""
        variant = self.experiment.variants[self.variant]
        return f"{os.path.relpath(ROOT / variant.file)}:{variant.preset}"

    @property
    def changes(self) -> dict[str, Any]:
        return self.experiment.changes(self.variant)

    @property
    def folder(self) -> Path:
        return Path(self.config.save_dir)

    @property
    def log(self) -> Path:
        return self.folder / LOG_FILE

    @property
    def title(self) -> str:
        return f"{self.name} {self.variant} seed {self.seed}"

    @property
    def prompts(self) -> PromptHashes:
        """SHA-256 of the prompt files."""
        return hash_splits({stage.config.dataset for stage in stages_of(self.config)})

    def command(self) -> list[str]:
        """Arguments of the Python interpreter, with paths relative to the current folder."""
        seeds = {"seed": self.seed, "eval.seed": self.seed}
        changes = {**self.changes, **seeds, "save_dir": self.config.save_dir}
        flags = [
            f"--config.{key}={value if isinstance(value, str) else repr(value)}"
            for key, value in changes.items()
        ]
        return [os.path.relpath(TRAIN), f"--config={self.preset}", *flags]


def plan(name: str, experiment: Any, args: argparse.Namespace) -> list[PlannedRun]:
    """The requested runs, ordered by seed.

    Raises ValueError for a variant with an invalid configuration.
    """
    return [
        make_run(name, experiment, variant, seed, args)
        for seed in dict.fromkeys(args.seeds or experiment.seeds)
        for variant in dict.fromkeys(args.variants or experiment.variants)
    ]


def make_run(
    name: str, experiment: Any, variant: str, seed: int, args: argparse.Namespace
) -> PlannedRun:
    """One run of the experiment ``name``, with its validated configuration."""
    chosen, changes = experiment.variants[variant], experiment.changes(variant)
    stem = f"{variant}-seed{seed}"
    try:
        for key in changes:
            if key not in SCHEMA and not key.startswith("reward_fn."):
                raise ValueError(f"{key} {unknown_key(key)}")
        config = load_file(ROOT / chosen.file).get_config(chosen.preset)
        config.update_from_flattened_dict(changes)
        config.seed = config.eval.seed = seed
        config.save_dir = str(args.runs / name / stem)
        validate(config)
        expand_paths(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}, variant {variant}: {error}") from error
    result = args.results / name / f"{stem}.jsonl"
    return PlannedRun(name, experiment, variant, seed, config, result)


def differences(
    run: PlannedRun, former: dict[str, Any], former_changes: Sequence[str]
) -> list[str]:
    """One line per key with another value than in the flat configuration ``former``.

    A key in only one of the two is ignored unless a variant sets it: another version added or
    removed it, with the same behaviour by default.
    """
    now, set_by_variant = flatten(run.config), {*run.changes, *former_changes}
    lines = []
    for key in sorted(former.keys() | now.keys()):
        known = key in former and key in now
        free = any(key == k or (k.endswith(".") and key.startswith(k)) for k in IRRELEVANT_KEYS)
        before, after = former.get(key, "(absent)"), now.get(key, "(absent)")
        if not free and before != after and (known or key in set_by_variant):
            lines.append(f"{key}: {before!r} -> {after!r}")
    return lines


def read_header(path: Path) -> dict[str, Any]:
    """The first line of a result.  Raises ValueError if ``path`` is not one."""
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    try:
        header = json.loads(line)
        return {**header, "config": dict(header["config"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a result of an experiment: {error!r}") from error


def is_done(run: PlannedRun) -> bool:
    """True if the result of ``run`` exists.

    Raises ValueError if the result or the run directory belongs to another configuration.
    """
    done = run.result.is_file()
    if done:
        header = read_header(run.result)
        changed = differences(run, header["config"], list(header["changes"]))
        # Results of earlier versions have no hashes of their prompts.
        for dataset, split in changed_prompts(header.get("prompts", {}), run.prompts):
            changed.append(f"the {split} prompts of dataset {dataset}")
        refuse(run, run.result, changed)
    elif (path := run.folder / CONFIG_FILE).is_file():
        refuse(run, run.folder, differences(run, read_object(path), []))
    return done


def refuse(run: PlannedRun, path: Path, lines: list[str]) -> None:
    """Raises ValueError if there are ``lines``: differences between ``path`` and ``run``."""
    if lines:
        raise ValueError(
            f"{run.title} has changed since {path}:\n  "
            + "\n  ".join(lines)
            + f"\nremove {run.result} and {run.folder} to run it again, or rename the variant"
        )
