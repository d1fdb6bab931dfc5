"""Rewards: the registry, what a reward is, and what it returns.

A reward is a callable class built once per process::

    class MyReward:
        def __init__(self, device: torch.device): ...
        def __call__(self, images, prompts, metadata) -> RewardOutput: ...

``images: float [B, 3, H, W] in [0, 1]`` on any device, ``prompts: list[str]``, ``metadata:
list[dict]`` (the lines of the data set).  Add one line to REWARDS to register it.  A reward that
cannot score raises; it never returns a silent zero.
"""

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

# name -> "module:Class"; a module is imported only when its reward is built.
REWARDS: dict[str, str] = {
    "geneval": "diffusion_nft.rewards.geneval:GenEvalReward",
    "ocr": "diffusion_nft.rewards.ocr:OcrReward",
    "pickscore": "diffusion_nft.rewards.pickscore:PickScoreReward",
    "clipscore": "diffusion_nft.rewards.clipscore:ClipScoreReward",
    "hpsv2": "diffusion_nft.rewards.hpsv2:HPSv2Reward",
    "aesthetic": "diffusion_nft.rewards.aesthetic:AestheticReward",
    "shapes": "diffusion_nft.rewards.shapes:ShapesReward",
    "jpeg_compressibility": "diffusion_nft.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "diffusion_nft.rewards.jpeg:JpegIncompressibility",
}

# Rewards that cannot score every prompt -> "module:function", which raises ValueError on a list
# that holds one they cannot.
PROMPT_CHECKS: dict[str, str] = {
    "ocr": "diffusion_nft.rewards.ocr:check_prompts",
}


@dataclass(frozen=True)
class RewardOutput:
    """``scores: [B]`` (higher is better) and named ``components: [B]`` for the logs.

    NaN in a component means "does not apply to this sample" and is left out of its mean.  A score
    is always finite.
    """

    scores: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)


class Reward(Protocol):
    """Anything that scores a batch of pictures."""

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        """Scores of ``images: [B, 3, H, W]`` in [0, 1]."""
        ...


def build_reward(name: str, device: torch.device) -> Reward:
    """The reward ``name``, ready to score.  Raises ValueError for an unknown name.

    A missing package or weight file is the reward's own ImportError or FileNotFoundError.
    """
    if name not in REWARDS:
        raise ValueError(f"reward {name!r} is unknown; choose from {', '.join(REWARDS)}")
    return _named(REWARDS[name])(device=device)


def check_prompts(names: Iterable[str], prompts: Sequence[str]) -> None:
    """Raises ValueError if one of the rewards ``names`` cannot score every one of ``prompts``."""
    for name in names:
        if name in PROMPT_CHECKS:
            _named(PROMPT_CHECKS[name])(prompts)


def _named(reference: str) -> Any:
    """The object behind "module:name"."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)
