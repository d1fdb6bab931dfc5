"""What one key of a configuration may hold, whatever the other keys hold.

Each check takes a value and returns what is wrong with it and what would be valid, or None.
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

# What the kernels count with.
MAX_INT64 = 2**63 - 1
# A branch, a tag or a commit; the hub's cache makes a file name of it.
REVISION = re.compile(r"\w[\w./-]*", re.ASCII)


def is_finite_number(value: Any) -> bool:
    """True for an int of 64 bits or a finite float (numpy's float64 is one), but for no bool.

    Others, such as fractions or numpy's integers, have no place in the JSON that a run writes.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= MAX_INT64 if isinstance(value, int) else math.isfinite(value)


def is_section(value: Any) -> bool:
    """True for a mapping, a ConfigDict included."""
    return isinstance(value, Mapping | ConfigDict)


def did_you_mean(name: Any, choices: Collection[str]) -> str:
    """``" (did you mean 'x'?)"`` for the choice that ``name`` comes close to, else empty."""
    close = difflib.get_close_matches(str(name), choices, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def integer(low: int, high: int | None = None) -> Check:
    """An integer from ``low`` to ``high``, both included; 64 bits where there is no ``high``."""
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
    """A finite number in ``interval``, written as in mathematics: ``[0, 1)``, ``(0, inf)``."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def check(value: Any) -> str | None:
        fits = is_finite_number(value) and low <= value <= high
        fits = fits and (value != low or interval[0] == "[")
        fits = fits and (value != high or interval[-1] == "]")
        return None if fits else f"must be a finite number in {interval}"

    return check


def one_of(choices: Collection[str]) -> Check:
    """One of the ``choices``."""

    def check(value: Any) -> str | None:
        if isinstance(value, str) and value in choices:
            return None
        return f"choose from {', '.join(choices)}{did_you_mean(value, choices)}"

    return check


def flag(value: Any) -> str | None:
    """A bool."""
    return None if isinstance(value, bool) else "must be True or False"


def text(value: Any) -> str | None:
    """A line of text, which may be empty."""
    return None if isinstance(value, str) and is_line(value) else "must be text in one line"


def filled_text(value: Any) -> str | None:
    """A line of text with more than spaces."""
    filled = isinstance(value, str) and value.strip() and is_line(value)
    return None if filled else "must be text, not empty, in one line"


def revision(value: Any) -> str | None:
    """A revision on the hub, or empty text."""
    if isinstance(value, str) and (not value or (REVISION.fullmatch(value) and ".." not in value)):
        return None
    return "must be text that names a branch, a tag or a commit, or empty for the default branch"


def _path(value: Any) -> Path | None:
    """Where the path ``value`` leads; None if there can be no such place: control characters, a
    part too long, links in a circle, a folder that this user may not enter, no such user's home.
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
    """The path of a folder that may not exist yet."""
    if not isinstance(value, str) or not value.strip():
        return "must be the path of the run directory, not empty"
    path = _path(value)
    if path is None:
        return (
            "must be a path that can be had: no part too long, no control characters, no links in "
            "a circle, no folder that you may not enter, no ~name of a user without a home"
        )
    there = next(p for p in (path, *path.absolute().parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        return (
            "is a file; must be a folder, which is created if need be"
            if there == path
            else f"cannot be created: {there} is no folder"
        )
    return None if os.access(there, os.W_OK) else f"cannot be written: no permission in {there}"


def folder_or_empty(value: Any) -> str | None:
    """The path of a folder, or empty text."""
    if value == "" or _is_folder(value):
        return None
    return "must be the path of a folder that exists, or empty for none"


def lora_or_empty(value: Any) -> str | None:
    """The path of something that may be a LoRA (it is read later), or empty text."""
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
    """A base model: a folder, a name on the hub, the built-in one."""
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
    """A solver of ours or of diffusers."""
    if not isinstance(value, str) or not is_line(value):
        return "must be the name of a solver"
    try:
        check_solver(value)
    except ValueError as error:
        return f"{error}{did_you_mean(value, SOLVERS)}"
    return None


def old_policy_decay(value: Any) -> str | None:
    """A schedule of NFT's old policy."""
    if not isinstance(value, str):
        return one_of(OLD_POLICY_DECAYS)(value)
    try:
        old_policy_schedule(value)
    except ValueError as error:
        return f"{error}{did_you_mean(value, OLD_POLICY_DECAYS)}"
    return None


def dataset(value: Any) -> str | None:
    """A prompt set with both splits."""
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
    """Any number of different reward names."""
    if not isinstance(value, tuple | list) or not all(isinstance(name, str) for name in value):
        return "must be a tuple of reward names, such as ('aesthetic', 'ocr')"
    complaints = _unknown_rewards(value)
    if len(set(value)) < len(value):
        complaints.append("a name comes twice")
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
            f"{address!r} is no address: it takes http or https, a host and a port, as in "
            "http://host:8000"
            for address in addresses
            if not _is_address(address)
        ]
    return "; ".join(complaints) or None


def _is_address(value: Any) -> bool:
    """An http(s) URL of a host and maybe a port, without user, path and query."""
    if not isinstance(value, str) or value.split() != [value] or "@" in value:
        return False
    try:
        url = urlsplit(value)
        # As the client will read it: a host that no name can be is an error of its own there.
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
