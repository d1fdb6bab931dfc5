"""Drawing, against closed forms."""

import math

import numpy as np
import pytest

from diffusion_nft.shapes.scene import (
    BACKGROUND,
    CELL_SIZE,
    CLASSES,
    COLORS,
    MAX_JITTER,
    NUM_CELLS,
    RADIUS_RANGE,
    Object,
    Scene,
    coverage,
    random_scene,
    render,
    render_batch,
)

PIXELS = np.arange(CELL_SIZE) + 0.5 - CELL_SIZE / 2


@pytest.mark.parametrize("radius", RADIUS_RANGE)
@pytest.mark.parametrize(
    ("name", "area_of_unit_radius"),
    [("circle", math.pi), ("square", 4 * 0.92**2), ("triangle", 0.75 * math.sqrt(3) * 1.14**2)],
)
def test_area(name, area_of_unit_radius, radius):
    area = coverage(name, PIXELS[None] - 0.3, PIXELS[:, None] + 0.2, radius).sum()
    assert area == pytest.approx(area_of_unit_radius * radius**2, rel=0.015)


def test_triangle_points_up():
    mask = coverage("triangle", PIXELS[None], PIXELS[:, None], 7.0)
    rows = mask.sum(axis=1)
    assert rows[4] < rows[8] < rows[12]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("jitter", [-MAX_JITTER, MAX_JITTER])
def test_an_object_stays_in_its_cell(name, jitter):
    image = render(Scene((Object(name, "red", 4, RADIUS_RANGE[1], jitter, jitter),)))
    image[:, CELL_SIZE : 2 * CELL_SIZE, CELL_SIZE : 2 * CELL_SIZE] = np.reshape(
        BACKGROUND, (3, 1, 1)
    )
    assert np.allclose(image, np.reshape(BACKGROUND, (3, 1, 1)))


def test_color_and_place():
    image = render(Scene((Object("circle", "blue", 5),)))
    assert image.dtype == np.float32 and image.shape == (3, 48, 48)
    assert image[:, 24, 40] == pytest.approx(COLORS["blue"])
    assert image[:, 8, 8] == pytest.approx(BACKGROUND)


def test_random_scenes_are_reproducible_and_cover_everything():
    scenes = [random_scene(np.random.default_rng(seed)) for seed in range(300)]
    assert scenes[7] == random_scene(np.random.default_rng(7))
    objects = [item for scene in scenes for item in scene.objects]
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}
    assert all(len({item.cell for item in scene.objects}) == len(scene.objects) for scene in scenes)
    assert {item.name for item in objects} == set(CLASSES)
    assert {item.color for item in objects} == set(COLORS)
    assert {item.cell for item in objects} == set(range(NUM_CELLS))
    images = render_batch(scenes)
    assert images.min() >= 0 and images.max() <= 1


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="hexagon"):
        coverage("hexagon", PIXELS, PIXELS, 6.0)
