"""The verifier: hand-computed verdicts, and its error rates on drawings and their distortions."""

import dataclasses
import time

import numpy as np
import pytest
import torch

from diffusion_nft.shapes.captions import captions, metadata_lines, sample_scene
from diffusion_nft.shapes.model import load_shapes_pipeline
from diffusion_nft.shapes.scene import BACKGROUND, COLORS, Object, Scene, render, render_batch
from diffusion_nft.shapes.verifier import RULES, Detection, detect, judge, verify

METADATA = metadata_lines("test")


@pytest.fixture(scope="module")
def drawings() -> torch.Tensor:
    rng = np.random.default_rng(11)
    return torch.from_numpy(render_batch([sample_scene(line, rng) for line in METADATA]))


@pytest.fixture(scope="module")
def reconstructions(drawings) -> torch.Tensor:
    vae = load_shapes_pipeline().vae
    with torch.no_grad():
        latents = vae.encode(2 * drawings[::4] - 1).latent_dist.mean
        return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def drawing(*objects: Object) -> torch.Tensor:
    return torch.from_numpy(render(Scene(objects)))[None]


def clear(name: str, color: str, x: float, y: float) -> Detection:
    return Detection(name, color, (x, y), area=130.0, fit=0.98, color_error=0.05)


@pytest.mark.parametrize("rule", RULES)
def test_drawings_pass(drawings, rule):
    graded, strict = verify(drawings, METADATA, rule)
    assert graded.dtype == torch.float32 and strict.dtype == torch.bool
    assert strict.float().mean() >= 0.99
    assert graded[strict].eq(1).all()


@pytest.mark.parametrize("rule", ["standard", "stricter"])
def test_images_of_other_captions_fail(drawings, rule):
    shuffled = np.random.default_rng(0).permutation(len(METADATA))
    _, strict = verify(drawings, [METADATA[index] for index in shuffled], rule)
    assert strict.float().mean() <= 0.10


@pytest.mark.parametrize("rule", RULES)
def test_reconstructions_pass(reconstructions, rule):
    assert verify(reconstructions, METADATA[::4], rule)[1].float().mean() >= 0.98


def test_detections_are_the_objects():
    objects = (
        Object("circle", "red", 0, 6.5, 0.4, -0.3),
        Object("square", "blue", 4),
        Object("triangle", "black", 8),
    )
    (found,) = detect(drawing(*objects))
    assert [(item.name, item.color) for item in found] == [(x.name, x.color) for x in objects]
    for item, drawn in zip(found, objects, strict=True):
        assert item.center == pytest.approx(drawn.center, abs=0.5)
        assert item.fit > 0.96


def test_an_empty_image_has_no_objects():
    blank = torch.empty(1, 3, 48, 48)
    blank[:] = torch.tensor(BACKGROUND).reshape(3, 1, 1)
    assert detect(blank) == [[]]
    graded, strict = verify(blank, [captions("test", "colors")[0]])
    assert graded.item() == 0 and not strict.item()


def distorted(kind: str) -> torch.Tensor:
    """A red circle on the middle cell, spoilt."""
    image = drawing(Object("circle", "red", 4))
    y, x = torch.meshgrid(torch.arange(48) - 23.5, torch.arange(48) - 23.5, indexing="ij")
    red = torch.tensor(COLORS["red"]).reshape(3, 1, 1)
    background = torch.tensor(BACKGROUND).reshape(3, 1, 1)
    if kind == "soft blob":
        alpha = torch.exp(-(x**2 + y**2) / (2 * 4.5**2))
        return (background + alpha * (red - background))[None]
    if kind == "ellipse":
        alpha = (0.5 - (torch.sqrt((x / 1.35) ** 2 + (y * 1.35) ** 2) - 6.0)).clamp(0, 1)
        return (background + alpha * (red - background))[None]
    if kind == "half circle":
        image[:, :, :, 24:] = background
    elif kind == "two colors":
        inside = (image[0] - background).norm(dim=0) > 0.5
        image[0, :, inside & (x > 0)] = torch.tensor(COLORS["blue"])[:, None]
    elif kind == "second blob":
        image[:, :, 2:9, 2:7] = red
    elif kind == "speck":
        image[:, :, 2:5, 2:5] = red
    else:
        assert kind == "none"
    return image


@pytest.mark.parametrize(
    ("kind", "standard", "stricter"),
    [
        ("none", True, True),
        ("soft blob", False, False),
        ("ellipse", False, False),
        ("half circle", False, False),
        ("two colors", False, False),
        ("second blob", False, False),
        ("speck", True, False),
    ],
)
def test_distortions(kind, standard, stricter):
    caption = {"include": [{"class": "circle", "count": 1, "color": "red"}]}
    image = distorted(kind)
    assert verify(image, [caption], "standard")[1].item() is standard
    assert verify(image, [caption], "stricter")[1].item() is stricter


COUNTING = {
    "include": [{"class": "circle", "count": 3}],
    "exclude": [{"class": "circle", "count": 4}],
}
POSITION = {
    "include": [
        {"class": "square", "count": 1},
        {"class": "circle", "count": 1, "position": ["left of", 0]},
    ]
}
COLOR_ATTR = {
    "include": [
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "square", "count": 1, "color": "blue"},
    ]
}


@pytest.mark.parametrize(
    ("caption", "found", "graded"),
    [
        # Terms in the order: total, then for each clause count, colour, position.
        (COUNTING, [("circle", "red")] * 3, (1 + 1) / 2),
        (COUNTING, [("circle", "red")] * 2, (2 / 3 + 2 / 3) / 2),
        (COUNTING, [("circle", "red")] * 4, (2 / 3 + 2 / 3) / 2),
        (COUNTING, [("circle", "red")] * 3 + [("square", "red")], (2 / 3 + 1) / 2),
        (POSITION, [("circle", "red"), ("square", "red")], (1 + 1 + 1 + 1) / 4),
        (POSITION, [("square", "red"), ("circle", "red")], (1 + 1 + 1 + 0) / 4),
        (POSITION, [("circle", "red")], (1 / 2 + 0 + 1 + 0) / 4),
        (COLOR_ATTR, [("circle", "red"), ("square", "blue")], (1 + 1 + 1 + 1 + 1) / 5),
        (COLOR_ATTR, [("circle", "blue"), ("square", "red")], (1 + 1 + 0 + 1 + 0) / 5),
        (COLOR_ATTR, [("circle", "red"), ("circle", "red")], (1 + 0 + 0 + 0 + 0) / 5),
        (COLOR_ATTR, [], 0),
    ],
)
def test_graded_score(caption, found, graded):
    """Objects stand in a row, from left to right."""
    detections = [clear(*item, x=8 + 16 * column, y=8) for column, item in enumerate(found)]
    score, strict = judge(detections, caption, RULES["standard"])
    assert score == pytest.approx(graded)
    assert strict == (graded == 1)


def test_an_unclear_object_counts_only_as_a_surplus():
    unclear = dataclasses.replace(clear("circle", "red", 40, 8), fit=0.5)
    detections = [clear("circle", "red", 8, 8), unclear]
    caption = {"include": [{"class": "circle", "count": 1}]}
    assert judge(detections, caption, RULES["standard"]) == ((0 + 1) / 2, False)


def test_an_unknown_rule_is_refused(drawings):
    with pytest.raises(ValueError, match="loose"):
        verify(drawings[:1], METADATA[:1], "loose")


def test_two_hundred_images_take_a_fraction_of_a_second(drawings):
    verify(drawings[:200], METADATA[:200])
    start = time.process_time()
    verify(drawings[:200], METADATA[:200])
    assert time.process_time() - start < 0.5
