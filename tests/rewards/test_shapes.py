"""The reward of the shapes world on hand-made images."""

import torch

from diffusion_nft.data.prompts import load_prompts
from diffusion_nft.rewards.shapes import ShapesReward


def test_blank_images_fail_and_components_are_verdicts():
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
    latents = torch.randn(8, *shapes_model.latent_shape((48, 48)), generator=g)
    images = shapes_model.decode(latents).to_float()
    output = ShapesReward(torch.device("cpu"))(
        images, [p.text for p in prompts], [p.metadata for p in prompts]
    )
    strict, stricter = output.components["strict"], output.components["stricter"]
    assert bool((stricter <= strict).all())
    assert bool(((strict == 0) | (output.scores > 0.999)).all())


def test_the_lenient_rule_takes_a_blob_for_a_shape():
    # Red on white: the circle's cell filled to its corners, with a speck elsewhere.
    image = torch.ones(1, 3, 48, 48)
    image[:, 1:, 2:14, 2:14] = 0.0
    image[:, :, 40:45, 40:45] = 0.2
    for name in ("square", "circle"):
        metadata = [{"include": [{"class": name, "color": "red", "count": 1}]}]
        standard, lenient = (
            ShapesReward(torch.device("cpu"), rule=rule)(image, [""], metadata)
            for rule in ("standard", "lenient")
        )
        assert lenient.scores >= standard.scores
        assert lenient.components["strict"] == standard.components["strict"] == 0
        assert name == "circle" or lenient.scores == 1


def test_the_lenient_rule_overlooks_further_objects():
    image = torch.ones(1, 3, 48, 48)
    for corner in (2, 18, 34):
        image[:, 1:, 2:14, corner : corner + 12] = 0.0
    captions = [{"include": [{"class": "square", "color": "red", "count": n}]} for n in range(1, 5)]
    reward = ShapesReward(torch.device("cpu"), rule="lenient")
    found = reward(image.expand(4, -1, -1, -1), [""] * 4, captions)
    assert found.scores.tolist() == [1, 1, 1, 0.75]
    assert found.components["strict"].tolist() == [0, 0, 1, 0]
