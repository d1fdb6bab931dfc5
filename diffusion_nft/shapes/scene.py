"""Scenes: one to four coloured shapes on the cells of a 3x3 grid, drawn on a plain background.

The coverage of a pixel by a shape is computed from the signed distance of its centre to the
outline, for antialiased edges without supersampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 48
GRID_SIZE = 3
CELL_SIZE = IMAGE_SIZE // GRID_SIZE
NUM_CELLS = GRID_SIZE**2
MAX_OBJECTS = 4

CLASSES = ("circle", "square", "triangle")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12),
    "yellow": (0.95, 0.80, 0.10),
    "green": (0.13, 0.65, 0.20),
    "blue": (0.12, 0.28, 0.88),
    "purple": (0.60, 0.15, 0.72),
    "black": (0.08, 0.08, 0.08),
}
BACKGROUND = (0.95, 0.95, 0.95)

# In pixels. Shapes stay inside their cells: 7.0 + 0.5 < 8.
RADIUS_RANGE = (6.2, 7.0)
MAX_JITTER = 0.5


@dataclass(frozen=True)
class Object:
    """One shape. `cell` is row-major in [0, 9); `dx`, `dy` and `radius` are in pixels."""

    name: str
    color: str
    cell: int
    radius: float = 6.6
    dx: float = 0.0
    dy: float = 0.0

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) in pixels, from the top left corner of the image."""
        row, column = divmod(self.cell, GRID_SIZE)
        return (column + 0.5) * CELL_SIZE + self.dx, (row + 0.5) * CELL_SIZE + self.dy


@dataclass(frozen=True)
class Scene:
    """Objects on distinct cells."""

    objects: tuple[Object, ...]


def coverage(name: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
    """The share of each pixel covered by a shape.

    name: one of CLASSES; x, y: offsets of the pixel centres from the shape's centre, in pixels
    (y points down). Returns an array in [0, 1] of the broadcast shape.
    """
    if name == "circle":
        distance = np.sqrt(x**2 + y**2) - radius
    elif name == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.92 * radius
    elif name == "triangle":
        # Equilateral, pointing up, with circumradius R; its bounding box is centred.
        circumradius = 1.14 * radius
        y = y - 0.25 * circumradius
        side = np.sqrt(0.75) * np.abs(x) - 0.5 * y
        distance = np.maximum(y, side) - 0.5 * circumradius
    else:
        raise ValueError(f"shape {name!r} is unknown; choose from {CLASSES}")
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene) -> np.ndarray:
    """Draws a scene: float32 [3, 48, 48] in [0, 1]."""
    pixel_centers = np.arange(IMAGE_SIZE) + 0.5
    image = np.empty((3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32)
    image[:] = np.reshape(BACKGROUND, (3, 1, 1))
    for item in scene.objects:
        center_x, center_y = item.center
        alpha = coverage(
            item.name,
            pixel_centers[None] - center_x,
            pixel_centers[:, None] - center_y,
            item.radius,
        )
        color = np.reshape(COLORS[item.color], (3, 1, 1))
        image += alpha * (color - image)
    return image


def render_batch(scenes: Sequence[Scene]) -> np.ndarray:
    """Draws scenes: float32 [B, 3, 48, 48] in [0, 1]."""
    return np.stack([render(scene) for scene in scenes])


def place(name: str, color: str, cell: int, rng: np.random.Generator) -> Object:
    """An object on `cell` with random size and offset."""
    radius = float(rng.uniform(*RADIUS_RANGE))
    dx, dy = (float(value) for value in rng.uniform(-MAX_JITTER, MAX_JITTER, size=2))
    return Object(name, color, int(cell), radius, dx, dy)


def random_scene(rng: np.random.Generator, max_objects: int = MAX_OBJECTS) -> Scene:
    """One to `max_objects` objects, every attribute uniformly random."""
    count = int(rng.integers(1, max_objects + 1))
    cells = rng.choice(NUM_CELLS, size=count, replace=False)
    names = rng.choice(CLASSES, size=count)
    colors = rng.choice(list(COLORS), size=count)
    return Scene(
        tuple(
            place(str(name), str(color), cell, rng)
            for name, color, cell in zip(names, colors, cells, strict=True)
        )
    )
