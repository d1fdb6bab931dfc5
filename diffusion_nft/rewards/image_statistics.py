"""Brightness, saturation and edges of images: a held-out reward to detect reward hacking."""

import torch
from torch import Tensor

from diffusion_nft.rewards import RewardOutput


class ImageStatistics:
    """Brightness: the mean of all values.

    Components: ``saturation``, the mean over pixels of HSV's (max - min) / max of the channels; and
    ``edges``, the mean absolute difference of horizontal and vertical neighbours.  All in [0, 1].
    """

    def __init__(self, device: torch.device):
        pass

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        images = images.to(torch.float32)
        high, low = images.amax(dim=1), images.amin(dim=1)
        saturation = torch.where(high > 0, (high - low) / high.clamp(min=1e-6), 0.0)
        edges = [images.diff(dim=dim).abs().mean(dim=(1, 2, 3)) for dim in (2, 3)]
        return RewardOutput(
            images.mean(dim=(1, 2, 3)),
            {"saturation": saturation.mean(dim=(1, 2)), "edges": (edges[0] + edges[1]) / 2},
        )
