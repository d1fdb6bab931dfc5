"""Every command of the README, the docs and the presets is one that the scripts accept."""

import argparse
import re
import shlex
from itertools import chain

import pytest

from diffusion_nft.validation.config_files import load_file
from diffusion_nft.validation.schema import SCHEMA, SECTIONS
from tests.launch import ROOT
from tests.scripts.in_process import flags_of, script

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
PRESETS = sorted(ROOT.glob("config/*.py"))
STARTS = re.compile(r"(torchrun|python|make)\s")
BLOCK = re.compile(r"^ *```(?:bash|sh)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    ((?:torchrun|python) .*)$", re.MULTILINE)


def commands(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Commands in the blocks of ``text``; continued lines are joined."""
    joined = "\n".join(pattern.findall(text)).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if STARTS.match(line.strip())]


FOUND = list(
    dict.fromkeys(
        chain(
            *(commands(path.read_text("utf-8"), BLOCK) for path in PAGES),
            *(commands(path.read_text("utf-8"), INDENTED) for path in PRESETS),
        )
    )
)


class Parsed(Exception):
    """The flags are valid."""


def check(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises an error, or SystemExit, unless the program of ``command`` accepts its arguments."""
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        rules = (ROOT / "Makefile").read_text()
        assert all(f"\n{target}:" in rules for target in words if "=" not in target), command
        return
    files = [word for word in words if word.endswith(".py") and "/" in word]
    if not files or not files[0].startswith(("scripts/", "tests/")):
        return
    assert (ROOT / files[0]).is_file(), command
    flags = words[words.index(files[0]) + 1 :]
    if "/train_nft" in files[0]:
        return check_training(flags)
    if files[0].startswith("scripts/"):
        parse = argparse.ArgumentParser.parse_args

        def stop(*args: object, **options: object) -> None:
            parse(*args, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        # This machine may have no GPU.
        here = [re.sub("^cuda.*", "cpu", flag) for flag in flags]
        with flags_of("x", *here), pytest.raises(Parsed):
            script(files[0].removeprefix("scripts/").removesuffix(".py")).main()
        monkeypatch.undo()


def check_training(flags: list[str]) -> None:
    text = " ".join(flags)
    found = re.search(r"--config[ =](\S+?):(\w+)", text)
    assert found, text
    if found[2] not in ("NAME", "PRESET"):
        load_file(ROOT / found[1]).get_config(found[2])
    for key in re.findall(r"--config\.([\w.]+)", text):
        assert key in SCHEMA or key.rpartition(".")[0] in SECTIONS | {"reward_fn"}, key


def test_there_are_many() -> None:
    assert len(FOUND) > 50
    scripts = {name for line in FOUND for name in re.findall(r"scripts/(\w+)\.py", line)}
    assert scripts >= {"train_nft_sd3", "evaluation", "reproduce", "sample", "export_lora"}


@pytest.mark.parametrize("command", FOUND)
def test_a_documented_command_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "make tset",
        "python scripts/evaluate.py --dataset geneval",
        "python scripts/evaluation.py --datasets geneval",
        "torchrun scripts/train_nft_sd3.py --config config/nft.py:sd3_genval",
        "torchrun scripts/train_nft.py --config config/nft.py:shapes --config.trian.batch_size=1",
    ],
)
def test_a_misspelt_one_is_not(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check(command, monkeypatch)
