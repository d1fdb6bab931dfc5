"""Captions from a small grammar with GenEval's six tags, and scenes that fit them.

A caption is a metadata dictionary in GenEval's form:

    {"tag": "position", "prompt": "a circle left of a square",
     "include": [{"class": "square", "count": 1},
                 {"class": "circle", "count": 1, "position": ["left of", 0]}]}

A fitting scene has no further objects; unspecified attributes (colours, places) are free.

The captions of each tag are split into a training and a held-out part. A caption and its twin with
the objects in reverse order are in the same part. In `colors` and `color_attr` whole combinations
of attributes are held out; the other tags have too few, so that only some wordings are held out.
"""

import copy
import itertools
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from diffusion_nft.shapes.scene import CLASSES, COLORS, GRID_SIZE, NUM_CELLS, Scene, place

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
MIRRORED_RELATIONS = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
MAX_WORDS = 7

TRAIN_LINES_PER_TAG = 240
TEST_LINES_PER_TAG = 80

OPENINGS = ("a", "one", "a photo of a", "a picture of a", "a drawing of a", "an image of a")
PLURAL_OPENINGS = ("", "exactly", "a photo of", "a picture of", "a drawing of", "an image of")
ARTICLES = ("a", "one", "")
CONJUNCTIONS = ("and", "with", "plus")


def _caption(tag: str, words: str, include: list[dict], **extra) -> dict:
    return {"tag": tag, "include": include, **extra, "prompt": " ".join(words.split())}


def _single_object() -> Iterator[list[dict]]:
    for name, opening in itertools.product(CLASSES, OPENINGS):
        yield [_caption("single_object", f"{opening} {name}", [{"class": name, "count": 1}])]


def _two_object() -> Iterator[list[dict]]:
    pairs = itertools.combinations(CLASSES, 2)
    for pair, article, conjunction in itertools.product(pairs, ARTICLES, CONJUNCTIONS):
        yield [
            _caption(
                "two_object",
                f"{article} {first} {conjunction} {article} {second}",
                [{"class": first, "count": 1}, {"class": second, "count": 1}],
            )
            for first, second in (pair, pair[::-1])
        ]


def _counting() -> Iterator[list[dict]]:
    for name, count, opening in itertools.product(CLASSES, NUMBERS, PLURAL_OPENINGS):
        yield [
            _caption(
                "counting",
                f"{opening} {NUMBERS[count]} {name}s",
                [{"class": name, "count": count}],
                exclude=[{"class": name, "count": count + 1}],
            )
        ]


def _colors() -> Iterator[list[dict]]:
    for name, color in itertools.product(CLASSES, COLORS):
        include = [{"class": name, "count": 1, "color": color}]
        yield [_caption("colors", f"{opening} {color} {name}", include) for opening in OPENINGS]


def _position() -> Iterator[list[dict]]:
    pairs = itertools.permutations(CLASSES, 2)
    for relation, (name, target), article in itertools.product(
        ("left of", "above"), pairs, ARTICLES
    ):
        twins = ((name, relation, target), (target, MIRRORED_RELATIONS[relation], name))
        yield [
            _caption(
                "position",
                f"{article} {subject} {words} {article} {reference}",
                [
                    {"class": reference, "count": 1},
                    {"class": subject, "count": 1, "position": [words, 0]},
                ],
            )
            for subject, words, reference in twins
        ]


def _color_attr() -> Iterator[list[dict]]:
    pairs = itertools.combinations(CLASSES, 2)
    for names, colors in itertools.product(pairs, itertools.permutations(COLORS, 2)):
        clauses = [
            {"class": name, "count": 1, "color": color}
            for name, color in zip(names, colors, strict=True)
        ]
        yield [
            _caption(
                "color_attr",
                f"{article} {first['color']} {first['class']}"
                f" and {article} {second['color']} {second['class']}",
                [first, second],
            )
            for article in ARTICLES
            for first, second in (clauses, clauses[::-1])
        ]


_GRAMMAR = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}


@cache
def _split() -> dict[str, dict[str, list[dict]]]:
    split: dict[str, dict[str, list[dict]]] = {"train": {}, "test": {}}
    for tag in TAGS:
        # Seven divides none of the loops of the grammar, so the held-out groups cover all shapes,
        # colours and wordings.
        for index, group in enumerate(_GRAMMAR[tag]()):
            part = "test" if index % 7 == 3 else "train"
            split[part].setdefault(tag, []).extend(group)
    return split


def captions(part: str, tag: str) -> list[dict]:
    """The distinct captions of a tag in a part, "train" or "test"."""
    return copy.deepcopy(_split()[part][tag])


def vocabulary() -> list[str]:
    every = (caption for part in _split().values() for tag in part.values() for caption in tag)
    return sorted({word for caption in every for word in caption["prompt"].split()})


def metadata_lines(part: str) -> list[dict]:
    """The lines of a prompt set, with the tags in turn.

    Captions are repeated if a tag has fewer than its lines, and evenly subsampled if more.
    """
    count = TRAIN_LINES_PER_TAG if part == "train" else TEST_LINES_PER_TAG
    columns = []
    for tag in TAGS:
        pool = captions(part, tag)
        columns.append([pool[line * len(pool) // count] for line in range(count)])
    return [caption for row in zip(*columns, strict=True) for caption in row]


def write_metadata(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        lines = [json.dumps(caption) + "\n" for caption in metadata_lines(part)]
        (directory / f"{part}_metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def relation_holds(relation: str, dx: float, dy: float) -> bool:
    """True if an object at offset (dx, dy) from its reference (y points down) is in `relation`.

    The offset along the axis of the relation must be the larger one.
    """
    horizontal = relation in ("left of", "right of")
    along, across = (dx, dy) if horizontal else (dy, dx)
    if relation in ("left of", "above"):
        along = -along
    return along > abs(across)


@cache
def _related_cells(relation: str) -> list[tuple[int, int]]:
    return [
        (reference, subject)
        for reference, subject in itertools.permutations(range(NUM_CELLS), 2)
        if relation_holds(
            relation,
            subject % GRID_SIZE - reference % GRID_SIZE,
            subject // GRID_SIZE - reference // GRID_SIZE,
        )
    ]


def sample_scene(caption: dict, rng: np.random.Generator) -> Scene:
    """A random scene that fits a caption; free attributes are uniformly random."""
    clauses = [clause for clause in caption["include"] for _ in range(clause["count"])]
    relations = [clause["position"][0] for clause in clauses if "position" in clause]
    if relations:
        pairs = _related_cells(relations[0])
        cells = pairs[int(rng.integers(len(pairs)))]
    else:
        cells = rng.choice(NUM_CELLS, size=len(clauses), replace=False)
    return Scene(
        tuple(
            place(clause["class"], clause.get("color") or str(rng.choice(list(COLORS))), cell, rng)
            for clause, cell in zip(clauses, cells, strict=True)
        )
    )


def corrupt(caption: dict, rng: np.random.Generator) -> dict:
    """A copy of `caption` for a similar scene: one attribute is replaced, or two are exchanged.

    Used for noisy pretraining pairs: the prompt is unchanged and no longer fits the scene.
    """
    caption = copy.deepcopy(caption)
    include = caption["include"]

    def other(choices, *current):
        return str(rng.choice([choice for choice in choices if choice not in current]))

    kinds = ["class"] + [key for key in ("color", "position") if key in include[-1]]
    if caption["tag"] == "counting":
        kinds.append("count")
    if caption["tag"] == "color_attr":
        kinds.append("exchange")
    kind = rng.choice(kinds)
    clause = include[int(rng.integers(len(include)))]
    if kind == "class":
        clause["class"] = other(CLASSES, *(item["class"] for item in include))
    elif kind == "color":
        clause["color"] = other(COLORS, clause["color"])
    elif kind == "count":
        clause["count"] = int(other(range(1, 5), clause["count"]))
    elif kind == "position":
        include[1]["position"][0] = other(RELATIONS, include[1]["position"][0])
    else:
        include[0]["color"], include[1]["color"] = include[1]["color"], include[0]["color"]
    return caption
