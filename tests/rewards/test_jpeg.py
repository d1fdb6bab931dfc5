"""The JPEG rewards against Pillow itself."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_nft.rewards.jpeg import JpegCompressibility, JpegIncompressibility


def test_scores_are_the_kilobytes_that_pillow_writes():
    g = np.random.default_rng(0)
    pixels = [g.integers(0, 256, (40, 56, 3)), np.full((40, 56, 3), 128)]
    images = torch.stack(
        [torch.from_numpy(p.astype(np.float32) / 255).permute(2, 0, 1) for p in pixels]
    )
    sizes = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image.astype(np.uint8)).save(buffer, format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    assert sizes[0] > 2 * sizes[1]
    args = (images, ["", ""], [{}, {}])
    smaller = JpegCompressibility(torch.device("cpu"))(*args).scores
    larger = JpegIncompressibility(torch.device("cpu"))(*args).scores
    assert smaller.tolist() == pytest.approx([-size / 500 for size in sizes])
    assert larger.tolist() == pytest.approx([size / 500 for size in sizes])
