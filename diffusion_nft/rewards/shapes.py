"""The built-in world's reward: does the image show what its caption asks for?"""

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
    """Raises ValueError, quoting it, if ``metadata`` cannot be judged."""
    del prompt, options
    check_metadata(metadata, objects=CLASSES, colors=tuple(COLORS))


class ShapesReward:
    """The verifier's graded score in [0, 1]; components ``strict`` and ``stricter`` are 0 or 1.

    ``strict`` asks for every term of the caption under the standard rule; ``stricter`` asks the
    same under a rule that no reward ever sees, so that gaming the first shows.  ``rule``: what the
    score is graded by; ``"lenient"`` takes blobs for shapes and overlooks what is drawn beyond the
    caption, to study how a policy games a reward.
    """

    def __init__(self, device: torch.device, *, rule: Literal["standard", "lenient"] = "standard"):
        del device  # the verifier is numpy's
        self.rule = rule

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        """Scores ``[B]`` of ``images: [B, 3, 48, 48]`` in [0, 1] against their captions.

        Raises ValueError for images of another size.
        """
        del prompts
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
