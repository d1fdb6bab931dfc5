"""Reward of the built-in shapes world: does the image match its caption?"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_nft.rewards import RewardOutput
from diffusion_nft.rewards.geneval.vocabulary import check_metadata
from diffusion_nft.shapes.scene import CLASSES, COLORS
from diffusion_nft.shapes.verifier import detect, verdicts

SIDE = 48


def check_prompt(
    prompt: str, metadata: Mapping[str, Any], options: Mapping[str, Any] | None
) -> None:
    """Raises ValueError for metadata that cannot be scored."""
    check_metadata(metadata, objects=CLASSES, colors=tuple(COLORS))


class ShapesReward:
    """The verifier's graded score in [0, 1].

    Components, 0 or 1: ``strict``, every term of the caption is met under the standard rule;
    ``stricter``, the same under a rule that is never trained on, which reveals reward hacking.
    ``rule``: the rule of the score; ``"lenient"`` accepts blobs as shapes and ignores additional
    objects, to study reward hacking.
    """

    def __init__(self, device: torch.device, *, rule: Literal["standard", "lenient"] = "standard"):
        self.rule = rule

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        if images.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(
                f"the shapes reward needs images [B, 3, {SIDE}, {SIDE}], not {list(images.shape)}"
            )
        found = detect(images.cpu())
        graded, strict = verdicts(found, metadata, "standard")
        if self.rule != "standard":
            graded, _ = verdicts(found, metadata, self.rule)
        _, stricter = verdicts(found, metadata, "stricter")
        return RewardOutput(graded, {"strict": strict.double(), "stricter": stricter.double()})
