"""The flat view of a configuration: its leaves by dotted key, as stored with a run."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion_nft.validation.config_files import load_file

BASE_CONFIG = Path(__file__).resolve().parents[2] / "config" / "base.py"


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """``{"train.learning_rate": 3e-4, ...}``: the leaves of a configuration by dotted key.

    Tuples become lists, as in JSON; values of the second of ``stages`` are under ``stages.2.``.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key == "stages":
            value = dict(enumerate(value, start=1))
        if isinstance(value, (ConfigDict, dict)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


@functools.cache
def defaults() -> Mapping[str, Any]:
    """The flat configuration of config/base.py."""
    return flatten(load_file(BASE_CONFIG).get_config())


def with_defaults(former: Mapping[str, Any]) -> dict[str, Any]:
    """A run's flat configuration, with defaults for keys that the version it used did not have."""
    return {**defaults(), **former}


def unflatten(flat: Mapping[str, Any]) -> ConfigDict:
    """The inverse of ``flatten``, for a configuration without stages."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, name = key.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[name] = value
    return ConfigDict(tree)
