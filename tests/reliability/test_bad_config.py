"""Invalid values and flags are refused by name before anything is loaded."""

import math
from fractions import Fraction

import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion_nft.validation.schema import SCHEMA
from tests.launch import ROOT
from tests.reliability.bad_inputs import (
    Case,
    exit_message,
    parametrized,
    parse,
    train,
    training_script,
    watch,
)
from tests.test_config import BASE, leaves
from tests.validation.test_schema import changed

NAN, INF = math.nan, math.inf
# Invalid values by the type of a key's default, and the words of their error.
WRONG: dict[type, list[object]] = {
    bool: [None, 0, 1, "True", "no", [], NAN],
    int: [None, True, -1, 0.5, NAN, INF, "3", b"3", [1], {}, 10**30, -(10**400), np.int64(3), 3j],
    float: [None, False, -0.5, NAN, INF, -INF, "0.1", [0.1], {}, 10**400, Fraction(1, 3)],
    str: [None, 3, 0.5, NAN, b"text", ["a"], {}, True, "a\0b", "\ud800"],
    tuple: [3, "shapes", {"a": 1}, [[]], (None,), NAN],
    dict: [None, 3, "shapes", [], ("shapes",), {"\0": 1.0}, {"../shapes": 1.0}, NAN],
}
OFFERED: dict[type, str] = {
    bool: "must be True or False",
    int: "must be an integer",
    float: "must be a finite number in",
    str: "",
    tuple: "must be a tuple of",
    dict: "",
}
GENERATED = [
    Case(f"{key}={ascii(value)[:24]}", "validation", OFFERED[type(default)], (key, value))
    for key, default in leaves(BASE.get_config().to_dict()).items()
    for value in WRONG[type(default)]
    if (key, value) != ("train.lora_targets", ["a"])  # may be several names
]


def config_with(key: str, value: object, save_dir: str) -> ConfigDict:
    """The smoke preset with ``key`` set to ``value``, valid or not."""
    return changed({"save_dir": save_dir, key: value}, "shapes_smoke")


def test_the_generated_values_cover_every_key():
    assert {case.given[0] for case in GENERATED} == set(SCHEMA)


@pytest.mark.parametrize("key", SCHEMA)
def test_a_value_of_the_wrong_kind_is_refused_by_its_key(key, tmp_path, monkeypatch):
    for case in (case for case in GENERATED if case.given[0] == key):
        seen = watch(monkeypatch)
        config = config_with(*case.given, str(tmp_path / "run"))
        first, *lines = train(config, seen, monkeypatch).splitlines()
        seen.expect(case.moment)
        assert "in the configuration" in first and not list(tmp_path.iterdir())
        (line,) = [line.strip() for line in lines if key.removesuffix("s") in line]
        assert line.startswith(f"{key} = ") and case.words in line, case.name


NFT = ROOT / "config" / "nft.py"
FLAGS = [
    Case("unknown key", "flags", "is an unknown key; did you mean seed", ["--config.sead=3"]),
    Case("key of a surrogate", "flags", "is an unknown key", ["--config.\udcff=3"]),
    Case("section", "flags", "is a section, not a value", ["--config.sample=3"]),
    Case("unfinished mapping", "flags", "Failed to parse", ['--config.reward_servers={"a":']),
    Case("unfinished tuple", "flags", "as tuple", ['--config.eval.held_out_rewards=("a",']),
    Case("text for a flag", "flags", "Non-boolean argument", ["--config.allow_tf32=maybe"]),
    Case("text for a count", "flags", "invalid literal for int", ["--config.seed=many"]),
    Case("NaN for a count", "flags", "invalid literal for int", ["--config.seed=nan"]),
    Case("nothing for a count", "flags", "invalid literal for int", ["--config.seed="]),
    Case("text for a number", "flags", "could not convert", ["--config.nft.beta=x"]),
    Case("5000 digits", "flags", "Exceeds the limit", ["--config.seed=" + "9" * 5000]),
    Case(
        "code for a mapping",
        "flags",
        "Failed to parse",
        ["--config.reward_servers=__import__('os')"],
    ),
    Case("unknown flag", "flags", "Unknown command line flag", ["--nonsense"]),
    Case("an absent preset file", "flags", "no such file", ["--config=../../etc/nft.py:x"]),
    Case("an unknown preset", "flags", "shapes_smoke", [f"--config={NFT}:shapez"]),
    Case("a file without its preset", "flags", "shapes_smoke", [f"--config={NFT}"]),
    Case("a folder as preset", "flags", "no such file", ["--config=/:x"]),
    Case("a NUL in the preset", "flags", "a control character", ["--config=a\0b:x"]),
    Case("another reward", "flags", "does not hold 'ocr'", ["--config.reward_fn.ocr=1"]),
    Case(
        "a server alone", "flags", "give the whole mapping", ["--config.reward_servers.ocr=('x',)"]
    ),
]


@parametrized(FLAGS)
def test_an_invalid_flag_is_one_line(case, monkeypatch):
    seen = watch(monkeypatch)
    message = parse(*case.given)
    seen.expect(case.moment)
    assert case.words in message and len(message.splitlines()) == 1


NO_PRESET = "--config is missing: a preset is named as config/nft.py:PRESET"


@pytest.mark.parametrize("given", [(), ("--config",), ("--config=",), ("--config.seed=3",)])
def test_a_missing_preset_is_one_line(given):
    module = training_script()
    assert exit_message(lambda: module.parse_flags(["train", *given])) == NO_PRESET


def test_a_preset_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    module = training_script()
    given = ["train", "--config=~/mine.py:x"]
    assert f"{tmp_path}/mine.py:x: no such file" in exit_message(lambda: module.parse_flags(given))
