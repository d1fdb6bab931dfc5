"""The grammar, its split, and scenes that fit their captions (checked without the verifier)."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from diffusion_nft.shapes.captions import (
    MAX_WORDS,
    TAGS,
    captions,
    corrupt,
    metadata_lines,
    relation_holds,
    sample_scene,
    vocabulary,
    write_metadata,
)
from diffusion_nft.shapes.scene import MAX_OBJECTS, Scene

DATASET_DIR = Path(__file__).parents[2] / "dataset" / "shapes"


def scene_fits(scene: Scene, caption: dict) -> bool:
    """An independent reading of a caption on the scene's own description."""
    wanted = Counter()
    for clause in caption["include"]:
        wanted[clause["class"], clause.get("color")] += clause["count"]
    colored = {clause["class"] for clause in caption["include"] if "color" in clause}
    shown = Counter(
        (item.name, item.color if item.name in colored else None) for item in scene.objects
    )
    if shown != wanted:
        return False
    cells = {item.name: (item.cell % 3, item.cell // 3) for item in scene.objects}
    for clause in caption["include"]:
        if "position" in clause:
            words, target = clause["position"]
            x, y = cells[clause["class"]]
            other_x, other_y = cells[caption["include"][target]["class"]]
            angle = np.degrees(np.arctan2(other_y - y, x - other_x))
            wanted_angle = {"right of": 0, "above": 90, "left of": 180, "below": 270}[words]
            if abs((angle - wanted_angle + 180) % 360 - 180) >= 44.9:
                return False
    return True


def normal_form(caption: dict) -> str:
    """A caption up to the order of its objects: the words that do not depend on it, sorted."""
    mirrored = {"right": ("left", True), "below": ("above", True)}
    words = caption["prompt"].split()
    swap = any(word in mirrored for word in words)
    words = [mirrored[word][0] if word in mirrored else word for word in words]
    for joint in ("left", "above", "and", "with", "plus"):
        if joint in words:
            index = words.index(joint)
            parts = [" ".join(words[:index]), " ".join(words[index + 1 :]).removeprefix("of ")]
            if joint not in ("left", "above"):
                parts.sort()
            elif swap:
                parts.reverse()
            return f"{parts[0]} {joint} {parts[1]}"
    return " ".join(words)


def test_every_tag_has_both_parts_and_they_are_disjoint():
    for tag in TAGS:
        train, test = ({normal_form(x) for x in captions(part, tag)} for part in ("train", "test"))
        assert test and not train & test
        assert 0.1 <= len(test) / (len(train) + len(test)) <= 0.2


def test_whole_combinations_of_attributes_are_held_out():
    def contents(part, tag):
        return {
            frozenset((clause["class"], clause["color"]) for clause in caption["include"])
            for caption in captions(part, tag)
        }

    for tag in ("colors", "color_attr"):
        assert not contents("train", tag) & contents("test", tag)


def test_prompts_are_unique_and_short():
    every = [x["prompt"] for part in ("train", "test") for tag in TAGS for x in captions(part, tag)]
    assert len(set(every)) == len(every)
    assert max(len(prompt.split()) for prompt in every) == MAX_WORDS
    words = {
        part: {w for tag in TAGS for x in captions(part, tag) for w in x["prompt"].split()}
        for part in ("train", "test")
    }
    assert words["test"] <= words["train"] == set(vocabulary())


def test_committed_prompt_files_are_what_the_code_writes(tmp_path):
    write_metadata(tmp_path)
    for name in ("train_metadata.jsonl", "test_metadata.jsonl"):
        assert (DATASET_DIR / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("part", ["train", "test"])
def test_sampled_scenes_fit(part):
    rng = np.random.default_rng(0)
    for caption in metadata_lines(part):
        scene = sample_scene(caption, rng)
        assert scene_fits(scene, caption), (caption, scene)
        assert 1 <= len(scene.objects) <= MAX_OBJECTS


def test_free_colors_and_places_are_uniform():
    rng = np.random.default_rng(0)
    caption = captions("train", "counting")[0]
    objects = [item for _ in range(1500) for item in sample_scene(caption, rng).objects]
    for values, choices in (([x.color for x in objects], 6), ([x.cell for x in objects], 9)):
        shares = np.array(list(Counter(values).values())) / len(values)
        assert len(shares) == choices
        assert shares == pytest.approx(1 / choices, abs=0.03)


def test_corrupted_captions_describe_other_scenes():
    rng = np.random.default_rng(0)
    for caption in metadata_lines("train"):
        before = json.dumps(caption)
        assert not scene_fits(sample_scene(corrupt(caption, rng), rng), caption)
        assert json.dumps(caption) == before


@pytest.mark.parametrize(
    ("relation", "dx", "dy"),
    [("left of", -2, 1), ("right of", 2, -1), ("above", 0, -1), ("below", 1, 2)],
)
def test_relations(relation, dx, dy):
    assert relation_holds(relation, dx, dy)
    assert not relation_holds(relation, -dx, -dy)
    assert not relation_holds(relation, dy, dx)
    assert not relation_holds(relation, -1, -1), "a diagonal"
