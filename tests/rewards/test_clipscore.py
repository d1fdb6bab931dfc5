import pytest
import torch
from rewards.conftest import CPU, OPENAI_MEAN, OPENAI_STD, PROMPTS, smooth_images
from torch import Tensor

from diffusion_nft.rewards.clipscore import ClipScoreReward


@pytest.fixture(scope="module")
def reward(tiny_clip):
    return ClipScoreReward(device=CPU, model=tiny_clip)


def published_pixels(images: Tensor) -> Tensor:
    """torch's own antialiased bilinear resize of the short side to 224, the middle, normalised."""
    height, width = images.shape[2:]
    short = min(height, width)
    size = (int(224 * height / short), int(224 * width / short))
    images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    top, left = (round((side - 224) / 2) for side in size)
    images = images[:, :, top : top + 224, left : left + 224]
    mean, std = (torch.tensor(v).float().reshape(1, 3, 1, 1) for v in (OPENAI_MEAN, OPENAI_STD))
    return (images - mean) / std


@pytest.mark.parametrize("size", [(512, 512), (240, 360), (303, 200)])
def test_the_score_is_the_diagonal_of_transformers_logits_over_100(reward, reference_logits, size):
    images = smooth_images(4, *size)
    expected = reference_logits(PROMPTS, published_pixels(images)).diagonal() / 100

    scores = reward(images, PROMPTS, [{}] * 4).scores

    assert expected.std() > 0.003
    assert torch.allclose(scores, expected, atol=1e-6)


def test_images_are_not_rounded_to_8_bits(reward):
    images = (smooth_images(1, 224, 224) * 254).round() / 255
    moved = images + 0.4 / 255
    assert torch.equal((images * 255).round(), (moved * 255).round())
    scores = [reward(x, PROMPTS[:1], [{}]).scores for x in (images, moved)]
    assert not torch.equal(*scores)
