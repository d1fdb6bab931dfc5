"""Checks of single values of a configuration.

A check takes a value and returns None if it is valid, otherwise what would be valid.
"""

import difflib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from ml_collections import ConfigDict

from diffusion_nft.algorithms.nft import OLD_POLICY_DECAYS, old_policy_schedule
from diffusion_nft.data.prompts import SPLITS, split_file
from diffusion_nft.models import HUB_NAME, PIPELINE_INDEX
from diffusion_nft.rewards import REWARDS, check_options
from diffusion_nft.shapes import BUILT_IN_MODEL
from diffusion_nft.solvers import SOLVERS, check_solver
from diffusion_nft.utils.paths import expand, is_line

Check = Callable[[Any], str | None]

MAX_INT64 = 2**63 - 1
# A latent covers 8 x 8 pixels (VAE), a token 2 x 2 latents (transformer).
PIXELS_PER_TOKEN, MAX_PIXELS = 16, 2**16
# A branch, tag or commit; the hub's cache uses it as a file name.
REVISION = re.compile(r"\w[\w./-]*", re.ASCII)


def is_finite_number(value: Any) -> bool:
    """True for an int of 64 bits or a finite float (including numpy's float64), not for a bool.

    Other numbers, such as fractions or numpy's integers, cannot be written as JSON.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= MAX_INT64 if isinstance(value, int) else math.isfinite(value)


def is_section(value: Any) -> bool:
    return isinstance(value, Mapping | ConfigDict)


def did_you_mean(name: Any, choices: Collection[str]) -> str:
    """``" (did you mean 'x'?)"`` for a choice spelled like ``name``, else empty."""
    close = difflib.get_close_matches(str(name), choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def integer(low: int, high: int | None = None) -> Check:
    """An integer from ``low`` to ``high``, inclusive; of 64 bits without ``high``."""
    valid = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    last = MAX_INT64 if high is None else high

    def check(value: Any) -> str | None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value:
            return f"must be {valid}"
        if value > last:
            return f"must be {valid}" if high is not None else f"must be {valid} and <= {MAX_INT64}"
        return None

    return check


def number(interval: str) -> Check:
    """A finite number in ``interval``, such as ``[0, 1)`` or ``(0, inf)``."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def check(value: Any) -> str | None:
        fits = is_finite_number(value) and low <= value <= high
        fits = fits and (value != low or interval[0] == "[")
        fits = fits and (value != high or interval[-1] == "]")
        return None if fits else f"must be a finite number in {interval}"

    return check


def one_of(choices: Collection[str]) -> Check:
    def check(value: Any) -> str | None:
        if isinstance(value, str) and value in choices:
            return None
        return f"choose from {', '.join(choices)}{did_you_mean(value, choices)}"

    return check


def default_or(default: Any, check: Check) -> Check:
    """``default``, or a value that passes ``check``."""
    return lambda value: None if value == default else check(value)


def resolution(value: Any) -> str | None:
    """Pixels: one number, or (height, width)."""
    sides = value if isinstance(value, tuple | list) else (value, value)
    if len(sides) != 2 or any(integer(PIXELS_PER_TOKEN, MAX_PIXELS)(side) for side in sides):
        valid = f"an integer from {PIXELS_PER_TOKEN} to {MAX_PIXELS}"
        return f"must be {valid}, or two: (height, width)"
    if any(side % PIXELS_PER_TOKEN for side in sides):
        near = tuple(side - side % PIXELS_PER_TOKEN for side in sides)
        near = near if sides is value else near[0]
        return f"must be a multiple of {PIXELS_PER_TOKEN}, such as {near}"
    return None


def lora_targets(value: Any) -> str | None:
    """A preset's name or a regular expression, or a tuple of ends of layers' names."""
    if isinstance(value, tuple | list):
        names = value and not any(map(filled_text, value))
        return None if names else "must be a tuple of ends of names, such as ('attn.to_q',)"
    if complaint := filled_text(value):
        return complaint
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        return f"must be a name, a tuple of names or a regular expression ({error})"
    return None


def flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be True or False"


def text(value: Any) -> str | None:
    """One line of text, possibly empty."""
    return None if isinstance(value, str) and is_line(value) else "must be text in one line"


def filled_text(value: Any) -> str | None:
    """One line of text that is not blank."""
    filled = isinstance(value, str) and value.strip() and is_line(value)
    return None if filled else "must be text, not empty, in one line"


def revision(value: Any) -> str | None:
    """A revision on the hub, or "" for the default branch."""
    if isinstance(value, str) and (not value or (REVISION.fullmatch(value) and ".." not in value)):
        return None
    return "must be text that names a branch, a tag or a commit, or empty for the default branch"


def _path(value: Any) -> Path | None:
    """``value`` as an expanded path; None if no such path can exist: control characters, a name
    too long, circular links, a folder without permission, or the home of an unknown user.
    """
    try:
        path = Path(expand(value))
    except ValueError:
        return None
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except OSError:
        return None
    return path


def _is_folder(value: Any) -> bool:
    path = _path(value) if isinstance(value, str) and value else None
    return path is not None and path.is_dir()


def new_folder(value: Any) -> str | None:
    """The path of a folder that exists or can be created."""
    if not isinstance(value, str) or not value.strip():
        return "must be the path of the run directory, not empty"
    path = _path(value)
    if path is None:
        return (
            "must be a valid path: no name too long, no control characters, no circular links, no "
            "folder without permission, no ~name of a user without a home"
        )
    there = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        return (
            "is a file; must be a folder, which is created if it does not exist"
            if there == path
            else f"cannot be created: {there} is not a folder"
        )
    return None if os.access(there, os.W_OK) else f"cannot be written: no permission in {there}"


def folder_or_empty(value: Any) -> str | None:
    """The path of a folder, or "" for none."""
    if value == "" or _is_folder(value):
        return None
    return "must be the path of a folder that exists, or empty for none"


def lora_or_empty(value: Any) -> str | None:
    """The path of files that look like a LoRA (they are read later), or "" for none."""
    if value == "":
        return None
    path = _path(value) if isinstance(value, str) else None
    if path is not None:
        found = [*path.glob("*.safetensors"), *path.glob("adapter_*"), *path.glob("lora/adapter_*")]
        if found or (path.is_file() and path.suffix == ".safetensors"):
            return None
    return (
        "must be a LoRA that exists (a PEFT folder, which holds adapter_config.json, a checkpoint, "
        "or a .safetensors file or a folder with one), or empty for none"
    )


def model(value: Any) -> str | None:
    """A base model: a diffusers folder, a hub name, or the built-in model."""
    if isinstance(value, str):
        hub = HUB_NAME.fullmatch(value) and ".." not in value
        folder = _is_folder(value) and Path(expand(value), PIPELINE_INDEX).is_file()
        if value == BUILT_IN_MODEL or folder or (hub and not Path(value).is_dir()):
            return None
    return (
        f"must be a diffusers folder that exists (it holds {PIPELINE_INDEX}), a hub name "
        f"(owner/name), or {BUILT_IN_MODEL!r}"
        f"{did_you_mean(value, (BUILT_IN_MODEL,))}"
    )


def solver(value: Any) -> str | None:
    """A built-in solver or a diffusers scheduler."""
    if not isinstance(value, str) or not is_line(value):
        return "must be the name of a solver"
    try:
        check_solver(value)
    except ValueError as error:
        return f"{error}{did_you_mean(value, SOLVERS)}"
    return None


def old_policy_decay(value: Any) -> str | None:
    if not isinstance(value, str):
        return one_of(OLD_POLICY_DECAYS)(value)
    try:
        old_policy_schedule(value)
    except ValueError as error:
        return f"{error}{did_you_mean(value, OLD_POLICY_DECAYS)}"
    return None


def dataset(value: Any) -> str | None:
    if not isinstance(value, str):
        return "must be the name of a prompt set, or the path of a folder"
    try:
        for split in SPLITS:
            split_file(value, split)
    except ValueError as error:
        return str(error).removeprefix(f"dataset = {value!r}: ")
    return None


def _unknown_rewards(names: Iterable[Any]) -> list[str]:
    unknown = [name for name in names if name not in REWARDS]
    complaints = [f"{name!r} is unknown{did_you_mean(name, REWARDS)}" for name in unknown]
    return [*complaints, f"choose from {', '.join(REWARDS)}"] if unknown else []


def reward_weights(value: Any) -> str | None:
    """Reward name -> weight, at least one."""
    if not is_section(value):
        return "must map reward names to weights"
    if not value:
        return f"needs at least one reward; choose from {', '.join(REWARDS)}"
    complaints = _unknown_rewards(value)
    for name, weight in value.items():
        if not is_finite_number(weight) or weight == 0:
            complaints.append(f"the weight of {name!r} must be a finite number other than 0")
    return "; ".join(complaints) or None


def reward_names(value: Any) -> str | None:
    """Distinct reward names, possibly none."""
    if not isinstance(value, tuple | list) or not all(isinstance(name, str) for name in value):
        return "must be a tuple of reward names, such as ('aesthetic', 'ocr')"
    complaints = _unknown_rewards(value)
    if len(set(value)) < len(value):
        complaints.append("a name is repeated")
    return "; ".join(complaints) or None


def reward_addresses(value: Any) -> str | None:
    """Reward name -> the addresses of its servers, at least one."""
    if not is_section(value):
        return "must map reward names to addresses, as in {'geneval': ('http://host:8000',)}"
    complaints = _unknown_rewards(value)
    for name, addresses in value.items():
        if not isinstance(addresses, tuple | list) or not addresses:
            complaints.append(f"{name!r} needs a tuple of addresses, as ('http://host:8000',)")
            continue
        complaints += [
            f"{address!r} is not an address: it takes http or https, a host and a port, as in "
            "http://host:8000"
            for address in addresses
            if not _is_address(address)
        ]
    return "; ".join(complaints) or None


def _is_address(value: Any) -> bool:
    """True for an http(s) URL of a host and an optional port, without user, path and query."""
    if not isinstance(value, str) or value.split() != [value] or "@" in value:
        return False
    try:
        url = urlsplit(value)
        # The client's parser refuses invalid host names, which urlsplit accepts.
        httpx.URL(value)
        plain = value in (f"http://{url.netloc}", f"https://{url.netloc}")
        return plain and url.port != 0 and bool(url.hostname)
    except (ValueError, httpx.InvalidURL):
        return False


def reward_options(value: Any) -> str | None:
    """Reward name -> option -> value."""
    if not is_section(value):
        return "must map reward names to options, as in {'ocr': {'backend': 'paddleocr'}}"
    complaints = _unknown_rewards(value)
    for name, options in value.items():
        if not is_section(options):
            complaints.append(f"{name!r} needs a mapping of options, as {{'batch_size': 8}}")
        elif name in REWARDS:
            try:
                check_options(name, dict(options.items()))
            except ValueError as error:
                complaints.append(str(error))
    return "; ".join(complaints) or None
