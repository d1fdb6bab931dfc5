"""What images look like, apart from what they show: to hold out, and watch for reward hacking."""

import torch
from torch import Tensor

from diffusion_nft.rewards import RewardOutput


class ImageStatistics:
    """The score is the brightness, the mean of all values.

    Components: ``saturation``, the mean over pixels of HSV's (max - min) / max of the channels; and
    ``edges``, the mean absolute difference of neighbouring pixels, across and down.  All in [0, 1].
    """

    def __init__(self, device: torch.device):
        del device  # wherever the images are

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        """Scores ``[B]`` for ``images: [B, 3, H, W] in [0, 1]``."""
        del prompts, metadata
        images = images.to(torch.float32)
        high, low = images.amax(dim=1), images.amin(dim=1)
        saturation = torch.where(high > 0, (high - low) / high.clamp(min=1e-6), 0.0)
        edges = [images.diff(dim=dim).abs().mean(dim=(1, 2, 3)) for dim in (2, 3)]
        return RewardOutput(
            images.mean(dim=(1, 2, 3)),
            {"saturation": saturation.mean(dim=(1, 2)), "edges": (edges[0] + edges[1]) / 2},
        )
