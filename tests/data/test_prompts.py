"""Prompt sets are read line by line; an epoch's prompts are a pure function of seed and epoch."""

import json
from collections import Counter
from pathlib import Path

import pytest

from diffusion_nft.data import prompts as data
from diffusion_nft.data.prompts import (
    Prompt,
    draw_lines,
    epoch_prompts,
    evaluated_lines,
    load_prompts,
    resolve_dataset,
    shard,
)

CATS = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}


def load_shapes_test_set() -> list[Prompt]:
    return load_prompts(Path(data.__file__).parents[2] / "dataset" / "shapes", "test")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """An empty dataset/ folder, and another folder to work in."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(data, "DATASET_ROOT", tmp_path / "dataset")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "dataset"


def write(folder: Path, **files: str | bytes) -> Path:
    """``folder`` with one file per split: text is a .txt, bytes a _metadata.jsonl."""
    folder.mkdir(exist_ok=True)
    for split, content in files.items():
        if isinstance(content, str):
            (folder / f"{split}.txt").write_text(content, encoding="utf-8", newline="")
        else:
            (folder / f"{split}_metadata.jsonl").write_bytes(content)
    return folder


def test_a_prompt_file_may_have_blank_lines_where_the_caller_says_so(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n \na dog\n\n")
    assert data.read_prompts(path, skip_blank=True) == [Prompt("a cat"), Prompt("a dog")]
    with pytest.raises(ValueError, match=r"prompts.txt, line 2: the line is empty"):
        data.read_prompts(path)


def test_name_and_path_resolve(root, tmp_path):
    folder = write(root / "mine", train="a cat\n")
    assert resolve_dataset("mine") == folder.resolve()
    assert resolve_dataset(str(folder)) == folder.resolve()
    assert resolve_dataset(folder) == folder.resolve()
    assert resolve_dataset("../dataset/mine") == folder.resolve()
    here = write(tmp_path / "elsewhere" / "here", train="a cat\n")
    assert resolve_dataset("./here") == here.resolve()


def test_a_bare_name_is_not_a_folder_of_the_working_directory(tmp_path):
    write(tmp_path / "elsewhere" / "here", train="a cat\n")
    with pytest.raises(ValueError, match=r"dataset = 'here': .*\(a folder here is \./here\)"):
        resolve_dataset("here")


@pytest.mark.parametrize("given", ["", "absent", "./absent", "/absent", "~/absent"])
def test_missing_dataset_lists_the_choices(given, root):
    write(root / "one", train="a cat\n")
    write(root / "two", train="a cat\n")
    with pytest.raises(ValueError, match="choose from one, two, or the path") as caught:
        resolve_dataset(given)
    assert str(caught.value).startswith(f"dataset = {given!r}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("geneval", "train_metadata.jsonl, test_metadata.jsonl"),
        ("ocr", "train.txt, test.txt"),
        ("pickscore", "train.txt, test.txt"),
        ("drawbench", "test.txt"),
    ],
)
def test_missing_published_dataset_says_where_it_comes_from(name, files):
    with pytest.raises(ValueError, match=rf"{files} of github.com/NVlabs/DiffusionNFT"):
        resolve_dataset(name)


def test_missing_and_doubled_split_files(root):
    write(root / "drawbench", test="a cat\n")
    with pytest.raises(
        ValueError, match=r"neither train\.txt nor train_metadata\.jsonl; the train"
    ):
        load_prompts("drawbench", "train")
    write(root / "twice", train="a cat\n")
    write(root / "twice", train=json.dumps(CATS).encode())
    with pytest.raises(ValueError, match=r"both train\.txt and train_metadata\.jsonl"):
        load_prompts("twice", "train")


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n \n"])
def test_text_file(root, end):
    write(root / "mine", test=f"a cat\n  two cats \na cat\n“straße”, 猫{end}")
    expected = ["a cat", "two cats", "a cat", "“straße”, 猫"]
    assert load_prompts("mine", "test") == [Prompt(text, {}) for text in expected]


def test_only_newlines_end_a_line(root):
    """U+2028, U+0085 and form feeds are line ends for str.splitlines, not for a text file."""
    write(root / "mine", test="a\u2028cat\r\na\x85dog\na\x0cpig\n")
    assert [p.text for p in load_prompts("mine", "test")] == ["a\u2028cat", "a\x85dog", "a\x0cpig"]


def test_byte_order_mark_is_no_part_of_the_first_prompt(root):
    write(root / "mine", test="\ufeffa cat\n")
    assert load_prompts("mine", "test") == [Prompt("a cat")]


def test_metadata_file(root):
    other = {"prompt": " a dog ", "n": 1}
    lines = "\n".join(json.dumps(item) for item in (CATS, other, CATS)) + "\n"
    write(root / "mine", train=lines.encode())
    first, second, third = load_prompts(root / "mine", "train")
    assert first == third == Prompt("two cats", CATS)
    assert second == Prompt("a dog", other)


def test_epoch_is_without_replacement():
    for epoch in range(20):
        chosen = epoch_prompts(range(50), 48, seed=42, epoch=epoch)
        assert len(set(chosen)) == 48
        assert set(chosen) <= set(range(50))


def test_epoch_is_a_pure_function_of_seed_and_epoch():
    """Golden: recorded once from torch 2.15's randperm on the CPU; resuming relies on it."""
    assert epoch_prompts(range(10), 6, seed=42, epoch=0) == [7, 1, 3, 2, 5, 0]
    assert epoch_prompts(range(10), 6, seed=42, epoch=1) == [1, 7, 4, 8, 3, 0]
    assert epoch_prompts(range(10), 6, seed=42, epoch=0) == [7, 1, 3, 2, 5, 0]
    assert epoch_prompts(range(10), 3, seed=42, epoch=0) == [7, 1, 3]
    assert epoch_prompts(range(10), 6, seed=43, epoch=0) != [7, 1, 3, 2, 5, 0]


def test_every_prompt_is_drawn_equally_often():
    """4000 epochs of 5 out of 20: each prompt is binomial(4000, 1/4), 1000 +- 27."""
    counts = Counter(
        i for epoch in range(4000) for i in epoch_prompts(range(20), 5, seed=0, epoch=epoch)
    )
    assert sorted(counts) == list(range(20))
    assert max(abs(count - 1000) for count in counts.values()) < 5 * 27.4


def test_more_groups_than_prompts_cycle_through_whole_permutations():
    chosen = epoch_prompts(range(4), 10, seed=1, epoch=2)
    assert sorted(chosen[:4]) == sorted(chosen[4:8]) == [0, 1, 2, 3]
    assert sorted(Counter(chosen).values()) == [2, 2, 3, 3]
    orders = [tuple(epoch_prompts(range(4), 8, seed=1, epoch=e)) for e in range(20)]
    assert any(order[:4] != order[4:] for order in orders)


@pytest.mark.parametrize("num_items", [0, 1, 5, 16, 1152])
def test_shards_are_contiguous_and_nearly_equal(num_items):
    for world_size in range(1, 17):
        shares = [shard(num_items, rank, world_size) for rank in range(world_size)]
        assert [i for share in shares for i in share] == list(range(num_items))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [list(shard(7, rank, 3)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [list(shard(1, rank, 3)) for rank in range(3)] == [[], [], [0]]


@pytest.mark.parametrize("tagged", [False, True])
def test_lines_are_drawn_from_all_of_a_sorted_file(root, tagged):
    # As GenEval's: tag by tag, four lines a prompt.
    each = [(tag, i) for tag in "abcdef" for i in range(90) for _ in "1234"]
    rows = [{"tag": tag, "prompt": f"{tag} {i}"} for tag, i in each]
    if tagged:
        write(root / "sorted", test="\n".join(map(json.dumps, rows)).encode())
    else:
        write(root / "sorted", test="\n".join(row["prompt"] for row in rows))
    prompts = load_prompts("sorted", "test")
    chosen, lines = evaluated_lines("sorted", 128)
    assert chosen == [prompts[line] for line in lines]
    assert lines == sorted(set(lines)) and len(lines) == 128
    assert (chosen, lines) == evaluated_lines("sorted", 128)
    counts = Counter(prompt.text[0] for prompt in chosen)
    assert len(counts) == 6 and min(counts.values()) >= (20 if tagged else 8)
    assert set(Counter(prompt.text for prompt in chosen).values()) <= {2, 4}
    assert evaluated_lines("sorted", 0) == (prompts, list(range(len(prompts))))
    # Odd numbers break a pair; more lines than there are come to all.
    assert len(evaluated_lines("sorted", 7)[1]) == 7
    assert len(evaluated_lines("sorted", 10_000)[1]) == len(prompts)


def test_tags_have_equal_shares_however_often_they_repeat_a_prompt():
    prompts = load_shapes_test_set()
    for number in (24, 60, 240):
        tags = Counter(prompts[i].metadata["tag"] for i in draw_lines(prompts, number, together=2))
        assert len(tags) == 6 and max(tags.values()) - min(tags.values()) <= 2
    # An exhausted tag leaves its share to the others.
    few = [Prompt(f"{i}", {"tag": "few"}) for i in range(3)]
    many = [Prompt(f"{i}", {"tag": "many"}) for i in range(3, 40)]
    assert {0, 1, 2} < set(draw_lines([*few, *many], 20))


def test_lines_to_look_at_are_of_many_prompts():
    prompts = [Prompt(f"{i}") for i in range(40) for _ in range(5)]
    shown = draw_lines(prompts, 16)
    assert len({prompts[line].text for line in shown}) > 11
    assert draw_lines(prompts, 0) == [] == draw_lines([], 3)
