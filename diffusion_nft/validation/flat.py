"""The flat view of a configuration: its leaves by dotted key, as a run keeps them."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion_nft.validation.config_files import load_file

BASE_CONFIG = Path(__file__).resolve().parents[2] / "config" / "base.py"


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """``{"train.learning_rate": 3e-4, ...}``: the leaves of a configuration by dotted key, with
    lists for tuples, as JSON gives them back.

    What the second of ``stages`` sets stands under ``stages.2.``.
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
    """The flat configuration that a run keeps, with the defaults of keys that the version which
    wrote it did not have.
    """
    return {**defaults(), **former}


def unflatten(flat: Mapping[str, Any]) -> ConfigDict:
    """The configuration whose leaves by dotted key are ``flat``."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, name = key.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[name] = value
    return ConfigDict(tree)
