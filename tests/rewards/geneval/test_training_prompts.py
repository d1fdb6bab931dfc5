"""Generated GenEval prompts: grammar, mix, uniqueness, separation from the test prompts."""

import json
from collections import Counter, defaultdict

import pytest

from diffusion_nft.data.prompts import load_prompts
from diffusion_nft.rewards.geneval.training_prompts import (
    TAG_RULES,
    TAG_SHARES,
    generate,
    one,
    scene,
    several,
    shares,
)
from diffusion_nft.rewards.geneval.vocabulary import OBJECT_NAMES, TAGS, check_metadata

TURNED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def line(tag: str, words: str, *include: dict, **more) -> dict:
    return {"tag": tag, "include": list(include), **more, "prompt": f"a photo of {words}"}


def thing(name: str, count: int = 1, **more) -> dict:
    return {"class": name, "count": count, **more}


@pytest.fixture(scope="module")
def default():
    return generate(60_000, seed=0)


@pytest.mark.parametrize(
    ("tag", "objects", "detail", "expected"),
    [
        ("single_object", ("bench",), None, line("single_object", "a bench", thing("bench"))),
        (
            "two_object",
            ("umbrella", "cup"),
            None,
            line("two_object", "an umbrella and a cup", thing("umbrella"), thing("cup")),
        ),
        (
            "counting",
            ("cup",),
            3,
            line("counting", "three cups", thing("cup", 3), exclude=[thing("cup", 4)]),
        ),
        (
            "colors",
            ("bench",),
            "orange",
            line("colors", "an orange bench", thing("bench", color="orange")),
        ),
        (
            "position",
            ("cup", "bench"),
            "left of",
            line(
                "position",
                "a cup left of a bench",
                thing("bench"),
                thing("cup", position=["left of", 0]),
            ),
        ),
        (
            "color_attr",
            ("apple", "skis"),
            ("red", "white"),
            line(
                "color_attr",
                "a red apple and a pair of white skis",
                thing("apple", color="red"),
                thing("skis", color="white"),
            ),
        ),
    ],
)
def test_a_line_of_each_tag(tag, objects, detail, expected):
    written = TAG_RULES[tag].write(objects, detail)
    assert json.dumps(written) == json.dumps(expected)  # the order of keys is the published one
    check_metadata(written)


def test_articles():
    an = {name for name in OBJECT_NAMES if one(name).startswith("an ")}
    assert an == {"airplane", "elephant", "umbrella", "apple", "orange", "oven"}
    assert one("tv") == "a tv" and one("hair drier") == "a hair drier"
    assert one("apple", "red") == "a red apple" and one("cup", "orange") == "an orange cup"
    assert one("scissors") == "a pair of scissors"
    assert one("scissors", "orange") == "a pair of orange scissors"


def test_plurals():
    ending = {name: several(name, 2).removeprefix("two ") for name in OBJECT_NAMES}
    unlike_s = {name: plural for name, plural in ending.items() if plural != f"{name}s"}
    assert unlike_s == {
        "person": "people",
        "bus": "buses",
        "bench": "benches",
        "sheep": "sheep",
        "skis": "pairs of skis",
        "wine glass": "wine glasses",
        "knife": "knives",
        "sandwich": "sandwiches",
        "broccoli": "broccoli",
        "couch": "couches",
        "computer mouse": "computer mice",
        "scissors": "pairs of scissors",
        "toothbrush": "toothbrushes",
    }
    assert several("cup", 3) == "three cups" and several("skis", 4) == "four pairs of skis"


def test_the_numbers_of_prompts_that_the_docs_give():
    sizes = {tag: len(rule.objects) * len(rule.details) for tag, rule in TAG_RULES.items()}
    assert sizes == {
        "single_object": 80,
        "two_object": 80 * 79 // 2,
        "counting": 80 * 3,
        "colors": 79 * 10,
        "position": 80 * 79 // 2 * 4,
        "color_attr": 79 * 78 // 2 * 10 * 9,
    }
    assert set(sizes) == set(TAGS) == set(TAG_SHARES)


def test_the_mix_is_met_to_a_line(default):
    tags = ("position", "counting", "color_attr", "colors", "two_object", "single_object")
    for num_prompts, expected in {
        17: (7, 5, 3, 1, 1, 0),
        18: (8, 5, 3, 1, 1, 0),  # remainders 7 5 3 1 1 of 17
        1: (1, 0, 0, 0, 0, 0),
        # 24705 15/17, 17647 1/17, 10588 4/17, 3529 7/17, 3529 7/17
        60_000: (24_706, 17_647, 10_588, 3530, 3529, 0),
    }.items():
        assert shares(num_prompts, TAG_SHARES) == dict(zip(tags, expected, strict=True))
        lines = default if num_prompts == 60_000 else generate(num_prompts, seed=1)
        made = Counter(line["tag"] for line in lines)
        assert [made[tag] for tag in tags] == [*expected]


def test_every_line_is_metadata_that_the_reward_takes(default, tmp_path):
    assert len(default) == 60_000
    for made in {made["prompt"]: made for made in default}.values():
        check_metadata(made)
    (tmp_path / "train_metadata.jsonl").write_text("\n".join(map(json.dumps, default[:3000])))
    assert [prompt.metadata for prompt in load_prompts(tmp_path, "train")] == default[:3000]
    colored = {o["class"] for made in default for o in made["include"] if "color" in o}
    assert colored == {*OBJECT_NAMES} - {"person"}
    objects = Counter(o["class"] for made in default for o in made["include"])
    assert set(objects) == set(OBJECT_NAMES)


def test_a_prompt_comes_again_only_after_all_others_of_its_tag(default):
    uses: dict[str, Counter] = defaultdict(Counter)
    for made in default:
        uses[made["tag"]][made["prompt"]] += 1
    found = {tag: (len(n), min(n.values()), max(n.values())) for tag, n in uses.items()}
    assert found == {
        "position": (12_640, 1, 2),
        "counting": (240, 73, 74),
        "color_attr": (10_588, 1, 1),
        "colors": (790, 4, 5),
        "two_object": (3160, 1, 2),
    }


def regardless_of_order(made: dict) -> tuple:
    """The objects in any order, and the relation as it is worded."""
    objects = sorted(json.dumps(o | {"position": None}, sort_keys=True) for o in made["include"])
    return made["tag"], *objects, *[o["position"][0] for o in made["include"] if "position" in o]


def as_a_scene(made: dict) -> tuple:
    """A left of B is B right of A: the names in the order of the alphabet, turned if necessary."""
    if made["tag"] != "position":
        return regardless_of_order(made)
    target, placed = made["include"]
    relation = placed["position"][0]
    if placed["class"] < target["class"]:
        return "position", placed["class"], relation, target["class"]
    return "position", target["class"], TURNED[relation], placed["class"]


@pytest.mark.parametrize("same", [regardless_of_order, as_a_scene])
def test_different_prompts_differ_in_more_than_the_order_of_objects(default, same):
    distinct = {made["prompt"]: made for made in default}
    assert len({same(made) for made in distinct.values()}) == len(distinct)


def test_either_object_may_be_named_first(default):
    first = Counter(
        OBJECT_NAMES.index(made["include"][0]["class"])
        < OBJECT_NAMES.index(made["include"][1]["class"])
        for made in default
        if made["tag"] == "two_object"
    )
    assert 0.45 < first[True] / first.total() < 0.55


def test_a_function_of_the_seed():
    made = generate(6000, seed=0)
    assert made == generate(6000, seed=0)
    other = generate(6000, seed=1)
    assert sum(a == b for a, b in zip(made, other, strict=True)) < 600


def test_lines_come_in_random_order(default):
    for part in (default[:6000], default[-6000:]):
        counts = Counter(made["tag"] for made in part)
        assert counts["position"] / 6000 == pytest.approx(7 / 17, abs=0.03)
        assert counts["counting"] / 6000 == pytest.approx(5 / 17, abs=0.03)


def test_apart_from_the_test_prompts_in_any_order_of_objects():
    """The benchmark's wording differs ("benchs"), so the metadata counts, not the text."""
    test = [
        line("two_object", "a cup and a bench", thing("cup"), thing("bench")),
        line("counting", "four benchs", thing("bench", 4), exclude=[thing("bench", 5)]),
        line("colors", "a red bench", thing("bench", color="red")),
        line(
            "position",
            "a cup left of a bench",
            thing("bench"),
            thing("cup", position=["left of", 0]),
        ),
        line(
            "color_attr",
            "a red bench and a blue cup",
            thing("bench", color="red"),
            thing("cup", color="blue"),
        ),
    ]
    parts = {line["tag"]: 1 for line in test}
    # Every prompt there is: far more lines than different prompts, except color_attr.
    made = generate(5 * 13_000, seed=0, test=test, mix=parts | {"color_attr": 0, "colors": 2})
    prompts = {line["prompt"].removeprefix("a photo of ") for line in made}
    for absent in (
        "a cup and a bench",
        "a bench and a cup",
        "four benches",
        "a red bench",
        *(f"a cup {side} of a bench" for side in ("left", "right")),
        *(f"a bench {side} of a cup" for side in ("left", "right")),
    ):
        assert absent not in prompts
    assert {"three benches", "four cups", "a blue bench", "a red cup"} < prompts
    assert {"a cup above a bench", "a bench above a cup"} & prompts
    assert len(prompts) == (3160 - 1) + (240 - 1) + (790 - 1) + (12_640 - 2)

    turned = line("", "", thing("cup", color="blue"), thing("bench", color="red"))
    swapped = line("", "", thing("cup", color="red"), thing("bench", color="blue"))
    assert scene(turned) == scene(test[-1]) != scene(swapped)


def test_color_attr_is_kept_apart_too():
    mix = {"color_attr": 1}
    before = generate(2000, seed=3, mix=mix)
    test = [made | {"include": made["include"][::-1]} for made in before[:1000]]
    after = generate(2000, seed=3, mix=mix, test=test)
    assert not {scene(made) for made in test} & {scene(made) for made in after}
    assert {made["prompt"] for made in before[1000:]} < {made["prompt"] for made in after}


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="num_prompts = 0 must be at least 1"):
        generate(0, seed=0)
    for mix in ({"counting": 0}, {"counting": -1, "colors": 2}, {"shapes": 1}):
        with pytest.raises(ValueError, match="must give parts of single_object"):
            generate(10, seed=0, mix=mix)
    everything = generate(240, seed=0, mix={"counting": 1})
    with pytest.raises(ValueError, match="exclude all counting prompts"):
        generate(17, seed=0, test=everything)
