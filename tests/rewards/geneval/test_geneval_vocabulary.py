"""GenEval's vocabulary, and the refusal of invalid metadata."""

import copy

import pytest

from diffusion_nft.rewards.geneval.vocabulary import OBJECT_NAMES, check_metadata

LINE = {
    "tag": "position",
    "include": [
        {"class": "cat", "count": 1},
        {"class": "dog", "count": 1, "color": "red", "position": ["left of", 0]},
    ],
    "exclude": [{"class": "cat", "count": 2}],
    "prompt": "a photo of a red dog left of a cat",
}


def test_names_are_in_the_order_of_coco():
    # Indices of the 80 contiguous COCO classes; three names are GenEval's own.
    expected = {
        0: "person",
        9: "traffic light",
        15: "cat",
        32: "sports ball",
        46: "banana",
        49: "orange",
        58: "potted plant",
        62: "tv",
        64: "computer mouse",
        65: "tv remote",
        66: "computer keyboard",
        72: "refrigerator",
        78: "hair drier",
        79: "toothbrush",
    }
    assert len(OBJECT_NAMES) == len(set(OBJECT_NAMES)) == 80
    assert {index: OBJECT_NAMES[index] for index in expected} == expected
    assert all(name == name.strip() and "\n" not in name for name in OBJECT_NAMES)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["tag"], "colour", "tag 'colour' is unknown; choose from single_object, two_object"),
        (["include"], [], "at least one object"),
        (["include"], "a cat", '"include" must be a list of objects'),
        (["include", 1], "a dog", '"include" must be a list of objects'),
        (["exclude"], {"class": "cat"}, '"exclude" must be a list of objects'),
        (["include", 0, "class"], "kat", "class 'kat' is unknown"),
        (["include", 0, "count"], 0, "count 0 must be a positive integer"),
        (["include", 0, "count"], "2", "count '2' must be"),
        (["include", 1, "color"], "grey", "color 'grey' is unknown; choose from red"),
        (["include", 1, "position"], ["near", 0], "position 'near' is unknown"),
        (["include", 1, "position"], ["above", 1], "target 1 must be the index of an earlier"),
        (["include", 1, "position"], ["above", -1], "target -1 must be"),
        (["include", 1, "position"], "above", "must be .relation, index"),
        (["exclude", 0, "class"], None, "class None is unknown"),
    ],
)
def test_bad_metadata_is_refused(path, value, message):
    line = copy.deepcopy(LINE)
    inner = line
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        check_metadata(line)
