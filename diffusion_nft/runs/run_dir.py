"""The run directory's configuration, and the changes with which a run may continue."""

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion_nft.data.prompts import PromptHashes, changed_prompts, split_file
from diffusion_nft.utils.files import write_atomically
from diffusion_nft.validation.flat import defaults, flatten, with_defaults

CONFIG_FILE = "config.json"
# Sections whose keys are names that users choose.
OPEN_SECTIONS = ("reward_fn.", "reward_servers.", "reward_options.", "stages.")

# Options of rewards that set device, batch size, concurrency and retries, and change scores by
# rounding at most: they may change after a reward ran out of memory or failed.
PLACING_OPTIONS = (
    "device",
    "batch_size",
    "threads",
    "concurrency",
    "timeout",
    "max_retries",
    "max_unparsable",
    "base_url",
    "api_key",
)
# Patterns of keys that may change between two starts of one run, as they do not alter training
# (except alarms that raise the KL term's weight, which are logged).
CHANGEABLE_KEYS = (
    "run_name",
    "save_dir",
    "allow_changed_prompts",
    "num_epochs",
    "save_freq",
    "eval_freq",
    "resume_from",
    "train.lora_path",
    "reward_servers.*",
    "reward_server_timeout_seconds",
    "max_unscored",
    "sample.batch_size",
    "train.batch_size",
    "train.max_skipped_steps",
    "eval.*",
    "checkpoint.*",
    "monitor.*",
    "perf.*",
    "log.*",
    "distributed.*",
    *(f"reward_options.*.{option}" for option in PLACING_OPTIONS),
)


def deciding_options(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options of each reward that affect its scores."""
    return {
        name: {key: value for key, value in own.items() if key not in PLACING_OPTIONS}
        for name, own in options.items()
    }


class RunDirError(ValueError):
    """The run directory belongs to another configuration or to other prompts."""


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per differing key of two flat configurations that alters training."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        # A stage's keys follow the same rules, except num_epochs, which sets where the next begins.
        name = re.sub(r"^stages\.\d+\.(?!num_epochs$)", "", key)
        free = any(fnmatchcase(name, pattern) for pattern in CHANGEABLE_KEYS)
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if free or before == after:
            continue
        known = key in new or key in defaults() or key.startswith(OPEN_SECTIONS)
        lines.append(
            f"{key}: {before!r} -> {after!r}"
            if known
            else f"{key}: {before!r} -> not a key of this version, which cannot continue the run"
        )
    return lines


def check_run_dir(config: ConfigDict) -> None:
    """Raises RunDirError if ``config`` cannot continue the run in ``config.save_dir``: naming the
    differing keys that alter training, or if the stored configuration is damaged.

    Keys that the run's version did not have are compared by their defaults.
    """
    path = Path(config.save_dir) / CONFIG_FILE
    if not path.exists():
        return
    try:
        former = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunDirError(
            f"{path} is damaged (not JSON): put back the object under 'config' in a checkpoint's "
            "state.json (not of a run in stages), or remove the file to continue without this check"
        ) from error
    lines = differences(with_defaults(former), flatten(config))
    if lines:
        raise RunDirError(
            f"{config.save_dir} holds a run with another configuration:\n  "
            + "\n  ".join(lines)
            + "\nchoose another --config.save_dir, or use the former values; to start a new run "
            f"from the policies of this one, use --config.resume_from={config.save_dir}"
        )


def check_prompts_kept(config: ConfigDict, former: PromptHashes, now: PromptHashes) -> None:
    """Raises RunDirError naming the prompt files that have changed since the run's last start,
    unless ``config.allow_changed_prompts``.
    """
    changed = changed_prompts(former, now)
    if changed and not config.allow_changed_prompts:
        lines = [
            f"{split_file(dataset, split)}: SHA-256 {former[dataset][split][:12]}... -> "
            f"{now[dataset][split][:12]}..."
            for dataset, split in changed
        ]
        raise RunDirError(
            f"{config.save_dir} holds a run on other prompts; these files have changed since:\n  "
            + "\n  ".join(lines)
            + "\nrestore the former files, choose another --config.save_dir, or continue with the "
            "new files by --config.allow_changed_prompts=True"
        )


def write_config(config: ConfigDict) -> None:
    """Writes ``config.json`` into the run directory atomically."""
    folder = Path(config.save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(flatten(config), indent=2, sort_keys=True) + "\n"
    write_atomically(folder / CONFIG_FILE, text.encode())
