"""Rewards: the registry and the interface.

A reward is a callable class that is built once per process::

    class MyReward:
        def __init__(self, device: torch.device, *, batch_size: int = 16): ...
        def __call__(self, images, prompts, metadata) -> RewardOutput: ...

``images: float [B, 3, H, W] in [0, 1]`` on any device, ``prompts: list[str]``, ``metadata:
list[dict]`` (the lines of the data set).  One line in REWARDS registers it.  For an image that it
cannot score, a reward raises an error or returns NaN, never a silent zero.

A reward whose packages conflict with those of training runs in a server (``serving/``), in a
separate environment with numpy, pillow, torch, fastapi and uvicorn.  This package and the modules
of REWARDS therefore import no other large package before a reward is built.
"""

import argparse
import ast
import importlib
import inspect
import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Protocol, get_args, get_origin

import torch
from torch import Tensor

from diffusion_nft.utils.devices import usable_device
from diffusion_nft.utils.paths import expand

# name -> "module:Class"; a module is imported only when its reward is built.
REWARDS: dict[str, str] = {
    "geneval": "diffusion_nft.rewards.geneval:GenEvalReward",
    "ocr": "diffusion_nft.rewards.ocr:OcrReward",
    "pickscore": "diffusion_nft.rewards.pickscore:PickScoreReward",
    "clipscore": "diffusion_nft.rewards.clipscore:ClipScoreReward",
    "hpsv2": "diffusion_nft.rewards.hpsv2:HPSv2Reward",
    "aesthetic": "diffusion_nft.rewards.aesthetic:AestheticReward",
    "imagereward": "diffusion_nft.rewards.imagereward:ImageRewardReward",
    "unifiedreward": "diffusion_nft.rewards.unifiedreward:UnifiedRewardReward",
    "shapes": "diffusion_nft.rewards.shapes:ShapesReward",
    "jpeg_compressibility": "diffusion_nft.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "diffusion_nft.rewards.jpeg:JpegIncompressibility",
    "image_statistics": "diffusion_nft.rewards.image_statistics:ImageStatistics",
}

# The reward that ``monitor.image_statistics`` watches.
IMAGE_STATISTICS = "image_statistics"
# Rewards that cannot score every prompt -> "module:function" that raises ValueError for a prompt
# that cannot be scored.  Arguments: prompt, metadata, the reward's options (None if it is served).
PROMPT_CHECKS: dict[str, str] = {
    "geneval": "diffusion_nft.rewards.geneval.vocabulary:check_prompt",
    "ocr": "diffusion_nft.rewards.ocr:check_prompt",
    "shapes": "diffusion_nft.rewards.shapes:check_prompt",
}


@dataclass(frozen=True)
class RewardOutput:
    """``scores: [B]`` and named ``components: [B]`` for the log; higher is better for both.

    A component of NaN does not apply to the image and is left out of the mean.  A score of NaN:
    the image could not be scored, for the reason in ``reasons`` (by row).
    """

    scores: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)


class Reward(Protocol):
    """Scores a batch of ``images: [B, 3, H, W]`` in [0, 1]."""

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict]
    ) -> RewardOutput: ...


# Prefix of a device in reward options: several processes may use it.
SHARED = "shared:"
# Names of torch dtypes in reward options.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Annotation of an argument -> types of its value in a configuration.
JSON_TYPES: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str,),
    Path: (str,),
    NoneType: (NoneType,),
}

# Lines of a prompt set that an error quotes, and characters for the numbers of further lines.
MAX_SHOWN, MAX_NUMBERS = 3, 800
# Seconds per request to a reward server, including the wait in its queue.
REWARD_SERVER_TIMEOUT = 300.0


def build_reward(
    name: str,
    device: torch.device,
    options: Mapping[str, Any] | None = None,
    addresses: Sequence[str] = (),
    *,
    timeout: float = REWARD_SERVER_TIMEOUT,
) -> Reward:
    """Builds the reward ``name``: in this process, or as a client of the servers at ``addresses``.

    ``options``: keyword arguments of its class as plain values (``check_options``); a served reward
    takes them from its server.  ``timeout``: seconds per request to a server.  Raises ValueError
    for an unknown name, option or device, ImportError for a missing package, and OSError for a
    missing weight file or server.
    """
    options = dict(options or {})
    check_options(name, options)
    if addresses:
        if options:
            raise ValueError(f"reward {name!r} is served: pass its options to its server")
        from diffusion_nft.rewards.serving.remote import RemoteReward

        return RemoteReward(name, addresses, timeout=timeout)
    cls = reward_class(name)
    if "device" in options:
        try:
            device = usable_device(options.pop("device").removeprefix(SHARED))
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from error
    if "dtype" in options:
        options["dtype"] = DTYPES[options["dtype"]]
    for key, parameter in inspect.signature(cls).parameters.items():
        if isinstance(options.get(key), str) and Path in get_args(parameter.annotation):
            options[key] = Path(expand(options[key]))
    return cls(device=device, **options)


def reward_class(name: str) -> Any:
    """Raises ValueError for an unknown name."""
    if name not in REWARDS:
        raise ValueError(f"reward {name!r} is unknown; choose from {', '.join(REWARDS)}")
    return _named(REWARDS[name])


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError unless ``options`` are keyword arguments of the class of ``name``.

    Values are those that a configuration can hold: a path or "device" (e.g. "cuda:1") is a string,
    "dtype" a key of DTYPES.
    """
    known = inspect.signature(reward_class(name)).parameters
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}; choose from {', '.join(known)}")
        annotation = known[key].annotation
        if get_origin(annotation) is Literal and value not in get_args(annotation):
            choices = ", ".join(map(str, get_args(annotation)))
            raise ValueError(f"the {key} of {name} must be one of {choices}, not {value!r}")
        if not _fits(value, annotation):
            kind = inspect.formatannotation(annotation)
            raise ValueError(f"the {key} of {name} must be of the type {kind}, not {value!r}")
        if isinstance(value, str) and Path in get_args(annotation):
            try:
                expand(value)
            except ValueError as error:
                raise ValueError(f"the {key} of {name}, {value!r}, {error}") from error
    size = options.get("batch_size", 1)
    if type(size) is not int or size < 1:
        raise ValueError(f"the batch_size of {name} must be a positive integer, not {size!r}")
    dtype, given = str(options.get("dtype", "fp32")), str(options.get("device", "cpu"))
    device = given.removeprefix(SHARED)
    if dtype not in DTYPES:
        raise ValueError(f"the dtype of {name} must be one of {', '.join(DTYPES)}, not {dtype!r}")
    try:
        index = torch.device(device).index
    except RuntimeError as error:
        raise ValueError(
            f"the device of {name} must be a device such as 'cpu' or 'cuda:1', not {given!r}"
        ) from error
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if index is not None and ranks > 1 and device == given:
        raise ValueError(
            f"the device of {name}, {given!r}, would hold the reward of each of the {ranks} "
            f"processes here: use 'cuda' for the GPU of each, or '{SHARED}{given}'"
        )


def parse_option(text: str) -> tuple[str, Any]:
    """argparse type for ``KEY=VALUE``: the value is a Python literal if it parses as one."""
    key, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return key, value


def _fits(value: Any, annotation: Any) -> bool:
    """True if ``value`` fits ``annotation``, or the annotation is not in JSON_TYPES."""
    kinds = get_args(annotation) or (annotation,)
    return not JSON_TYPES.keys() >= set(kinds) or any(
        type(value) in JSON_TYPES[kind] for kind in kinds
    )


def check_prompts(
    names: Iterable[str],
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    reward_servers: Mapping[str, Sequence[str]] | None = None,
    lines: Sequence[int] | None = None,
) -> None:
    """Raises ValueError, with line numbers, for prompts that one of the rewards cannot score.

    ``options`` and ``reward_servers``: by name, as in ``combine.build_rewards``.  ``lines``: the
    line of each prompt in its file, from 0 (default: its position in ``prompts``).  Raises
    ImportError if a package that the check needs is missing.
    """
    options, reward_servers = options or {}, reward_servers or {}
    for name in names:
        if name not in PROMPT_CHECKS:
            continue
        check = _named(PROMPT_CHECKS[name])
        own = None if reward_servers.get(name) else options.get(name, {})
        wrong: dict[int, str] = {}
        for i, (prompt, line) in enumerate(zip(prompts, metadata, strict=True)):
            try:
                check(prompt, line, own)
            except ValueError as error:
                wrong[1 + (i if lines is None else lines[i])] = str(error)
        if wrong:
            raise ValueError(f"the {name} reward cannot score {_listing(wrong)}")


def _listing(problems: Mapping[int, str]) -> str:
    """The problems of the first MAX_SHOWN lines, and the numbers of the others."""
    shown = [f"line {number}: {problem}" for number, problem in problems.items()][:MAX_SHOWN]
    if rest := [str(number) for number in problems][MAX_SHOWN:]:
        numbers = textwrap.shorten(", ".join(rest), MAX_NUMBERS, placeholder=" ...")
        shown.append(f"and {len(rest)} more: lines {numbers}")
    return "; ".join(shown)


def _named(reference: str) -> Any:
    """Imports "module:name"."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
