"""Vocabulary of GenEval's metadata and the check of a line.

A line: ``{"tag", "prompt", "include": [{"class", "count", optional "color", optional "position":
[relation, index of an earlier clause]}], optional "exclude": [{"class", "count"}]}``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

# GenEval's names of the 80 COCO classes in the detector's order.  "computer mouse", "tv remote" and
# "computer keyboard" are GenEval's; COCO says mouse, remote, keyboard.
OBJECT_NAMES: tuple[str, ...] = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink,
    refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush""".replace(
        "\n    ", " "
    ).split(", ")
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def check_prompt(
    prompt: str, metadata: Mapping[str, Any], options: Mapping[str, Any] | None
) -> None:
    """Raises ValueError for metadata that cannot be scored."""
    check_metadata(metadata)


def check_metadata(
    metadata: Mapping[str, Any],
    *,
    objects: Sequence[str] = OBJECT_NAMES,
    colors: Sequence[str] = COLORS,
) -> None:
    """Raises ValueError, quoting the line, for metadata that cannot be scored.

    ``objects`` and ``colors``: the vocabulary of the clauses.
    """
    try:
        _check_choice("tag", metadata.get("tag"), TAGS)
        included = _clauses(metadata, "include")
        if not included:
            raise ValueError('"include" must name at least one object')
        for index, clause in enumerate(included):
            _check_clause(clause, objects)
            if "color" in clause:
                _check_choice("color", clause["color"], colors)
            if "position" in clause:
                _check_position(clause["position"], index)
        for clause in _clauses(metadata, "exclude"):
            _check_clause(clause, objects)
    except ValueError as error:
        raise ValueError(f"invalid GenEval metadata: {error}; in {dict(metadata)}") from None


def _clauses(metadata: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    clauses = metadata.get(key, [])
    if not isinstance(clauses, list) or not all(isinstance(c, Mapping) for c in clauses):
        raise ValueError(f'"{key}" must be a list of objects, not {clauses!r}')
    return clauses


def _check_choice(key: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{key} {value!r} is unknown; choose from {', '.join(choices)}")


def _check_clause(clause: Mapping[str, Any], objects: Sequence[str]) -> None:
    _check_choice("class", clause.get("class"), objects)
    count = clause.get("count")
    if type(count) is not int or count < 1:
        raise ValueError(f"count {count!r} must be a positive integer")


def _check_position(position: Any, index: int) -> None:
    if not isinstance(position, list | tuple) or len(position) != 2:
        raise ValueError(f"position {position!r} must be [relation, index of the target clause]")
    relation, target = position
    _check_choice("position", relation, RELATIONS)
    if type(target) is not int or not 0 <= target < index:
        raise ValueError(f"position's target {target!r} must be the index of an earlier clause")
