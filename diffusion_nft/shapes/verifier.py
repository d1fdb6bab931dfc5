"""A fast, deterministic verifier of images against their captions.

Every cell of the grid that is not empty is compared with templates (shape, size, offset) by the
Tanimoto coefficient a.t / (|a|^2 + |t|^2 - a.t) of the cell's coverage a and a template t, which is
1 only if they are equal, and with the palette. An object without a close match counts in the total
number of objects, but fits no clause of a caption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from diffusion_nft.shapes.captions import relation_holds
from diffusion_nft.shapes.scene import (
    BACKGROUND,
    CELL_SIZE,
    CLASSES,
    COLORS,
    GRID_SIZE,
    NUM_CELLS,
    coverage,
)

TEMPLATE_RADII = np.linspace(6.0, 7.2, 5)
TEMPLATE_OFFSETS = np.linspace(-1.0, 1.0, 5)

# A pixel is background below the first colour distance, covered above the second.
FOREGROUND_DISTANCES = (0.15, 0.50)


@dataclass(frozen=True)
class Thresholds:
    """Requirements on detections and counts.

    min_fit: Tanimoto coefficient with the best template, in [0, 1];
    max_color_error: root mean square distance (RGB in [0, 1]) of the inside to the palette colour;
    min_area: minimal foreground in a cell, in pixels;
    at_least: surplus objects do not count against an image.
    """

    min_fit: float
    max_color_error: float
    min_area: float
    at_least: bool = False


# "stricter" is for evaluation only; "lenient" is easily exploited.
RULES = {
    "lenient": Thresholds(min_fit=0.60, max_color_error=0.45, min_area=40.0, at_least=True),
    "standard": Thresholds(min_fit=0.88, max_color_error=0.25, min_area=16.0),
    "stricter": Thresholds(min_fit=0.93, max_color_error=0.14, min_area=5.0),
}


@dataclass(frozen=True)
class Detection:
    """The object in a cell of the grid. `center` is (x, y) in pixels, `area` in pixels."""

    name: str
    color: str
    center: tuple[float, float]
    area: float
    fit: float
    color_error: float

    def is_clear(self, rule: Thresholds) -> bool:
        return self.fit >= rule.min_fit and self.color_error <= rule.max_color_error


@cache
def _templates() -> tuple[torch.Tensor, list[tuple[str, float, float]]]:
    """Coverage [T, 256] of every template, and its class and offset from the cell's centre."""
    pixels = np.arange(CELL_SIZE) + 0.5 - CELL_SIZE / 2
    masks, labels = [], []
    for name in CLASSES:
        for radius in TEMPLATE_RADII:
            for dx in TEMPLATE_OFFSETS:
                for dy in TEMPLATE_OFFSETS:
                    masks.append(coverage(name, pixels[None] - dx, pixels[:, None] - dy, radius))
                    labels.append((name, float(dx), float(dy)))
    return torch.from_numpy(np.stack(masks)).float().flatten(1), labels


def detect(images: torch.Tensor) -> list[list[Detection]]:
    """Detections in images: float [B, 3, 48, 48] in [0, 1]; one per cell that is not empty."""
    images = torch.as_tensor(images).detach().float().cpu()
    batch = images.shape[0]
    # [B, 3, 48, 48] -> [B * 9, 3, 256], cells in row-major order.
    cells = images.reshape(batch, 3, GRID_SIZE, CELL_SIZE, GRID_SIZE, CELL_SIZE)
    cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(batch * NUM_CELLS, 3, CELL_SIZE**2)

    background = torch.tensor(BACKGROUND)
    difference = cells - background[:, None]
    low, high = FOREGROUND_DISTANCES
    foreground = ((difference.norm(dim=1) - low) / (high - low)).clamp(0, 1)
    area = foreground.sum(dim=1)
    occupied = torch.nonzero(area >= min(rule.min_area for rule in RULES.values())).flatten()
    difference, foreground, area = difference[occupied], foreground[occupied], area[occupied]

    # The palette colour nearest to the mean of the covered pixels.
    palette = torch.tensor(list(COLORS.values())) - background
    weight = foreground**4 + 1e-6
    mean_color = (difference * weight[:, None]).sum(dim=2) / weight.sum(dim=1, keepdim=True)
    color_index = torch.cdist(mean_color, palette).argmin(dim=1)
    color = palette[color_index]

    # Antialiased pixels lie between the background and that colour.
    alpha = (difference * color[:, :, None]).sum(dim=1) / (color**2).sum(dim=1, keepdim=True)
    alpha = alpha.clamp(0, 1)
    templates, labels = _templates()
    overlap = alpha @ templates.T
    norms = (alpha**2).sum(dim=1, keepdim=True) + (templates**2).sum(dim=1)
    fit, best = (overlap / (norms - overlap)).max(dim=1)

    inside = (templates[best] > 0.99).float()
    squared_distance = ((difference - color[:, :, None]) ** 2).sum(dim=1)
    color_error = ((squared_distance * inside).sum(dim=1) / inside.sum(dim=1)).sqrt()

    detections: list[list[Detection]] = [[] for _ in range(batch)]
    color_names = list(COLORS)
    for cell, template, color_number, *measures in zip(
        *(x.tolist() for x in (occupied, best, color_index, area, fit, color_error)), strict=True
    ):
        index, place = divmod(cell, NUM_CELLS)
        row, column = divmod(place, GRID_SIZE)
        name, dx, dy = labels[template]
        center = ((column + 0.5) * CELL_SIZE + dx, (row + 0.5) * CELL_SIZE + dy)
        detections[index].append(Detection(name, color_names[color_number], center, *measures))
    return detections


def _agreement(found: int, required: int, rule: Thresholds) -> float:
    if rule.at_least:
        found = min(found, required)
    return max(0.0, 1.0 - abs(found - required) / required)


def judge(detections: Sequence[Detection], caption: dict, rule: Thresholds) -> tuple[float, bool]:
    """Compares detections with a caption: (graded score in [0, 1], strict verdict).

    The graded score is the mean of several terms: the total number of objects and, for each clause,
    its count and, if given, its colour and position. A count scores
    1 - |found - required| / required, with found limited to required if the rule is `at_least`.
    The strict verdict requires all terms to be 1.
    """
    present = [item for item in detections if item.area >= rule.min_area]
    clear = [item for item in present if item.is_clear(rule)]
    include = caption["include"]
    matches = [
        [
            item
            for item in clear
            if item.name == clause["class"] and clause.get("color") in (None, item.color)
        ]
        for clause in include
    ]
    terms = [_agreement(len(present), sum(clause["count"] for clause in include), rule)]
    for clause, matched in zip(include, matches, strict=True):
        required = clause["count"]
        of_class = sum(item.name == clause["class"] for item in clear)
        terms.append(_agreement(of_class, required, rule))
        if "color" in clause:
            terms.append(_agreement(len(matched), required, rule))
        if "position" in clause:
            relation, target = clause["position"]
            holds = [
                relation_holds(
                    relation,
                    item.center[0] - reference.center[0],
                    item.center[1] - reference.center[1],
                )
                for item in matched
                for reference in matches[target]
            ]
            terms.append(sum(holds) / len(holds) if holds else 0.0)
    excluded = any(
        sum(item.name == clause["class"] for item in clear) >= clause["count"]
        for clause in caption.get("exclude", [])
    )
    return sum(terms) / len(terms), min(terms) == 1.0 and not excluded


def verify(
    images: torch.Tensor, metadata: Sequence[dict], rule: str = "standard"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores images against their captions.

    images: float [B, 3, 48, 48] in [0, 1]; metadata: B captions; rule: one of RULES.
    Returns graded scores, float32 [B] in [0, 1], and strict verdicts, bool [B].
    """
    return verdicts(detect(images), metadata, rule)


def verdicts(
    detections: Sequence[list[Detection]], metadata: Sequence[dict], rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `verify`, with the detections of the images."""
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} is unknown; choose from {sorted(RULES)}")
    found = [
        judge(objects, caption, RULES[rule])
        for objects, caption in zip(detections, metadata, strict=True)
    ]
    graded = torch.tensor([score for score, _ in found], dtype=torch.float32)
    strict = torch.tensor([passed for _, passed in found], dtype=torch.bool)
    return graded, strict
