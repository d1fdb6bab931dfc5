"""Generated training prompts in GenEval's grammar (arXiv 2310.11513), as lines of metadata.

The grammar: one object, two objects, two to four of one object, an object in a colour, an object
next to another, two objects in two colours.  As in the benchmark, prompts with colours exclude
``person``.  Unlike the benchmark's ("four benchs", "a brown skis"), plurals are correct English.

The published training prompts mix the tags by lines, 7 : 5 : 3 : 1 : 1 : 0 (TAG_SHARES), and repeat
prompts: of 60,000 lines, 17,647 are counting, with 240 different prompts (80 names, three counts);
24,706 are position (12,640 prompts), 3530 colors (790), 3529 two_object (3160).  The share of a tag
therefore cycles through all its prompts.  Two prompts are the same, as in the published set, if
they differ only in the order of the objects.  "A cup left of a bench" is then the same as "a bench
left of a cup", and it is the same scene as "a bench right of a cup": each pair of objects therefore
has one order, with each of the four relations.
"""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import torch

from diffusion_nft.data.prompts import Prompt, files_of, load_prompts
from diffusion_nft.randomness import generator
from diffusion_nft.rewards.geneval.vocabulary import (
    COLORS,
    OBJECT_NAMES,
    RELATIONS,
    TAGS,
    check_metadata,
)
from diffusion_nft.utils.files import write_atomically

# Relative number of lines per tag in the published training set.
TAG_SHARES: dict[str, int] = {
    "position": 7,
    "counting": 5,
    "color_attr": 3,
    "colors": 1,
    "two_object": 1,
    "single_object": 0,
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
IRREGULAR_PLURALS = {
    "person": "people",
    "sheep": "sheep",
    "knife": "knives",
    "broccoli": "broccoli",
    "computer mouse": "computer mice",
}
PAIRS = ("skis", "scissors")  # plural words, but one object for the detector
AXES = {"left of": "across", "right of": "across", "above": "up", "below": "up"}

PromptLine = dict[str, Any]


def generate(
    num_prompts: int,
    *,
    seed: int,
    test: Iterable[Mapping[str, Any]] = (),
    mix: Mapping[str, int] = TAG_SHARES,
) -> list[PromptLine]:
    """``num_prompts`` lines of metadata in random order, a pure function of the arguments.

    ``test``: lines of metadata whose ``scene`` is excluded.  ``mix``: relative number of lines per
    tag, exact up to rounding.  If a tag has fewer prompts than lines, they repeat evenly.  Raises
    ValueError if ``num_prompts`` is not positive, if the mix is empty, or if ``test`` excludes all
    prompts of a tag.
    """
    if num_prompts < 1:
        raise ValueError(f"num_prompts = {num_prompts} must be at least 1")
    taken = {scene(line) for line in test}
    lines: list[PromptLine] = []
    for tag, share in shares(num_prompts, mix).items():
        lines += _draw(tag, share, taken, seed)
    order = torch.randperm(num_prompts, generator=generator(seed, "geneval prompts", "lines"))
    return [lines[index] for index in order.tolist()]


def write_training_prompts(folder: Path, num_prompts: int, seed: int) -> str:
    """Writes training prompts that exclude the test prompts into ``folder``, unless they exist.

    Returns a message for the user.  Raises FileExistsError if ``folder`` has other training
    prompts, and ValueError as ``generate``.
    """
    target = folder / "train_metadata.jsonl"
    if files_of(folder, "test"):
        test = [prompt.metadata for prompt in checked_prompts(folder, "test")]
        apart = f"apart from the {len(test):,} test prompts"
    else:
        test = []
        apart = (
            "NOT kept apart from the test prompts, which are missing: once test_metadata.jsonl "
            "exists, delete this file and generate it again"
        )
    lines = generate(num_prompts, seed=seed, test=test)
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    how, found = "already there", files_of(folder, "train")
    if found and (found != [target] or target.read_bytes() != content):
        raise FileExistsError(f"{found[0]} is there and kept: delete it to generate another")
    if not found:
        how = "written"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content)
    return f"{target} {how}, {num_prompts:,} prompts of seed {seed}, {apart}"


def checked_prompts(folder: Path, split: str) -> list[Prompt]:
    """The prompts of ``split``; ValueError with file and line for one that cannot be scored."""
    prompts = load_prompts(folder, split)
    (path,) = files_of(folder, split)
    for number, prompt in enumerate(prompts, start=1):
        try:
            check_metadata(prompt.metadata)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return prompts


def shares(num_prompts: int, mix: Mapping[str, int]) -> dict[str, int]:
    """Lines per tag, with sum ``num_prompts``; the largest remainders, in order, round up."""
    total = sum(mix.values())
    if total < 1 or min(mix.values()) < 0 or not set(mix) <= set(TAGS):
        raise ValueError(f"mix = {dict(mix)} must give parts of {', '.join(TAGS)}")
    counts = {tag: num_prompts * part // total for tag, part in mix.items()}
    by_remainder = sorted(mix, key=lambda tag: -(num_prompts * mix[tag] % total))
    for tag in by_remainder[: num_prompts - sum(counts.values())]:
        counts[tag] += 1
    return counts


def scene(metadata: Mapping[str, Any]) -> Hashable:
    """Key of the scene of ``metadata``, independent of the order of the objects.

    Equal for all prompts with the same two objects side by side, or one above the other.
    """
    objects = sorted((o["class"], o["count"], o.get("color", "")) for o in metadata["include"])
    axes = sorted(AXES[o["position"][0]] for o in metadata["include"] if "position" in o)
    return tuple(objects), tuple(axes)


def with_article(words: str) -> str:
    """``words`` after "a" or "an", by the first letter, which suffices for GenEval's words."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def one(name: str, color: str = "") -> str:
    """Singular with article: a cup, an orange cup, a pair of white skis."""
    words = f"{color} {name}".lstrip()
    return f"a pair of {words}" if name in PAIRS else with_article(words)


def several(name: str, count: int) -> str:
    """Plural with number: three cups, two pairs of skis."""
    if name in PAIRS:
        plural = f"pairs of {name}"
    elif name in IRREGULAR_PLURALS:
        plural = IRREGULAR_PLURALS[name]
    else:
        plural = name + ("es" if name.endswith(("s", "sh", "ch")) else "s")
    return f"{NUMBERS[count]} {plural}"


@dataclass(frozen=True)
class TagRule:
    """The prompts of a tag: ``write(objects, detail)`` for each of ``objects`` and ``details``.

    Pairs of objects are in the vocabulary's order; a prompt's order is drawn.
    """

    objects: tuple[tuple[str, ...], ...]
    details: tuple[Any, ...]
    write: Callable[[tuple[str, ...], Any], PromptLine]


def _single_object(objects: tuple[str, ...], detail: None) -> PromptLine:
    (name,) = objects
    return _line("single_object", [_clause(name)], one(name))


def _two_object(objects: tuple[str, ...], detail: None) -> PromptLine:
    first, second = objects
    return _line("two_object", [_clause(first), _clause(second)], f"{one(first)} and {one(second)}")


def _counting(objects: tuple[str, ...], count: int) -> PromptLine:
    (name,) = objects
    too_many = [_clause(name, count + 1)]
    return _line("counting", [_clause(name, count)], several(name, count), exclude=too_many)


def _colors(objects: tuple[str, ...], color: str) -> PromptLine:
    (name,) = objects
    return _line("colors", [_clause(name, color=color)], one(name, color))


def _position(objects: tuple[str, ...], relation: str) -> PromptLine:
    # The target clause of the position comes first, as in the benchmark.
    placed, target = objects
    include = [_clause(target), _clause(placed, position=[relation, 0])]
    return _line("position", include, f"{one(placed)} {relation} {one(target)}")


def _color_attr(objects: tuple[str, ...], colors: tuple[str, str]) -> PromptLine:
    pairs = list(zip(objects, colors, strict=True))
    include = [_clause(name, color=color) for name, color in pairs]
    return _line("color_attr", include, " and ".join(one(name, color) for name, color in pairs))


def _line(tag: str, include: list[PromptLine], words: str, **more: Any) -> PromptLine:
    return {"tag": tag, "include": include, **more, "prompt": f"a photo of {words}"}


def _clause(name: str, count: int = 1, **more: Any) -> PromptLine:
    return {"class": name, "count": count, **more}


_THINGS = tuple(name for name in OBJECT_NAMES if name != "person")
TAG_RULES: dict[str, TagRule] = {
    "single_object": TagRule(tuple(combinations(OBJECT_NAMES, 1)), (None,), _single_object),
    "two_object": TagRule(tuple(combinations(OBJECT_NAMES, 2)), (None,), _two_object),
    "counting": TagRule(tuple(combinations(OBJECT_NAMES, 1)), tuple(NUMBERS), _counting),
    "colors": TagRule(tuple(combinations(_THINGS, 1)), COLORS, _colors),
    "position": TagRule(tuple(combinations(OBJECT_NAMES, 2)), RELATIONS, _position),
    "color_attr": TagRule(
        tuple(combinations(_THINGS, 2)), tuple(permutations(COLORS, 2)), _color_attr
    ),
}


def _draw(tag: str, share: int, taken: set[Hashable], seed: int) -> list[PromptLine]:
    """``share`` lines of ``tag`` whose scenes are not ``taken``."""
    rule, draws = TAG_RULES[tag], generator(seed, "geneval prompts", tag)
    turned = torch.randint(2, (len(rule.objects),), generator=draws).tolist()
    order = torch.randperm(len(rule.objects) * len(rule.details), generator=draws).tolist()
    prompts: list[PromptLine] = []
    for index in order:
        if len(prompts) == share:
            break
        which, detail = divmod(index, len(rule.details))
        objects = rule.objects[which][::-1] if turned[which] else rule.objects[which]
        line = rule.write(objects, rule.details[detail])
        if scene(line) not in taken:
            prompts.append(line)
    if share and not prompts:
        raise ValueError(f"the test prompts exclude all {tag} prompts")
    return [prompts[i % len(prompts)] for i in range(share)]
