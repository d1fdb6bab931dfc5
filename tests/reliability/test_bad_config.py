"""Values that no key can have, for every key: refused by name before anything is loaded."""

import copy
import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion_nft.validation.config_files import load_file
from diffusion_nft.validation.schema import SCHEMA, validate
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


def _defaults() -> dict[str, object]:
    """Dotted key -> default, from config/base.py."""
    mappings = {"reward_fn", "reward_servers", "reward_options"}
    found = {}
    for name, value in load_file(ROOT / "config" / "base.py").get_config().to_dict().items():
        if isinstance(value, dict) and name not in mappings:
            found |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            found[name] = value
    return found


NAN, INF = math.nan, math.inf
# By the type of a key's default: what it can never be, and what the error offers.
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
    for key, default in _defaults().items()
    for value in WRONG[type(default)]
]
# What has a message of its own.
SPECIAL = [
    ("sample.num_image_per_prompt", 1, "an integer >= 2"),
    ("num_epochs", 10**30, "an integer >= 1 and <= 9223372036854775807"),
    ("seed", 2**63, "an integer >= 0 and <= 9223372036854775807"),
    ("pretrained.max_sequence_length", 10**30, "an integer from 1 to 512"),
    ("reward_server_timeout_seconds", 1e308, "in (0, 1e6]"),
    ("distributed.timeout_minutes", 1e9, "in (0, 1e6]"),
    ("train.timestep_fraction", -0.0, "in (0, 1]"),
    ("train.adam_beta1", 1, "in [0, 1)"),
    ("sample.guidance_scale", 0.99, "in [1, inf)"),
    ("train.learning_rate", 2**64, "in (0, inf)"),
    ("algorithm", "NFT", "choose from nft"),
    ("algorithm", "nft\0", "choose from nft"),
    ("mixed_precision", "FP16", "choose from fp16, bf16, no, fp64"),
    ("train.adv_mode", "x" * 100_000, "choose from all, positive_only"),
    ("nft.weighting", "ädaptive", "choose from adaptive, uniform"),
    ("nft.old_policy_decay", "", "choose from on_policy"),
    ("log.wandb", "Online", "choose from online, offline, off"),
    ("pretrained.model_type", "../sd3", "choose from sd3"),
    ("sample.solver", "os.system", "solver 'os.system' is unknown"),
    ("sample.solver", "../Scheduler", "not a scheduler of the installed diffusers"),
    ("eval.solver", "PNDMScheduler", "does not take flow sigmas"),
    ("log.wandb_project", "a\nb", "in one line"),
    ("run_name", "a\r\nb", "in one line"),
    ("pretrained.revision", "../../x", "names a branch, a tag or a commit"),
    ("pretrained.revision", "-x", "names a branch, a tag or a commit"),
    ("reward_fn", {"shapes": NAN}, "the weight of 'shapes' must be a finite number other than 0"),
    ("reward_fn", {"shapes": 10**400}, "must be a finite number other than 0"),
    ("reward_fn", {"os:system": 1.0}, "'os:system' is unknown"),
    ("reward_fn", {"\u202eshapes": 1.0}, "is unknown (did you mean 'shapes'?)"),
    ("reward_fn", {}, "needs at least one reward"),
    ("eval.held_out_rewards", ("ocr", "ocr"), "a name comes twice"),
    ("eval.held_out_rewards", ("../ocr",), "'../ocr' is unknown"),
    ("reward_servers", {"shapes": ("http://a\0b:1",)}, "is no address"),
    ("reward_servers", {"shapes": ("http://\ud800:1",)}, "is no address"),
    ("reward_servers", {"shapes": ("http://" + "a" * 300 + ".:\u0661",)}, "is no address"),
    ("reward_servers", {"shapes": ("http://host:99999999999",)}, "is no address"),
    ("reward_servers", {"shapes": ("file:///etc/passwd",)}, "is no address"),
    ("reward_servers", {"shapes": ("http://host:1/../x",)}, "is no address"),
    ("reward_servers", {"shapes": ("http://xn--\u00fc:1",)}, "is no address"),
    ("reward_servers", {"shapes": [[]]}, "is no address"),
    ("reward_options", {"shapes": {"os.system": 1}}, "no option 'os.system'"),
    ("eval.held_out_rewards", ("\ud800",), "is unknown; choose from"),
    ("reward_options", {"shapes": {"device": "gpu\0"}}, "such as 'cpu' or 'cuda:1'"),
    ("reward_options", {"ocr": {"threads": "many"}}, "the threads of ocr must be of the type"),
    ("reward_options", {"ocr": {"threads": True}}, "the threads of ocr must be of the type"),
    ("reward_options", {"unifiedreward": {"timeout": "1"}}, "must be of the type float"),
    ("reward_options", {"aesthetic": {"weights": 3}}, "the weights of aesthetic must be of the"),
    ("reward_options", {"clipscore": {"batch_size": 0}}, "must be a positive integer"),
    ("reward_options", {"geneval": {"grading": "lax"}}, "the grading of geneval must be one of"),
    ("stages", ({},), "num_epochs = None: must be an integer >= 1"),
    ("stages", ({"num_epochs": 1, "seed": 3},), "must be the same in all stages"),
]
NAMED = [
    Case(f"{key}={ascii(value)[:40]}", "validation", words, (key, value))
    for key, value, words in SPECIAL
]


@cache
def _smoke() -> dict:
    import nft

    return nft.shapes_smoke().to_dict()


def config_with(key: str, value: object, save_dir: str) -> ConfigDict:
    """The smoke preset with ``key`` set to ``value``, whatever it is."""
    tree = copy.deepcopy(_smoke()) | {"save_dir": save_dir}
    *sections, last = key.split(".")
    branch = tree
    for part in sections:
        branch = branch[part]
    branch[last] = value
    return ConfigDict(tree, allow_dotted_keys=True)


def refusal(case: Case, folder, monkeypatch) -> str:
    """The line about the key of ``case``, and that nothing was loaded before."""
    key, value = case.given
    seen = watch(monkeypatch)
    message = train(config_with(key, value, str(folder / "run")), seen, monkeypatch)
    seen.expect(case.moment)
    first, *lines = message.splitlines()
    assert "in the configuration" in first
    (line,) = [line for line in lines if key.removesuffix("s") in line]
    assert len(line) < 2500
    assert not list(folder.iterdir())
    return line.strip()


def test_the_generated_values_meet_every_key():
    assert {case.given[0] for case in GENERATED} == set(SCHEMA)


@pytest.mark.parametrize("key", SCHEMA)
def test_a_value_of_the_wrong_kind_is_refused_by_its_key(key, tmp_path, monkeypatch):
    cases = [case for case in GENERATED if case.given[0] == key]
    for case in cases:
        line = refusal(case, tmp_path, monkeypatch)
        assert line.startswith(f"{key} = ") and case.words in line, case.name


@parametrized(NAMED)
def test_a_value_that_cannot_be_is_refused_with_what_would_be_valid(case, tmp_path, monkeypatch):
    assert case.words in refusal(case, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sample.noise_level", 1e308),
        ("train.learning_rate", 5e-324),
        ("seed", 2**63 - 1),
        ("run_name", "\u202eрусский \U0001f600 e\u0301"),
        ("pretrained.revision", "refs/pr/7"),
        ("reward_fn", {"shapes": -1}),
    ],
)
def test_an_odd_value_may_be_valid(key, value, tmp_path):
    validate(config_with(key, value, str(tmp_path / "run")))


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
def test_a_flag_that_cannot_be_read_costs_one_line(case, monkeypatch):
    seen = watch(monkeypatch)
    message = parse(*case.given)
    seen.expect(case.moment)
    assert case.words in message and len(message.splitlines()) == 1


NO_PRESET = "--config is missing: a preset is named as config/nft.py:PRESET"


@pytest.mark.parametrize("given", [(), ("--config",), ("--config=",), ("--config.seed=3",)])
def test_a_missing_preset_costs_one_line(given):
    module = training_script()
    assert exit_message(lambda: module.parse_flags(["train", *given])) == NO_PRESET


def test_a_preset_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    module = training_script()
    given = ["train", "--config=~/mine.py:x"]
    assert f"{tmp_path}/mine.py:x: no such file" in exit_message(lambda: module.parse_flags(given))
