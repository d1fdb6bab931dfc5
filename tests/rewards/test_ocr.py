import importlib.metadata
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from rewards.conftest import CPU
from torch import Tensor

from diffusion_nft.rewards import check_prompts, ocr
from diffusion_nft.rewards.ocr import (
    OcrReward,
    engine_letters,
    levenshtein,
    normalized,
    target_text,
    text_score,
)


@pytest.mark.parametrize(
    ("found", "target", "distance"),
    [
        ("", "", 0),
        ("abc", "abc", 0),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("intention", "execution", 5),
        ("saturday", "sunday", 3),
    ],
)
def test_levenshtein(found, target, distance):
    assert levenshtein(found, target) == levenshtein(target, found) == distance


@pytest.mark.parametrize(
    ("found", "target", "score"),
    [
        ("hello", "hello", 1.0),
        ("HEL LO", "he llO", 1.0),
        ("say hello world", "hello", 1.0),  # contained: nothing is lost by more text
        ("hallo", "hello", 0.8),
        ("helo", "hello", 0.8),
        ("hxllx", "hello", 0.6),
        ("", "hello", 0.0),
        ("xyzxyzxyzxyz", "hello", 0.0),  # more edits than characters: no score below 0
        ("open24", "open 25", 1 - 1 / 6),
    ],
)
def test_text_score(found, target, score):
    assert text_score(found, target) == pytest.approx(score)


def test_ascii_loses_its_case_and_its_spaces_only():
    """As published: ``text.replace(" ", "").lower()``."""
    ascii = "".join(map(chr, range(0x20, 0x7F)))
    assert normalized(ascii) == ascii.replace(" ", "").lower()


@pytest.mark.parametrize(
    ("found", "target"),
    [
        ("Hello", "\u200bHel\u00adlo\ufeff"),  # zero-width space, soft hyphen, byte-order mark
        ("OPEN 24", "OPEN\u00a024\u2009\t\n"),
        ("Caf\u00e9", "Cafe\u0301"),
        ("Cafe\u0301", "CAF\u00c9"),
        ('It\'s "so" open - now...', "It’s “so” open – now…"),
        ("5'10''", "5′10″"),
        ("Room 131/3", "Room 13⅓"),
        ("OPEN", "ＯＰＥＮ"),
        ("fish", "ﬁsh"),
        ("iZMiR", "İZMİR"),
        ("I ❤ NY", "I ❤\ufe0f NY"),
    ],
)
def test_what_looks_alike_is_the_same(found, target):
    assert text_score(found, target) == text_score(target, found) == 1.0


def test_letters_keep_their_accents():
    assert text_score("cafe", "café") == 0.75


def test_the_target_is_between_the_first_two_double_quotes():
    assert target_text('a sign that reads "Gas Next Exit" and "No Entry"') == "Gas Next Exit"
    assert target_text('"a\nb" on a mug') == "a\nb"


def test_typographic_quotes_serve_where_there_is_no_pair_of_straight_ones():
    assert target_text("a sign that reads “It’s open” and “closed”") == "It’s open"
    assert target_text("ein Schild: „Hallo“") == "Hallo"
    assert target_text('a 5" sign that reads “open”') == "open"
    assert target_text('“the "open" sign”') == "open"
    assert target_text('a sign "say “hi” now"') == "say “hi” now"


@pytest.mark.parametrize(
    "prompt",
    ["a cat", 'a sign "open', 'a sign ""', 'a "\u00a0\u200b"', "a “open", "“” a", "'open'"],
)
def test_a_prompt_without_a_quoted_text_is_refused(prompt):
    with pytest.raises(ValueError, match='no text in "double quotes": '):
        target_text(prompt)


def test_check_prompts_names_the_lines():
    check_prompts(["ocr"], ['a "b"', 'c "d" e'], [{}, {}])
    with pytest.raises(ValueError, match=r"line 2: .*: 'a cat'; line 3: .*: 'a dog'$"):
        check_prompts(["ocr"], ['a "b"', "a cat", "a dog"], [{}] * 3)
    with pytest.raises(ValueError, match=r"line 3: .*: 'x'; and 5 more: lines 4, 5, 6, 7, 8$"):
        check_prompts(["ocr"], ["x"] * 8, [{}] * 8)
    with pytest.raises(ValueError, match=r"cannot score line 31: .*: 'a cat'$"):
        check_prompts(["ocr"], ['a "b"', "a cat"], [{}] * 2, lines=[10, 30])
    with pytest.raises(ValueError) as caught:
        check_prompts(["ocr"], ["x"] * 2000, [{}] * 2000)
    assert "and 1997 more: lines 4, 5" in str(caught.value) and len(str(caught.value)) < 2000


@pytest.fixture
def abc(monkeypatch):
    """An engine that can read a, b and c."""
    monkeypatch.setitem(ocr.LETTERS, "rapidocr", lambda: frozenset("abc"))


def test_letters_that_the_engine_lacks_are_refused_with_the_line(abc):
    check_prompts(["ocr"], ['a sign "A\u200b cab"'], [{}])
    with pytest.raises(ValueError, match=r"line 2: .*cannot read \(t d\): '\"taddb\"'$"):
        check_prompts(["ocr"], ['"abc"', '"taddb"'], [{}] * 2)


def test_letters_are_those_of_the_engine_that_scores(abc):
    """Of a server's, and of PaddleOCR's, nothing is known."""
    for where in (
        {"options": {"ocr": {"backend": "paddleocr"}}},
        {"reward_servers": {"ocr": ("http://127.0.0.1:1",)}},
    ):
        check_prompts(["ocr"], ['"xyz"'], [{}], **where)
    with pytest.raises(ValueError, match="line 1: "):
        check_prompts(
            ["ocr"], ['"xyz"'], [{}], options={"ocr": {"threads": 2}}, reward_servers={"ocr": ()}
        )
    with pytest.raises(ValueError, match="no text"):
        check_prompts(["ocr"], ["a cat"], [{}], reward_servers={"ocr": ("http://127.0.0.1:1",)})


def image_of(text: str, blur: float = 0.0) -> Tensor:
    """Black ``text`` on a light image; ``[1, 3, 512, 512]``."""
    image = Image.new("RGB", (512, 512), (235, 230, 220))
    pen = ImageDraw.Draw(image)
    pen.text((256, 256), text, (20, 20, 40), ImageFont.load_default(56), anchor="mm")
    image = image.filter(ImageFilter.GaussianBlur(blur))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


@pytest.fixture(scope="module")
def reward():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return OcrReward(device=CPU, threads=1)


def test_rapidocr_reads_what_is_there(reward):
    texts = ("OPEN 24 HOURS", "GOOD\nMORNING", "Hello World", "Hallo")
    blurred = image_of("Hello World", blur=20), torch.zeros(1, 3, 512, 512)
    images = torch.cat([*map(image_of, texts), *blurred])
    asked = ["Open 24 Hours", "Good Morning", "hello world", *["hello"] * 3]
    scores = reward(images, [f'a sign "{text}"' for text in asked], [{}] * 6).scores.tolist()
    assert scores[:3] == [1.0] * 3 and scores[3] == pytest.approx(0.8)
    assert scores[4] < 0.5 and scores[5] == 0.0


def test_rapidocr_knows_its_letters(reward):
    assert {"a", "z", "0", "ł", "ç", "'", "-"} <= reward.letters == engine_letters("rapidocr")
    for text in ("Łódź", "Çeşme", "13⅓ “floors” – it’s O₂ …"):
        check_prompts(["ocr"], [f'a sign "{text}"'], [{}])
    for text in ("Привет", "Ελλάδα", "Việt Nam"):
        with pytest.raises(ValueError, match="letters that the OCR engine cannot read"):
            check_prompts(["ocr"], [f'a sign "{text}"'], [{}])


def test_a_server_refuses_letters_that_its_engine_lacks(reward):
    with pytest.raises(ValueError, match=r"cannot read \(п р и\): 'a sign"):
        reward(image_of("x"), ['a sign "При"'], [{}])


def test_prompts_are_checked_before_anything_is_read(reward):
    with pytest.raises(ValueError, match="\"double quotes\": 'a cat'"):
        reward(image_of("x").repeat(2, 1, 1, 1), ['a "b"', "a cat"], [{}] * 2)
    with pytest.raises(ValueError, match="1 images but 2 prompts"):
        reward(image_of("x"), ['a "b"'] * 2, [{}] * 2)


def test_a_failing_engine_is_an_error_and_no_zero(reward, monkeypatch):
    def fail(image):
        raise RuntimeError("the engine failed")

    monkeypatch.setattr(reward, "read", fail)
    with pytest.raises(RuntimeError, match="the engine failed"):
        reward(image_of("x"), ['a "b"'], [{}])


class Paddle2:
    """The documented interface of PaddleOCR 2.x, as far as the reward uses it."""

    def __init__(self, *, use_angle_cls, lang, use_gpu, show_log, cpu_threads):
        assert (use_angle_cls, lang, use_gpu) == (False, "en", False)

    def ocr(self, image, cls):
        assert image.shape == (512, 512, 3) and image.dtype == np.uint8 and cls is False
        if image.max() == 0:
            return [None]
        box = [[0, 0], [9, 0], [9, 9], [0, 9]]
        return [[[box, ("Hello ", 0.9)], [box, ("noise", 0.0)], [box, ("World", 0.8)]]]


class Paddle3:
    """The documented interface of PaddleOCR 3.x, as far as the reward uses it."""

    def __init__(self, *, lang, device, cpu_threads, **switches):
        assert (lang, device) == ("en", "cpu")
        assert switches == {
            "use_doc_orientation_classify": False,
            "use_doc_unwarping": False,
            "use_textline_orientation": False,
        }

    def predict(self, image):
        assert image.shape == (512, 512, 3) and image.dtype == np.uint8
        if image.max() == 0:
            return [{"rec_texts": [], "rec_scores": []}]
        return [{"rec_texts": ["Hello ", "noise", "World"], "rec_scores": [0.9, 0.0, 0.8]}]


@pytest.mark.parametrize(("version", "engine"), [("2.9.1", Paddle2), ("3.1.0", Paddle3)])
def test_both_generations_of_paddleocr(monkeypatch, version, engine):
    module = types.ModuleType("paddleocr")
    monkeypatch.setattr(module, "PaddleOCR", engine, raising=False)
    monkeypatch.setitem(sys.modules, "paddleocr", module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    reward = OcrReward(device=CPU, backend="paddleocr", threads=1)
    images = torch.cat([image_of("x"), torch.zeros(1, 3, 512, 512)])
    scores = reward(images, ['a mug "hello world"'] * 2, [{}] * 2).scores
    assert scores.tolist() == [1.0, 0.0]
