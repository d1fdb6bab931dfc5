"""The embedded world's reward: does the picture show what its caption asks for?"""

import torch
from torch import Tensor

from diffusion_nft.rewards import RewardOutput
from diffusion_nft.shapes.verifier import verify


class ShapesReward:
    """The verifier's graded score in [0, 1]; components ``strict`` and ``stricter`` are 0 or 1.

    ``strict`` asks for every term of the caption under the rule that the score uses; ``stricter``
    asks the same under a rule that no reward ever sees, so that gaming the first shows.
    """

    def __init__(self, device: torch.device):
        del device  # the verifier is numpy's

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        """Scores ``[B]`` of ``images: [B, 3, 48, 48]`` in [0, 1] against their captions."""
        del prompts
        images = images.cpu()
        graded, strict = verify(images, metadata, "standard")
        _, stricter = verify(images, metadata, "stricter")
        return RewardOutput(graded, {"strict": strict.double(), "stricter": stricter.double()})
