"""Rewards from the size of a JPEG: without a model, useful for testing a pipeline."""

import io

import torch
from torch import Tensor

from diffusion_nft.images import to_pil
from diffusion_nft.rewards import RewardOutput

JPEG_QUALITY = 95
KILOBYTES_PER_POINT = 500.0


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size ``[B]`` in kB (1000 bytes) of ``images: [B, 3, H, W]`` in [0, 1] at quality 95."""
    sizes = []
    for image in to_pil(images):
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes, dtype=torch.float64)


class JpegCompressibility:
    """-kB / 500: rewards images that compress well (DDPO, arXiv 2305.13301)."""

    sign = -1.0

    def __init__(self, device: torch.device):
        pass

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        return RewardOutput(scores=self.sign * jpeg_kilobytes(images) / KILOBYTES_PER_POINT)


class JpegIncompressibility(JpegCompressibility):
    """+kB / 500: rewards detail and noise."""

    sign = 1.0
