"""GenEval's verdicts from detected objects and their colours: pure functions.

Sources: ``evaluate`` in github.com/djghosh13/geneval (the benchmark's accuracy) and
``evaluate_reward`` in github.com/yifan123/reward-server (strict accuracy and the graded score).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

SCORE_THRESHOLD = 0.3
COUNTING_SCORE_THRESHOLD = 0.9
MAX_OBJECTS_PER_CLASS = 16
POSITION_SHRINKAGE = 0.1
MIN_OFFSET = 1e-3
MIN_DIRECTION = 0.5

# "published": count terms may be negative, and a failed position gives the terms 0 and 1.
# "bounded": every term is in [0, 1], and a position gives one term, 0 or 1.
Grading = Literal["published", "bounded"]

Box = tuple[float, float, float, float]
Clause = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Detection:
    """A detected object.

    ``box``: (x0, y0, x1, y1) in pixels, x1 and y1 exclusive; ``mask: bool [H, W]``.
    Compared by identity, so that it can be a dictionary key.
    """

    label: str
    score: float
    box: Box
    mask: np.ndarray | None = None


# Class name -> its objects, most confident first.
Found = Mapping[str, Sequence[Detection]]
# Has an entry for at least the ``objects_to_color``.
Colors = Mapping[Detection, str]


@dataclass(frozen=True)
class Verdict:
    """One image's benchmark ``accuracy``, ``strict_accuracy`` and graded ``score``."""

    accuracy: bool
    strict_accuracy: bool
    score: float


def judge(
    found: Found, colors: Colors, metadata: Mapping[str, Any], grading: Grading = "published"
) -> Verdict:
    """Verdict on one image; ``metadata`` must pass ``check_metadata``."""
    score, strict = graded_score(found, colors, metadata, grading)
    return Verdict(is_accurate(found, colors, metadata), strict, score)


def select_objects(detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """Objects by class, most confident first, at most 16 per class.

    Objects with score > 0.3, or > 0.9 for the tag "counting", are kept, ties in the given order.
    Overlapping objects are kept: GenEval disables non-maximum suppression.
    """
    threshold = COUNTING_SCORE_THRESHOLD if tag == "counting" else SCORE_THRESHOLD
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        if detection.score > threshold:
            found.setdefault(detection.label, []).append(detection)
    return {label: objects[:MAX_OBJECTS_PER_CLASS] for label, objects in found.items()}


def objects_to_color(found: Found, metadata: Mapping[str, Any]) -> list[Detection]:
    """Objects whose colours the verdicts depend on, without duplicates.

    These are, for each clause with a colour, its first ``count`` objects if there are that many.
    """
    objects: dict[Detection, None] = {}
    for clause in metadata["include"]:
        candidates = found.get(clause["class"], ())
        if "color" in clause and len(candidates) >= clause["count"]:
            objects |= dict.fromkeys(candidates[: clause["count"]])
    return list(objects)


def is_accurate(found: Found, colors: Colors, metadata: Mapping[str, Any]) -> bool:
    """The benchmark's verdict: enough objects with the right colour and position, none excluded.

    Each clause considers its first ``count`` objects and ignores additional ones.
    """
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata["include"]:
        count = clause["count"]
        objects = found.get(clause["class"], ())[:count]
        met = (
            len(objects) == count
            and ("color" not in clause or _count_color(objects, clause, colors) == count)
            and ("position" not in clause or _is_placed(objects, clause, groups))
        )
        groups.append(objects if met else None)
    unwanted = any(
        len(found.get(clause["class"], ())) >= clause["count"]
        for clause in metadata.get("exclude", [])
    )
    return not unwanted and all(group is not None for group in groups)


def graded_score(
    found: Found, colors: Colors, metadata: Mapping[str, Any], grading: Grading = "published"
) -> tuple[float, bool]:
    """Mean of the clauses' terms (at most 1), and strict accuracy (every clause met exactly).

    A clause with n objects of ``count`` c gives the term 1 - |c - n| / c, and a term 0 if n != c
    and it has a colour or a position.  If n = c, a colour on k objects gives 1 - |c - k| / c; if
    k = c, a position gives 0 if its target clause failed and 1 if it holds; if it does not hold,
    the terms 0 and 1 ("published") or 0 ("bounded").  ``exclude`` is ignored.
    """
    terms: list[float] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata["include"]:
        objects = found.get(clause["class"], ())
        clause_terms, met = _grade_clause(objects, clause, colors, groups, grading)
        terms += clause_terms
        groups.append(objects if met else None)
    return math.fsum(terms) / len(terms), all(group is not None for group in groups)


def relations(a: Box, b: Box) -> set[str]:
    """Position of ``a`` relative to ``b``: up to two of RELATIONS.

    The offset of the centres is shrunk towards 0 by a tenth of the sum of the widths (heights) and
    divided by the norm of the unshrunk offset; above 0.5 on an axis, the relation holds.
    """
    offset = np.array([a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]]) / 2
    extent = np.array([a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]])
    shrunk = np.maximum(np.abs(offset) - POSITION_SHRINKAGE * extent, 0) * np.sign(offset)
    if (np.abs(shrunk) < MIN_OFFSET).all():
        return set()
    x, y = shrunk / np.linalg.norm(offset)
    held = {
        "left of": x < -MIN_DIRECTION,
        "right of": x > MIN_DIRECTION,
        "above": y < -MIN_DIRECTION,
        "below": y > MIN_DIRECTION,
    }
    return {relation for relation, holds in held.items() if holds}


def _grade_clause(
    objects: Sequence[Detection],
    clause: Clause,
    colors: Colors,
    groups: Sequence[Sequence[Detection] | None],
    grading: Grading,
) -> tuple[list[float], bool]:
    """Terms of one clause, and True if it is met exactly; ``groups``: see ``_is_placed``."""
    count = clause["count"]
    terms = [_number_term(len(objects), count, grading)]
    if len(objects) != count:
        return terms + [0.0] * ("color" in clause or "position" in clause), False
    if "color" in clause:
        right = _count_color(objects, clause, colors)
        terms.append(_number_term(right, count, grading))
        if right != count:
            return terms, False
    if "position" not in clause:
        return terms, True
    if groups[clause["position"][1]] is None:
        return [*terms, 0.0], False
    placed = _is_placed(objects, clause, groups)
    if placed or grading == "bounded":
        return [*terms, float(placed)], placed
    return [*terms, 0.0, 1.0], False


def _number_term(number: int, required: int, grading: Grading) -> float:
    term = 1 - abs(required - number) / required
    return term if grading == "published" else max(0.0, term)


def _count_color(objects: Sequence[Detection], clause: Clause, colors: Colors) -> int:
    return sum(colors[detection] == clause["color"] for detection in objects)


def _is_placed(
    objects: Sequence[Detection], clause: Clause, groups: Sequence[Sequence[Detection] | None]
) -> bool:
    """True if the relation holds for every pair of an object and an object of the target clause.

    ``groups``: objects of the earlier clauses, None for a clause that is not met.
    """
    relation, index = clause["position"]
    target = groups[index]
    return target is not None and all(
        relation in relations(a.box, b.box) for a in objects for b in target
    )
