"""Prompt files: empty, binary, broken, huge, in odd Unicode; and what the built-in model makes of
odd prompts.
"""

import itertools
import json
import time
from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict

from diffusion_nft.data.prompts import load_prompts
from diffusion_nft.images import Images
from diffusion_nft.rewards import check_prompts
from diffusion_nft.tracking.grids import image_grid
from diffusion_nft.validation.inputs import load_checked_prompts
from tests.reliability.bad_inputs import Case, parametrized, train, watch
from tests.reliability.test_bad_config import config_with

LINE = {"prompt": "a circle", "include": [{"class": "circle", "count": 1}], "tag": "single_object"}
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def line(**changes: object) -> bytes:
    """A line of the built-in world with some values changed; None takes a key out."""
    return json.dumps({k: v for k, v in (LINE | changes).items() if v is not None}).encode()


def clause(**changes: object) -> bytes:
    """A line whose one object has other values."""
    first = {k: v for k, v in ({"class": "circle", "count": 1} | changes).items() if v is not None}
    return line(include=[first])


GOOD = line()
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "BOM alone": (b"\xef\xbb\xbf", "the file is empty"),
    "line ends alone": (b"\r\n\n \n", "the file is empty"),
    "an image": (PNG, "line 1: not UTF-8 (byte 1)"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "line 1: not UTF-8 (byte 1)"),
    "UTF-16 without BOM": (GOOD.decode().encode("utf-16-le"), "line 1: not JSON"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", "line 1: not UTF-8 (byte 2)"),
    "NULs of a crash": (GOOD + b"\n" + b"\0" * 4096, "line 2: not JSON"),
    "cut off": (GOOD[:20], "line 1: not JSON"),
    "a pickle": (b"\x80\x04\x95", "line 1: not UTF-8 (byte 1)"),
    "text": (b"a circle", "line 1: not JSON"),
    "an empty line": (GOOD + b"\n\n" + GOOD, "line 2: the line is empty"),
    "a list": (b"[]", "line 1: must be a JSON object, not list"),
    "a number": (b"3", "line 1: must be a JSON object, not int"),
    "null": (b"null", "line 1: must be a JSON object, not NoneType"),
    "nothing in it": (b"{}", 'line 1: no "prompt"; the keys are none'),
    "no prompt": (b'{"Prompt": "x"}', 'no "prompt"; the keys are Prompt'),
    "prompt of a number": (line(prompt=3), '"prompt" must be a string, not int'),
    "negative prompt of a number": (
        line(negative_prompt=3),
        '"negative_prompt" must be a string, not int',
    ),
    "prompt of a list": (line(prompt=["a"]), '"prompt" must be a string, not list'),
    "empty prompt": (line(prompt=""), '"prompt" is empty'),
    "prompt of spaces": (line(prompt=" \u3000\t"), '"prompt" is empty'),
    "prompt with NUL": (line(prompt="a\0b"), "a NUL (character 2)"),
    "half a pair": (line(prompt="a \ud83d circle"), "half a surrogate pair (character 3)"),
    "the other half": (line(prompt="\ude00"), "half a surrogate pair (character 1)"),
    "half a pair elsewhere": (line(tag="\ud800"), "a text has half a surrogate pair"),
    "half a pair as a key": (line(**{"\udfff": 1}), "a text has half a surrogate pair"),
    "NaN": (line(weight=float("nan")), "NaN and Infinity are not valid JSON numbers"),
    "Infinity": (line(weight=[-float("inf")]), "NaN and Infinity are not valid JSON numbers"),
    "1e999": (GOOD[:-1] + b', "weight": 1e999}', "NaN and Infinity are not valid JSON numbers"),
    "5000 digits": (GOOD[:-1] + b', "n": ' + b"9" * 5000 + b"}", "line 1: Exceeds the limit"),
    "depth 10^5": (b'{"a":' * 100_000, "line 1: nested too deeply"),
    "raw control character": (b'{"prompt": "a\x01b"}', "not JSON: Invalid control character"),
    "overlong UTF-8": (b'{"prompt": "\xc0\xaf"}', "not UTF-8 (byte 13)"),
    "raw surrogate": (b'{"prompt": "\xed\xa0\x80"}', "not UTF-8 (byte 13)"),
    "single quotes": (b"{'prompt': 'x'}", "not JSON: Expecting property name"),
    "two on a line": (GOOD + GOOD, "not JSON: Extra data"),
}  # fmt: skip
UNFIT: dict[str, tuple[bytes, str]] = {
    "no objects": (line(include=None), "must name at least one object"),
    "objects of text": (line(include="circle"), '"include" must be a list of objects'),
    "an unknown tag": (line(tag="colours"), "tag 'colours' is unknown"),
    "another world's object": (clause(**{"class": "zebra"}), "class 'zebra' is unknown"),
    "an object of a list": (clause(**{"class": []}), "class [] is unknown"),
    "an object without a count": (clause(count=None), "count None must be a positive integer"),
    "no such number": (clause(count=0), "count 0 must be a positive integer"),
    "half an object": (clause(count=0.5), "count 0.5 must be a positive integer"),
    "a count of truth": (clause(count=True), "count True must be a positive integer"),
    "an unknown colour": (clause(color="mauve"), "color 'mauve' is unknown"),
    "a colour of null": (GOOD.replace(b'"count"', b'"color": null, "count"'), "color None"),
    "a position of text": (clause(position="above"), "must be [relation, index"),
    "a position of itself": (clause(position=["above", 0]), "index of an earlier clause"),
    "an unknown relation": (clause(position=["near", 0]), "position 'near' is unknown"),
    "an exclusion of text": (line(exclude=["circle"]), '"exclude" must be a list of objects'),
}
# One reader reads both splits: each case is of one of them, in turns.
CASES = [
    Case(f"{split}: {name}", "start", words, (split, content))
    for split, (name, (content, words)) in zip(
        itertools.cycle(("train", "test")), (BROKEN | UNFIT).items(), strict=False
    )
]


def prompt_set(folder: Path, **contents: bytes) -> str:
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}_metadata.jsonl").write_bytes(contents.get(split, GOOD))
    return str(folder)


@parametrized(CASES)
def test_a_bad_prompt_file_is_refused_with_its_line(case, tmp_path, monkeypatch):
    split, content = case.given
    dataset = prompt_set(tmp_path / "prompts", **{split: content})
    seen = watch(monkeypatch)
    config = config_with("dataset", dataset, str(tmp_path / "run"))
    message = train(config, seen, monkeypatch)
    seen.expect(case.moment)
    assert case.words in message and len(message.splitlines()) == 1 and len(message) < 1000
    assert message.startswith("ValueError: ")
    assert not (tmp_path / "run").exists()


def test_a_text_that_the_engine_cannot_read_is_refused_with_file_and_line(tmp_path):
    (tmp_path / "train.txt").write_text('a sign "open"')
    lines = [f'a sign "{"open" if number < 6 else "Открыто"} {number}"' for number in range(1, 21)]
    (tmp_path / "test.txt").write_text("\n".join(lines))
    config = config_with("dataset", str(tmp_path), str(tmp_path / "run"))
    config.reward_fn = ConfigDict({"ocr": 1.0})
    config.eval.num_prompts = 5  # which are lines anywhere in the file
    where = r"/test\.txt: the ocr reward cannot score line (?:[6-9]|1\d|20): letters that "
    with pytest.raises(ValueError, match=where):
        load_checked_prompts(config)
    # A server's engine, or PaddleOCR, may have the letters.
    config.reward_options = ConfigDict({"ocr": {"backend": "paddleocr"}})
    load_checked_prompts(config)
    config.reward_options = ConfigDict()
    config.reward_servers = ConfigDict({"ocr": ("http://127.0.0.1:1",)})
    load_checked_prompts(config)


TEXTS: dict[str, tuple[bytes, str]] = {
    "NUL": (b"a cat\na\0cat\n", "line 2: a NUL (character 2): this is not UTF-8 text"),
    "UTF-16 without BOM": ("a cat".encode("utf-16-le"), "line 1: a NUL (character 2)"),
    "an image": (PNG, "line 1: not UTF-8"),
    "zeros": (b"\0" * 100, "line 1: a NUL (character 1)"),
    "Latin-1": ("café".encode("latin-1"), "line 1: not UTF-8 (byte 4)"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_bad_text_file_is_refused_with_its_line(name, tmp_path):
    data, words = TEXTS[name]
    (tmp_path / "train.txt").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        load_prompts(tmp_path, "train")
    assert words in str(caught.value) and str(tmp_path / "train.txt") in str(caught.value)


def test_a_folder_in_place_of_a_file_is_no_split(tmp_path):
    (tmp_path / "train.txt").mkdir()
    with pytest.raises(ValueError, match="has neither"):
        load_prompts(tmp_path, "train")


ODD = {
    "bidi": "\u202ea red circle\u202c",
    "combining": "a\u0301\u0308\u0327 circle" + "\u0301" * 300,
    "emoji": "\U0001f469\u200d\U0001f680 \U0001f3f3\ufe0f\u200d\U0001f308",
    "zero width": "\u200b\u200d\ufeff",
    "CR inside": "a\rcircle",
    "separators": "a\u2028circle\u0085and\x0ca square",
    "control": "a \x1b[31mred\x07 circle",
    "private use": "\ue000\U0010ffff",
    "right to left": "דג אדום",
    "one letter": "a",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_unicode_is_a_prompt_as_any_other(name, tmp_path, shapes_model):
    (tmp_path / "test.txt").write_bytes(b"\xef\xbb\xbf" + f"{ODD[name]}\r\na cat\r\n".encode())
    first, second = load_prompts(tmp_path, "test")
    assert (first.text, second.text) == (ODD[name].strip(), "a cat")
    cond = shapes_model.encode([first.text])
    assert cond.prompt_embeds.isfinite().all() and cond.pooled.isfinite().all()
    assert (
        image_grid(Images.from_float(torch.zeros(1, 3, 48, 48)), [first.text], columns=1).width > 48
    )


def seconds(run) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


@pytest.mark.parametrize("unit", ["a", "e\u0301"])
def test_a_prompt_of_100000_characters_is_truncated_in_linear_time(unit, tmp_path, shapes_model):
    text = (unit * 100_000)[:100_000].strip()
    (tmp_path / "test.txt").write_bytes(text.encode())
    (prompt,) = load_prompts(tmp_path, "test")
    assert prompt.text == text
    long = shapes_model.encode([text])
    # The text length of the model, as for a prompt that is a little too long.
    little = shapes_model.encode(["a red circle " * 9])
    assert long.prompt_embeds.shape == little.prompt_embeds.shape
    assert long.prompt_embeds.isfinite().all()
    short = min(seconds(lambda: shapes_model._encode([text[: len(text) // 8]])) for _ in range(2))
    # Eight times the text; 64 times the work if it were quadratic.
    assert seconds(lambda: shapes_model._encode([text])) < 24 * short + 0.2
    # A caption shows four lines of it.
    assert (
        seconds(lambda: image_grid(Images.from_float(torch.zeros(1, 3, 48, 48)), [text], columns=1))
        < 1
    )


def test_the_ocr_reward_names_a_long_prompt_by_its_beginning():
    with pytest.raises(ValueError, match=r"line 1: .*: 'a{50}") as caught:
        check_prompts(["ocr"], ["a" * 100_000], [{}])
    assert len(str(caught.value)) < 1000
