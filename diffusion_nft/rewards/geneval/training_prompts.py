"""Training prompts of our own in GenEval's grammar (arXiv 2310.11513), as lines of metadata.

The grammar: one object, two objects, two to four of one object, an object in a colour, an object
beside another, two objects in two colours.  As in the benchmark nobody is coloured: the prompts
with colours leave out ``person``.  Unlike the benchmark's ("four benchs", "a brown skis") the
plurals are English.

The published training prompts mix the tags by lines, 7 : 5 : 3 : 1 : 1 : 0 (TAG_SHARES), more lines
than there are different prompts: 60,000 lines hold 17,647 of counting, where 80 names and three
counts make 240 prompts; likewise 24,706 of position of 12,640, 3530 of colors of 790, 3529 of
two_object of 3160.  So the share of a tag is filled by all its prompts in turn, which makes their
numbers of uses differ by one at most.  Two prompts are the same, as in the published set, if they
differ only in the order of the objects.  "A cup left of a bench" is then the same as "a bench left
of a cup", and it is the same scene as "a bench right of a cup": each pair of objects therefore
comes in one order only, with each of the four relations.
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

# Lines of each tag in the published training set, relative to each other.
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
PAIRS = ("skis", "scissors")  # plural words for what the detector sees as one object
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

    ``test``: lines of metadata from which to keep apart: no line has the ``scene`` of one of them.
    ``mix``: parts of each tag, met up to rounding.  Prompts repeat only where a tag has fewer
    than its share, and then evenly.  ValueError if ``num_prompts`` is not positive, if the mix
    is empty, or if ``test`` leaves a tag no prompt.
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
    """Writes training prompts, apart from the test prompts, into ``folder`` unless they are there;
    returns a line for the user.

    Raises FileExistsError if ``folder`` has other training prompts, ValueError as ``generate``.
    """
    target = folder / "train_metadata.jsonl"
    if files_of(folder, "test"):
        test = [prompt.metadata for prompt in checked_prompts(folder, "test")]
        apart = f"apart from the {len(test):,} test prompts"
    else:
        test = []
        apart = (
            "NOT kept apart from the test prompts, which are missing: once test_metadata.jsonl is "
            "there, delete this file and generate it again"
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
    """The prompts of ``split``; ValueError with file and line if one cannot be judged."""
    prompts = load_prompts(folder, split)
    (path,) = files_of(folder, split)
    for number, prompt in enumerate(prompts, start=1):
        try:
            check_metadata(prompt.metadata)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return prompts


def shares(num_prompts: int, mix: Mapping[str, int]) -> dict[str, int]:
    """Lines of each tag: the sum is ``num_prompts``; the largest remainders are rounded up.

    Where remainders are equal the tag named first comes first.
    """
    total = sum(mix.values())
    if total < 1 or min(mix.values()) < 0 or not set(mix) <= set(TAGS):
        raise ValueError(f"mix = {dict(mix)} must give parts of {', '.join(TAGS)}")
    counts = {tag: num_prompts * part // total for tag, part in mix.items()}
    by_remainder = sorted(mix, key=lambda tag: -(num_prompts * mix[tag] % total))
    for tag in by_remainder[: num_prompts - sum(counts.values())]:
        counts[tag] += 1
    return counts


def scene(metadata: Mapping[str, Any]) -> Hashable:
    """What ``metadata`` shows, whatever the order of the objects and which way round they stand.

    Equal for all prompts that put the same two objects side by side, or one above the other.
    """
    objects = sorted((o["class"], o["count"], o.get("color", "")) for o in metadata["include"])
    axes = sorted(AXES[o["position"][0]] for o in metadata["include"] if "position" in o)
    return tuple(objects), tuple(axes)


def with_article(words: str) -> str:
    """``words`` after a, or an before a vowel: each of GenEval's words sounds as it is spelt."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def one(name: str, color: str = "") -> str:
    """``name`` in the singular with its article: a cup, an orange cup, a pair of white skis."""
    words = f"{color} {name}".lstrip()
    return f"a pair of {words}" if name in PAIRS else with_article(words)


def several(name: str, count: int) -> str:
    """``name`` in the plural with its number, in words: three cups, two pairs of skis."""
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

    Two objects stand in the vocabulary's order here; which one a prompt names first is drawn.
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
    # The clause that the position refers to comes first, as in the benchmark.
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
        raise ValueError(f"the test prompts leave no {tag} prompt for training")
    return [prompts[i % len(prompts)] for i in range(share)]
