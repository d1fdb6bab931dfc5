"""Verdicts on hand-made detections, each worked out by hand from the benchmark's rules."""

from collections.abc import Sequence

import pytest

from diffusion_nft.rewards.geneval.verdict import (
    Box,
    Detection,
    Verdict,
    graded_score,
    judge,
    objects_to_color,
    relations,
    select_objects,
)

CENTRE, LEFT, RIGHT = (40, 40, 60, 60), (0, 40, 20, 60), (80, 40, 100, 60)


def objects(label: str, *boxes: Box, scores: Sequence[float] = ()) -> list[Detection]:
    scores = scores or [0.95] * len(boxes)
    return [Detection(label, score, box) for score, box in zip(scores, boxes, strict=True)]


def cats(number: int) -> list[Detection]:
    return objects("cat", *[CENTRE] * number)


def verdict(
    detections: list[Detection], include: list[dict], colors: Sequence[str] = (), **more
) -> Verdict:
    """The verdict with ``colors`` given to the objects that need one, in order."""
    metadata = {"tag": "two_object", "include": include, **more}
    found = select_objects(detections, metadata["tag"])
    asked = objects_to_color(found, metadata)
    return judge(found, dict(zip(asked, colors, strict=True)), metadata)


@pytest.mark.parametrize(
    ("number", "required", "accuracy", "strict", "score"),
    [
        (1, 1, True, True, 1.0),
        (0, 1, False, False, 0.0),
        (2, 1, True, False, 0.0),
        (4, 1, True, False, -2.0),
        (0, 4, False, False, 0.0),
        (3, 4, False, False, 0.75),
        (5, 4, True, False, 0.75),
        (4, 4, True, True, 1.0),
    ],
)
def test_number(number, required, accuracy, strict, score):
    got = verdict(cats(number), [{"class": "cat", "count": required}])
    assert got == Verdict(accuracy, strict, score)


def test_two_objects_are_averaged():
    include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]
    assert verdict(cats(1), include) == Verdict(False, False, 0.5)
    assert verdict(cats(1) + objects("dog", LEFT), include) == Verdict(True, True, 1.0)


def test_exclude_concerns_the_benchmark_only():
    include, exclude = [{"class": "cat", "count": 2}], [{"class": "cat", "count": 3}]
    assert verdict(cats(2), include, exclude=exclude) == Verdict(True, True, 1.0)
    assert verdict(cats(3), include, exclude=exclude) == Verdict(False, False, 0.5)
    dogs = objects("dog", LEFT, RIGHT, CENTRE)
    other = [{"class": "dog", "count": 3}]
    assert verdict(cats(2) + dogs, include, exclude=other) == Verdict(False, True, 1.0)


@pytest.mark.parametrize(
    ("number", "colors", "expected"),
    [
        (1, [], Verdict(False, False, (0.5 + 0) / 2)),
        (2, ["red", "red"], Verdict(True, True, 1.0)),
        (2, ["red", "blue"], Verdict(False, False, (1 + 0.5) / 2)),
        (2, ["green", "blue"], Verdict(False, False, (1 + 0) / 2)),
        # One too many: the benchmark looks at the two most confident, the score is 0.5 and 0.
        (3, ["red", "red"], Verdict(True, False, (0.5 + 0) / 2)),
        (3, ["red", "blue"], Verdict(False, False, (0.5 + 0) / 2)),
    ],
)
def test_color(number, colors, expected):
    assert verdict(cats(number), [{"class": "cat", "count": 2, "color": "red"}], colors) == expected


def test_only_objects_whose_color_can_matter_are_classified():
    include = [
        {"class": "cat", "count": 2, "color": "red"},
        {"class": "cat", "count": 1, "color": "blue"},
        {"class": "dog", "count": 2, "color": "red"},
        {"class": "bus", "count": 1},
    ]
    first, second, third = cats(3)
    found = {
        "cat": [first, second, third],
        "dog": objects("dog", LEFT),
        "bus": objects("bus", LEFT),
    }
    assert objects_to_color(found, {"include": include}) == [first, second]


CAT = {"class": "cat", "count": 1}
DOG_LEFT_OF_CAT = {"class": "dog", "count": 1, "position": ["left of", 0]}
PLACED, RED_DOG = [CAT, DOG_LEFT_OF_CAT], [CAT, {**DOG_LEFT_OF_CAT, "color": "red"}]
RED_CAT = [{**CAT, "color": "red"}, DOG_LEFT_OF_CAT]
LEFT_DOG, RIGHT_DOG = objects("dog", LEFT), objects("dog", RIGHT)
RIGHT_SURER, LEFT_SURER = (objects("dog", LEFT, RIGHT, scores=x) for x in ((0.5, 0.9), (0.9, 0.5)))
ABOVE = [{"class": "cat", "count": 2}, {"class": "dog", "count": 2, "position": ["above", 0]}]
TWO_CATS = objects("cat", (0, 80, 10, 90), (20, 80, 30, 90))
BOTH_ABOVE = TWO_CATS + objects("dog", (0, 0, 10, 10), (20, 0, 30, 10))
ONE_ABOVE = TWO_CATS + objects("dog", (0, 0, 10, 10), (20, 160, 30, 170))


@pytest.mark.parametrize(
    ("detections", "include", "colors", "expected"),
    [
        (cats(1) + LEFT_DOG, PLACED, [], (True, True, 1.0)),
        # Cat 1, dog 1, and the published pair of terms 0 and 1 for a position that does not hold.
        (cats(1) + RIGHT_DOG, PLACED, [], (False, False, 0.75)),
        # Without its target.
        (LEFT_DOG, PLACED, [], (False, False, 1 / 3)),
        # A second cat spoils the strict count, so that the dog has no target: 0, 1, 0.
        (cats(2) + LEFT_DOG, PLACED, [], (True, False, 1 / 3)),
        # 1 for the cat; 0 and 0 for the dogs, of which the benchmark looks at the most confident.
        (cats(1) + RIGHT_SURER, PLACED, [], (False, False, 1 / 3)),
        (cats(1) + LEFT_SURER, PLACED, [], (True, False, 1 / 3)),
        # All pairs.
        (BOTH_ABOVE, ABOVE, [], (True, True, 1.0)),
        (ONE_ABOVE, ABOVE, [], (False, False, 0.75)),
        # Not tested after a wrong colour.
        (cats(1) + LEFT_DOG, RED_DOG, ["red"], (True, True, 1.0)),
        (cats(1) + LEFT_DOG, RED_DOG, ["blue"], (False, False, (1 + 1 + 0) / 3)),
        # Right colour, wrong place: 1, then 1, 1, 0, 1.
        (cats(1) + RIGHT_DOG, RED_DOG, ["red"], (False, False, 0.8)),
        # A target that failed by its colour.
        (cats(1) + LEFT_DOG, RED_CAT, ["blue"], (False, False, (1 + 0 + 1 + 0) / 4)),
        ([], RED_CAT, [], (False, False, 0.0)),
    ],
)
def test_position(detections, include, colors, expected):
    assert verdict(detections, include, colors) == Verdict(*expected)


def test_bounded_grading():
    def bounded(detections: list[Detection], include: list[dict]) -> float:
        found = select_objects(detections, "position")
        return graded_score(found, {}, {"include": include}, "bounded")[0]

    assert bounded(cats(4), [CAT]) == 0
    assert bounded(cats(3), [{"class": "cat", "count": 2}]) == 0.5
    assert bounded(cats(1) + RIGHT_DOG, PLACED) == 2 / 3
    assert bounded(cats(1) + LEFT_DOG, PLACED) == 1


def test_thresholds_are_strict():
    detections = objects("cat", *[CENTRE] * 4, scores=[0.3, 0.31, 0.9, 0.91])
    kept = {tag: select_objects(detections, tag)["cat"] for tag in ("colors", "counting")}
    assert [cat.score for cat in kept["colors"]] == [0.91, 0.9, 0.31]
    assert [cat.score for cat in kept["counting"]] == [0.91]
    assert select_objects(detections[:1], "colors") == {}


def test_sixteen_objects_a_class_at_most():
    scores = [0.5 + i / 100 for i in range(20)]
    found = select_objects(objects("cat", *[CENTRE] * 20, scores=scores), "colors")
    assert [cat.score for cat in found["cat"]] == sorted(scores, reverse=True)[:16]


def test_ties_keep_their_order():
    detections = objects("cat", LEFT, CENTRE, RIGHT, scores=[0.5, 0.6, 0.5])
    assert [cat.box for cat in select_objects(detections, "colors")["cat"]] == [CENTRE, LEFT, RIGHT]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (LEFT, RIGHT, {"left of"}),
        (RIGHT, LEFT, {"right of"}),
        ((0, 0, 10, 10), (0, 50, 10, 60), {"above"}),
        ((0, 50, 10, 60), (0, 0, 10, 10), {"below"}),
        # Diagonal: (100 - 2) / 141.4 = 0.69 on both axes.
        ((0, 0, 10, 10), (100, 100, 110, 110), {"left of", "above"}),
        # Offset 5 of two boxes 20 wide is shrunk by 4: 1 / 5 = 0.2.
        ((0, 0, 20, 20), (5, 0, 25, 20), set()),
        # Offset 9: (9 - 4) / 9 = 0.56; offset 8: exactly 0.5, which is not enough.
        ((0, 0, 20, 20), (9, 0, 29, 20), {"left of"}),
        ((0, 0, 20, 20), (8, 0, 28, 20), set()),
        # Shrunk to nothing, or no offset at all.
        ((0, 0, 20, 20), (4, 0, 24, 20), set()),
        (CENTRE, CENTRE, set()),
        # Over the unshrunk norm, 50: x (30 - 12) / 50 = 0.36, y (40 - 2) / 50 = 0.76.
        ((0, 0, 60, 10), (30, 40, 90, 50), {"above"}),
    ],
)
def test_relations(a, b, expected):
    assert relations(a, b) == expected
