"""Rewards: the registry, what a reward is, and what it returns.

A reward is a callable class built once per process::

    class MyReward:
        def __init__(self, device: torch.device, *, batch_size: int = 16): ...
        def __call__(self, images, prompts, metadata) -> RewardOutput: ...

``images: float [B, 3, H, W] in [0, 1]`` on any device, ``prompts: list[str]``, ``metadata:
list[dict]`` (the lines of the data set).  Add one line to REWARDS to register it.  A reward that
cannot score raises, or returns NaN for the images that it cannot score; never a silent zero.

A reward whose packages cannot live beside those of training runs behind ``server.py``, in an
environment with no more than numpy, pillow, torch, fastapi (with pydantic) and uvicorn: this
package and the modules of REWARDS import nothing else of weight before their reward is built.
"""

import argparse
import ast
import importlib
import inspect
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

# The reward whose score and components ``monitor.image_statistics`` watches.
IMAGE_STATISTICS = "image_statistics"
# Rewards that cannot score every prompt -> "module:function" of a text, its metadata and the
# reward's options (None: it is served, and its server has them), which raises ValueError for one
# that it cannot score.
PROMPT_CHECKS: dict[str, str] = {
    "geneval": "diffusion_nft.rewards.geneval.vocabulary:check_prompt",
    "ocr": "diffusion_nft.rewards.ocr:check_prompt",
    "shapes": "diffusion_nft.rewards.shapes:check_prompt",
}


@dataclass(frozen=True)
class RewardOutput:
    """``scores: [B]`` and named ``components: [B]``, which are logged; higher is better for both.

    NaN in a component means "does not apply to this sample" and is left out of its mean.  A score
    of NaN means that this image could not be scored; ``reasons`` says why, by row.
    """

    scores: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)


class Reward(Protocol):
    """Anything that scores a batch of images."""

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        """Scores of ``images: [B, 3, H, W]`` in [0, 1]."""
        ...


# How the options of a configuration write a torch dtype.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What a configuration writes for an argument that is annotated so.
JSON_TYPES: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str,),
    Path: (str,),
    NoneType: (NoneType,),
}

# Lines of a prompt set that an error shows, and characters of the numbers of further ones.
MAX_SHOWN, MAX_NUMBERS = 3, 800
# Seconds that a served reward may take for one request, waiting for its turn included.
REWARD_SERVER_TIMEOUT = 300.0


def build_reward(
    name: str,
    device: torch.device,
    options: Mapping[str, Any] | None = None,
    addresses: Sequence[str] = (),
    *,
    timeout: float = REWARD_SERVER_TIMEOUT,
) -> Reward:
    """The reward ``name``, ready to score: in this process, or at the server ``addresses``.

    ``options``: keyword arguments of its class as plain values (``check_options``); a served reward
    takes none, its server has them.  ``timeout``: seconds a request of a served one.  Raises
    ValueError for an unknown name or option, or a device that is not there; a missing package,
    weight file or server is the reward's own ImportError or OSError.
    """
    options = dict(options or {})
    check_options(name, options)
    if addresses:
        if options:
            raise ValueError(f"reward {name!r} is served: its options belong to its server")
        from diffusion_nft.rewards.serving.remote import RemoteReward

        return RemoteReward(name, addresses, timeout=timeout)
    cls = reward_class(name)
    if "device" in options:
        try:
            device = usable_device(options.pop("device"))
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from error
    if "dtype" in options:
        options["dtype"] = DTYPES[options["dtype"]]
    for key, parameter in inspect.signature(cls).parameters.items():
        if isinstance(options.get(key), str) and Path in get_args(parameter.annotation):
            options[key] = Path(expand(options[key]))
    return cls(device=device, **options)


def reward_class(name: str) -> Any:
    """The class of the reward ``name``; ValueError if there is none."""
    if name not in REWARDS:
        raise ValueError(f"reward {name!r} is unknown; choose from {', '.join(REWARDS)}")
    return _named(REWARDS[name])


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError unless the reward ``name`` takes ``options``.

    They are the keyword arguments of its class, as values that a configuration can hold: "device"
    is text such as "cuda:1", "dtype" one of DTYPES, a path is text.
    """
    known = inspect.signature(reward_class(name)).parameters
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{name} has no option {key!r}; choose from {', '.join(known)}")
        if not _fits(value, known[key].annotation):
            kind = inspect.formatannotation(known[key].annotation)
            raise ValueError(f"the {key} of {name} must be of the type {kind}, not {value!r}")
        if isinstance(value, str) and Path in get_args(known[key].annotation):
            try:
                expand(value)
            except ValueError as error:
                raise ValueError(f"the {key} of {name}, {value!r}, {error}") from error
    size = options.get("batch_size", 1)
    if type(size) is not int or size < 1:
        raise ValueError(f"the batch_size of {name} must be a whole number from 1, not {size!r}")
    if str(options.get("dtype", "fp32")) not in DTYPES:
        raise ValueError(f"the dtype of {name} must be one of {', '.join(DTYPES)}")
    try:
        torch.device(str(options.get("device", "cpu")))
    except RuntimeError as error:
        raise ValueError(f"the device of {name} must be such as 'cpu' or 'cuda:1'") from error


def parse_option(text: str) -> tuple[str, Any]:
    """argparse's type of ``KEY=VALUE``: the value is a Python literal, or else text."""
    key, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return key, value


def _fits(value: Any, annotation: Any) -> bool:
    """True if ``value`` can be an argument of this type, or the type is not in JSON_TYPES."""
    kinds = get_args(annotation) or (annotation,)
    if get_origin(annotation) is Literal:
        return value in kinds
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
    """Raises ValueError if one of the rewards ``names`` cannot score every one of ``prompts``, with
    the line numbers of those that it cannot.

    ``options`` and ``reward_servers``: by name, as of ``combine.build_rewards``.  ``lines``: where
    each prompt stands in its file, from 0 (None: as here).  Raises ImportError if a package that a
    reward needs for this is missing.
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
    """The problems of the first lines, by line number, and the numbers of the others."""
    shown = [f"line {number}: {problem}" for number, problem in problems.items()][:MAX_SHOWN]
    if rest := [str(number) for number in problems][MAX_SHOWN:]:
        numbers = textwrap.shorten(", ".join(rest), MAX_NUMBERS, placeholder=" ...")
        shown.append(f"and {len(rest)} more: lines {numbers}")
    return "; ".join(shown)


def _named(reference: str) -> Any:
    """The object behind "module:name"."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
