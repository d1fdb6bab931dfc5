"""The embedded world's reward on pictures drawn by hand."""

import torch

from diffusion_nft.data import load_prompts
from diffusion_nft.rewards.shapes import ShapesReward


def test_blank_pictures_fail_and_components_are_verdicts():
    prompts = load_prompts("shapes", "test")[:6]
    reward = ShapesReward(torch.device("cpu"))
    images = torch.ones(6, 3, 48, 48)
    output = reward(images, [p.text for p in prompts], [p.metadata for p in prompts])
    assert output.scores.shape == (6,)
    assert bool(((output.scores >= 0) & (output.scores < 1)).all())
    assert output.components.keys() == {"strict", "stricter"}
    assert not any(value.any() for value in output.components.values())


def test_the_stricter_rule_passes_nothing_that_the_strict_one_fails(shapes_model):
    prompts = load_prompts("shapes", "test")[:8]
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(8, *shapes_model.latent_shape, generator=g)
    images = shapes_model.decode(latents)
    output = ShapesReward(torch.device("cpu"))(
        images, [p.text for p in prompts], [p.metadata for p in prompts]
    )
    strict, stricter = output.components["strict"], output.components["stricter"]
    assert bool((stricter <= strict).all())
    assert bool(((strict == 0) | (output.scores > 0.999)).all())
