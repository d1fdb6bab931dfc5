"""Validation: each check can fail, with a message of key, value and what would be valid."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import pytest

from diffusion_nft.data import prompts as data
from diffusion_nft.validation.schema import PUBLISHED_KEYS, SCHEMA, SECTIONS, ConfigError, validate
from tests.test_config import BASE, PRESETS, ROOT, leaves


@pytest.fixture(autouse=True)
def prompt_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty prompt sets; the tests run in the folder above them."""
    both = {"geneval": "_metadata.jsonl", "shapes": "_metadata.jsonl", "ocr": ".txt"}
    names = [f"{name}/{split}{end}" for name, end in both.items() for split in data.SPLITS]
    for name in [*names, "drawbench/test.txt"]:
        path = tmp_path / "dataset" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(data, "DATASET_ROOT", tmp_path / "dataset")
    monkeypatch.chdir(tmp_path)


def changed(changes: dict[str, Any], preset: str = "shapes") -> ml_collections.ConfigDict:
    """An unlocked ``preset`` with changes by dotted key, valid or not."""
    tree = PRESETS.get_config(preset).to_dict()
    for key, value in changes.items():
        *sections, last = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
    return ml_collections.ConfigDict(tree, allow_dotted_keys=True)


def problems(changes: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        validate(changed(changes))
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip() for line in lines] == list(caught.value.problems)
    return caught.value.problems


def only_problem(changes: dict[str, Any]) -> str:
    found = problems(changes)
    assert len(found) == 1, found
    return found[0]


def test_schema_covers_every_key_of_the_base_config() -> None:
    assert set(leaves(BASE.get_config().to_dict())) == set(SCHEMA)


COUNT = "an integer >= 1"
COUNT_OR_NONE = "an integer >= 0"
PATH = "path of a folder that exists, or empty"
POSITIVE = "a finite number in (0, inf)"
NOT_NEGATIVE = "a finite number in [0, inf)"
BELOW_ONE = "a finite number in [0, 1)"
# Key, a value to refuse, and words of the message.
REFUSED: list[tuple[str, Any, str]] = [
    ("run_name", 7, "text"),
    ("save_dir", "", "not empty"),
    ("save_dir", "~nobody-at-all/runs", "no ~name of a user without a home"),
    ("save_dir", __file__, "is a file; must be a folder"),
    ("seed", -1, COUNT_OR_NONE),
    ("algorithm", "ntf", "choose from nft"),
    ("num_epochs", 0, COUNT),
    ("save_freq", -1, COUNT_OR_NONE),
    ("eval_freq", -1, COUNT_OR_NONE),
    ("mixed_precision", "fp32", "choose from fp16, bf16, no, fp64"),
    ("resume_from", "logs/absent", PATH),
    ("pretrained.model", "", "a hub name (owner/name)"),
    ("pretrained.model", "./absent", "a diffusers folder that exists"),
    ("pretrained.model", "shape", "did you mean 'shapes'?"),
    ("pretrained.revision", None, "text"),
    ("pretrained.model_type", "sd3.5", "choose from sd3"),
    ("pretrained.max_sequence_length", 1025, "an integer from 1 to 1024"),
    ("resolution", 0, "an integer from 16 to 65536, or two: (height, width)"),
    ("resolution", 520, "a multiple of 16, such as 512"),
    ("resolution", (512, 520), "a multiple of 16, such as (512, 512)"),
    ("eval.resolution", 8, "an integer from 16"),
    ("train.lora_targets", "attn(", "a regular expression"),
    ("train.lora_targets", (), "a tuple of ends of names"),
    ("train.sigma_range", 0.0, "a finite number in (0, 1]"),
    ("dataset", "", "choose from drawbench, geneval, ocr, shapes"),
    ("dataset", 3, "name of a prompt set"),
    ("dataset", "genval", "choose from drawbench, geneval, ocr, shapes"),
    ("dataset", "drawbench", "the train split needs one of them"),
    ("reward_fn", {}, "needs at least one reward; choose from"),
    ("reward_fn", "ocr", "map reward names to weights"),
    ("reward_fn", {"shapse": 1.0}, "'shapse' is unknown (did you mean 'shapes'?); choose from"),
    ("reward_fn", {"shapes": 0.0}, "a finite number other than 0"),
    ("reward_fn", {"shapes": math.nan}, "a finite number other than 0"),
    ("reward_fn", {"shapes": "1"}, "a finite number other than 0"),
    ("reward_servers", ("http://host:8000",), "map reward names to addresses"),
    ("reward_servers", {"shapse": ("http://host:8000",)}, "did you mean 'shapes'?"),
    ("reward_servers", {"shapes": "http://host:8000"}, "'shapes' needs a tuple of addresses"),
    ("reward_servers", {"shapes": ()}, "'shapes' needs a tuple of addresses"),
    *(
        ("reward_servers", {"shapes": ("http://fine:1", address)}, f"{address!r} is not an address")
        for address in (
            "host:8000",
            "ftp://host:8000",
            "http://",
            "http://:8000",
            "http://host:8000/score",
            "http://host:8000/",
            "http://host:8000?a=1",
            "http://host:port",
            "http://host:0",
            "http://host:99999",
            "http://user:secret@host:8000",
            "http://host:8000 ",
            "http://ho st:8000",
            8000,
        )
    ),
    ("max_unscored", -1, COUNT_OR_NONE),
    ("reward_server_timeout_seconds", 0.0, "a finite number in (0, 1e6]"),
    ("reward_options", "shapes", "map reward names to options"),
    ("reward_options", {"shapse": {}}, "did you mean 'shapes'?"),
    ("reward_options", {"shapes": 3}, "'shapes' needs a mapping of options"),
    ("reward_options", {"shapes": {"size": 3}}, "no option 'size'; choose from device"),
    ("reward_options", {"shapes": {"device": "gpu"}}, "such as 'cpu' or 'cuda:1'"),
    ("sample.num_groups", 0, COUNT),
    ("sample.num_image_per_prompt", 1, "an integer >= 2"),
    ("sample.batch_size", 0, COUNT),
    ("sample.solver", "dmp2", "did you mean 'dpm2'?"),
    ("sample.solver", 2, "the name of a solver"),
    ("sample.num_steps", 10.0, COUNT),
    ("sample.noise_level", -0.1, NOT_NEGATIVE),
    ("sample.guidance_scale", 0.5, "a finite number in [1, inf)"),
    ("train.batch_size", -1, COUNT_OR_NONE),
    ("train.gradient_step_per_epoch", 0, COUNT),
    ("train.num_inner_epochs", 0, COUNT),
    ("train.timestep_fraction", 1.01, "a finite number in (0, 1]"),
    ("train.sigma_choice", "last", "choose from random, stratified, first"),
    ("train.learning_rate", 0.0, POSITIVE),
    ("train.learning_rate", math.nan, POSITIVE),
    ("train.lr_half_life", -1.0, "[0, inf)"),
    ("train.adam_beta1", 1.0, BELOW_ONE),
    ("train.adam_beta2", -0.1, BELOW_ONE),
    ("train.adam_weight_decay", -1e-4, NOT_NEGATIVE),
    ("train.adam_epsilon", 0.0, POSITIVE),
    ("train.max_grad_norm", 0.0, POSITIVE),
    ("train.adv_clip_max", 0.0, POSITIVE),
    ("train.adv_mode", "positive", "choose from all, positive_only, negative_only, one_only, bin"),
    ("train.lora_rank", 0, COUNT),
    ("train.lora_alpha", 0, COUNT),
    ("train.lora_path", "absent", "must be a LoRA that exists"),
    ("train.lora_path", ".", "adapter_config.json"),
    ("train.lora_path", "README.md", "a .safetensors file or a folder with one"),
    ("train.ema_decay", 1.0, BELOW_ONE),
    ("train.max_skipped_steps", -1, COUNT_OR_NONE),
    ("nft.beta", 0.0, POSITIVE),
    ("nft.kl_weight", -1e-4, NOT_NEGATIVE),
    ("nft.weighting", "adaptve", "choose from adaptive, uniform, sigma, one_minus_sigma"),
    ("nft.old_policy_decay", 1, "linear_to_half"),
    ("nft.old_policy_decay", "linear_to_haf", "did you mean 'linear_to_half'?"),
    ("nft.old_policy_decay", "linear:0.01:0:1", "CAP in [0, 1), such as linear:0.01:0:0.5"),
    ("nft.old_policy_decay", "linear:1e-3:0:0.5", "in plain decimals"),
    ("nft.old_policy_decay", "linear:0.01:0:0.5\n", "in plain decimals"),
    ("nft.old_policy_decay", "linear:٠:0:0.5", "in plain decimals"),
    ("nft.old_policy_decay", "linear:0.01:0.5", "linear:SLOPE:START:CAP"),
    ("nft.old_policy_decay", "linear:-1:0:0.5", "linear:SLOPE:START:CAP"),
    ("grpo.clip_range", 1.0, "a finite number in (0, 1)"),
    ("grpo.kl_weight", -0.01, NOT_NEGATIVE),
    ("matching.weighting", "plain", "choose from adaptive, uniform, sigma, one_minus_sigma"),
    ("matching.kl_weight", -1e-4, NOT_NEGATIVE),
    ("matching.temperature", 0.0, POSITIVE),
    ("matching.best_of", 0, COUNT),
    ("matching.clip_range", 0, POSITIVE),
    ("eval.held_out_rewards", "aesthetic", "a tuple of reward names"),
    ("eval.held_out_rewards", (3,), "a tuple of reward names"),
    ("eval.held_out_rewards", ("asthetic",), "did you mean 'aesthetic'?"),
    ("eval.held_out_rewards", ("aesthetic", "aesthetic"), "is repeated"),
    ("eval.num_prompts", -1, COUNT_OR_NONE),
    ("eval.num_steps", 0, COUNT),
    ("eval.solver", "euler", "choose from flow, dance, ddim, dpm1, dpm2"),
    ("eval.guidance_scale", 0, "a finite number in [1, inf)"),
    ("eval.batch_size", 0, COUNT),
    ("monitor.action", "halt", "choose from off, warn, stop, raise_kl"),
    ("monitor.max_drop", 0.0, POSITIVE),
    ("monitor.max_diversity_drop", 1.5, "a finite number in (0, 1]"),
    ("monitor.max_image_change", 0.0, POSITIVE),
    ("monitor.max_kl", -1.0, NOT_NEGATIVE),
    ("checkpoint.keep", -1, COUNT_OR_NONE),
    ("perf.embed_cache_gb", -1.0, NOT_NEGATIVE),
    ("perf.vae_batch_size", 0, COUNT),
    ("log.wandb", "disabled", "choose from online, offline, off"),
    ("log.wandb_project", "", "text, not empty"),
    ("log.num_images", -1, COUNT_OR_NONE),
    ("log.image_freq", -1, COUNT_OR_NONE),
    ("distributed.timeout_minutes", 0.0, "a finite number in (0, 1e6]"),
    ("stages", 3, "a tuple of mappings"),
    ("num_epochs", 10**30, "an integer >= 1 and <= 9223372036854775807"),
    ("seed", 2**63, "an integer >= 0 and <= 9223372036854775807"),
    ("reward_server_timeout_seconds", 1e308, "in (0, 1e6]"),
    ("distributed.timeout_minutes", 1e9, "in (0, 1e6]"),
    ("train.learning_rate", 2**64, "in (0, inf)"),
    ("algorithm", "NFT", "choose from nft"),
    ("algorithm", "nft\0", "choose from nft"),
    ("train.adv_mode", "x" * 100_000, "choose from all, positive_only"),
    ("nft.weighting", "ädaptive", "choose from adaptive, uniform"),
    ("pretrained.model_type", "../sd3", "choose from sd3"),
    ("sample.solver", "os.system", "solver 'os.system' is unknown"),
    ("sample.solver", "../Scheduler", "not a scheduler of the installed diffusers"),
    ("eval.solver", "PNDMScheduler", "does not take flow sigmas"),
    ("run_name", "a\r\nb", "in one line"),
    ("pretrained.revision", "../../x", "names a branch, a tag or a commit"),
    ("pretrained.revision", "-x", "names a branch, a tag or a commit"),
    ("reward_fn", {"shapes": 10**400}, "must be a finite number other than 0"),
    ("reward_fn", {"os:system": 1.0}, "'os:system' is unknown"),
    ("reward_fn", {"\u202eshapes": 1.0}, "is unknown (did you mean 'shapes'?)"),
    ("eval.held_out_rewards", ("../ocr",), "'../ocr' is unknown"),
    ("reward_servers", {"shapes": ("http://a\0b:1",)}, "is not an address"),
    ("reward_servers", {"shapes": ("http://\ud800:1",)}, "is not an address"),
    ("reward_servers", {"shapes": ("http://" + "a" * 300 + ".:\u0661",)}, "is not an address"),
    ("reward_servers", {"shapes": ("file:///etc/passwd",)}, "is not an address"),
    ("reward_servers", {"shapes": ("http://host:1/../x",)}, "is not an address"),
    ("reward_servers", {"shapes": ("http://xn--\u00fc:1",)}, "is not an address"),
    ("reward_servers", {"shapes": [[]]}, "is not an address"),
    ("reward_options", {"shapes": {"os.system": 1}}, "no option 'os.system'"),
    ("eval.held_out_rewards", ("\ud800",), "is unknown; choose from"),
    ("reward_options", {"shapes": {"device": "gpu\0"}}, "such as 'cpu' or 'cuda:1'"),
    ("reward_options", {"ocr": {"threads": "many"}}, "the threads of ocr must be of the type"),
    ("reward_options", {"unifiedreward": {"timeout": "1"}}, "must be of the type float"),
    ("reward_options", {"aesthetic": {"weights": 3}}, "the weights of aesthetic must be of the"),
    ("reward_options", {"clipscore": {"batch_size": 0}}, "must be a positive integer"),
    ("reward_options", {"geneval": {"grading": "lax"}}, "the grading of geneval must be one of"),
]


@pytest.mark.parametrize(
    ("key", "value", "valid"), REFUSED, ids=[f"{key}={ascii(v)[:40]}" for key, v, _ in REFUSED]
)
def test_refused_value(key: str, value: Any, valid: str) -> None:
    line = only_problem({key: value})
    assert line.startswith(f"{key} = {value!r}: "[:200])
    assert valid in line
    assert "\n" not in line and len(line) < 2500


ACCEPTED: list[tuple[str, Any]] = [
    ("train.learning_rate", 1),
    ("train.learning_rate", np.float64(1e-3)),
    ("train.timestep_fraction", 1),
    ("train.sigma_range", 0.5),
    ("train.lora_targets", ("attn.to_q",)),
    ("train.lora_targets", r".*\.attn\.to_q"),
    ("pretrained.model_type", "sd3"),
    ("nft.kl_weight", 0),
    ("nft.old_policy_decay", "on_policy"),
    ("nft.old_policy_decay", "linear:0.075:8:0.999"),
    ("sample.solver", "dance"),
    ("sample.noise_level", 0.0),
    ("sample.noise_level", 1e308),
    ("sample.guidance_scale", 4.5),
    ("save_freq", 0),
    ("resume_from", "."),
    ("dataset", "dataset/geneval"),
    ("reward_fn", {"shapes": -2}),
    ("seed", 2**63 - 1),
    ("train.learning_rate", 5e-324),
    ("run_name", "\u202eрусский \U0001f600 e\u0301"),
    ("pretrained.revision", "refs/pr/7"),
    ("reward_fn", {"shapes": 1, "jpeg_compressibility": 0.1}),
    ("eval.held_out_rewards", ("aesthetic",)),
    ("eval.held_out_rewards", ["jpeg_compressibility", "geneval"]),
    (
        "reward_servers",
        {"shapes": ("http://localhost:8000", "https://rewards.example", "http://[::1]:1")},
    ),
    ("reward_options", {"shapes": {"device": "cuda:1"}}),
]


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "lora/adapter_config.json", "pytorch_lora_weights.safetensors"]
)
def test_accepts_the_folder_of_a_lora_and_its_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    validate(changed({"train.lora_path": str(tmp_path)}))
    if name.endswith(".safetensors"):
        validate(changed({"train.lora_path": str(tmp_path / name)}))


def test_takes_plain_dictionaries_and_frozen_configs() -> None:
    config = PRESETS.get_config("shapes")
    validate(config.to_dict())
    validate(ml_collections.FrozenConfigDict(config))
    config.stages = ({"num_epochs": 3, "reward_fn": {"shapes": 2.0}},)
    validate(config.to_dict())


UNKNOWN = [
    ("train.lerning_rate", "did you mean train.learning_rate?"),
    ("learning_rate", "did you mean train.learning_rate?"),
    ("train.lr", "did you mean train.learning_rate?"),
    ("train.wd", "did you mean train.adam_weight_decay?"),
    ("train.eps", "did you mean train.adam_epsilon?"),
    ("train.epochs", "did you mean num_epochs?"),
    ("sample.bs", "did you mean sample.batch_size?"),
    ("eval.cfg", "did you mean eval.guidance_scale?"),
    ("train.num_steps", "did you mean sample.num_steps or eval.num_steps?"),
    # A similar key of the same section or of none comes first.
    ("eval.rewards", "did you mean eval.held_out_rewards?"),
    ("nft.betta", "did you mean nft.beta?"),
    ("monitor.pictures", "the keys are in config/base.py"),
]


@pytest.mark.parametrize(("key", "hint"), UNKNOWN)
def test_unknown_key(key: str, hint: str) -> None:
    line = only_problem({key: 3})
    assert line.startswith(f"{key} = 3: is an unknown key; ")
    assert hint in line


@pytest.mark.parametrize("published", PUBLISHED_KEYS)
def test_key_of_the_published_code_names_its_successor(published: str) -> None:
    ours, _ = PUBLISHED_KEYS[published]
    assert published not in SCHEMA
    assert ours in SCHEMA or ours == "" or ours.removesuffix(".*") in SECTIONS
    key = published.replace("*", "batch_size")
    advice = f"use {ours}" if ours else "drop it"
    assert only_problem({key: 1}).startswith(f"{key} = 1: is a key of the published code; {advice}")


def test_missing_keys() -> None:
    assert [line.partition(":")[0] for line in problems({"checkpoint": {}, "log": {}})] == [
        "checkpoint.keep is missing",
        "log.wandb is missing",
        "log.wandb_project is missing",
        "log.tensorboard is missing",
        "log.num_images is missing",
        "log.image_freq is missing",
    ]
    with pytest.raises(ConfigError) as caught:
        validate(ml_collections.ConfigDict())
    assert {line.split(" is missing: ")[0] for line in caught.value.problems} == set(SCHEMA)


def test_section_that_is_a_value() -> None:
    line = only_problem({"nft": 1.0})
    assert line.startswith("nft = 1.0: is a section, not a value; it holds nft.beta, nft.kl_weight")


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    (
        {"sample.num_steps": 2, "train.sigma_range": 1.0, "train.timestep_fraction": 0.3},
        "leave no sigma to train at",
    ),
    (
        {"train.gradient_step_per_epoch": 5, "sample.num_image_per_prompt": 4},
        "at most 4 steps",
    ),
    ({"resolution": 64, "pretrained.model": "shapes"}, "48 pixels only"),
    (
        {
            "sample.negative_prompt": "dark",
            "sample.guidance_scale": 1.0,
            "eval.guidance_scale": 1.0,
        },
        "a negative prompt is not used",
    ),
    ({"pretrained.max_sequence_length": 77, "pretrained.model": "shapes"}, "at 8 tokens"),
    ({"sample.solver": "ddim", "sample.noise_level": 1.5}, "between 0 and 1"),
    (
        {"reward_fn": {"shapes": 1.0}, "dataset": "ocr"},
        "train_metadata.jsonl and test_metadata.jsonl",
    ),
    (
        {"reward_fn": {"shapes": 1.0}, "eval.held_out_rewards": ("ocr", "shapes")},
        "'shapes' is in reward_fn",
    ),
    *(
        (
            {key: value, "reward_fn": {"shapes": 1.0}, "eval.held_out_rewards": ("aesthetic",)},
            "'ocr' is neither in reward_fn nor in eval.held_out_rewards",
        )
        for key, value in (
            ("reward_servers", {"ocr": ("http://a",), "shapes": ("http://a",)}),
            ("reward_options", {"aesthetic": {"batch_size": 1}, "ocr": {"threads": 1}}),
        )
    ),
    (
        {
            "reward_options": {"shapes": {"device": "cpu"}},
            "reward_servers": {"shapes": ("http://a",)},
        },
        "'shapes' is served",
    ),
    *(
        (
            {"algorithm": "flow_grpo", "sample.solver": solver, "sample.noise_level": noise_level},
            "choose from dance, ddim, flow, with a noise_level above 0",
        )
        for solver, noise_level in (("dpm2", 0.7), ("flow", 0.0))
    ),
    *(
        (
            {
                "algorithm": "flow_grpo",
                "sample.solver": "ddim",
                "sample.num_steps": 10,
                "train.sigma_choice": choice,
                "train.sigma_range": 1.0,
                "train.timestep_fraction": fraction,
            },
            "must be 'first' and int(num_steps * timestep_fraction) less than 10",
        )
        for choice, fraction in (("first", 1.0), ("stratified", 0.99))
    ),
    *(
        (
            {
                "algorithm": name,
                "monitor.action": action,
                "monitor.max_kl": 0.1,
                f"{section}.kl_weight": 0.0,
            },
            complaint,
        )
        for name, section, action, complaint in (
            ("nft", "nft", "raise_kl", "a weight of 0 cannot be raised"),
            ("best_of_n", "matching", "warn", "is not measured without a KL term"),
        )
    ),
    ({"train.batch_size": 0, "perf.compile": True}, "every batch size tried would be compiled"),
    (
        {"algorithm": "best_of_n", "matching.best_of": 4, "sample.num_image_per_prompt": 4},
        "must be fewer than 4",
    ),
]


@pytest.mark.parametrize(("changes", "valid"), IMPOSSIBLE)
def test_impossible_combination(changes: dict[str, Any], valid: str) -> None:
    line = only_problem(changes)
    given = ", ".join(f"{key} = {value!r}" for key, value in changes.items())
    assert line.startswith(f"{given}: ")
    assert valid in line


def test_a_run_begins_from_another_run_or_from_a_lora(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").touch()
    line = only_problem({"resume_from": str(tmp_path), "train.lora_path": str(tmp_path)})
    assert line.endswith(": a run can start from only one of them")


def test_a_held_out_reward_reads_the_metadata_of_the_test_split_alone(tmp_path: Path) -> None:
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).touch()
    changes = {
        "reward_fn": {"ocr": 1.0},
        "eval.held_out_rewards": ("geneval",),
        "dataset": str(tmp_path),
    }
    line = only_problem(changes)
    assert line.startswith(f"eval.held_out_rewards = ('geneval',), dataset = {str(tmp_path)!r}: ")
    assert "the prompt set needs test_metadata.jsonl" in line
    (tmp_path / "test.txt").rename(tmp_path / "test_metadata.jsonl")
    validate(changed(changes))


@pytest.mark.parametrize(
    "changes",
    [
        *({key: value} for key, value in ACCEPTED),
        {"sample.num_steps": 2, "train.timestep_fraction": 0.5},
        {"train.gradient_step_per_epoch": 4, "sample.num_image_per_prompt": 4},
        {"sample.solver": "ddim", "sample.noise_level": 1.0},
        {"sample.solver": "flow", "sample.noise_level": 1.5},
        {"algorithm": "flow_grpo", "sample.solver": "dance", "train.timestep_fraction": 1.0},
        {
            "algorithm": "flow_grpo",
            "sample.solver": "ddim",
            "train.timestep_fraction": 0.99,
            "train.sigma_choice": "first",
        },
        {"algorithm": "best_of_n", "matching.best_of": 3, "sample.num_image_per_prompt": 4},
        {"algorithm": "nft", "matching.best_of": 24},
        {"algorithm": "nft", "grpo.kl_weight": 0.0, "monitor.action": "raise_kl"},
        {
            "eval.held_out_rewards": ("ocr",),
            "reward_servers": {"ocr": ("http://a",), "shapes": ("http://a",)},
        },
        {
            "eval.held_out_rewards": ("ocr",),
            "reward_options": {"ocr": {"threads": 1, "device": "cpu"}},
        },
    ],
)
def test_accepted_values(changes: dict[str, Any]) -> None:
    validate(changed(changes))


def test_all_problems_are_listed_at_once() -> None:
    found = problems(
        {
            "train.learning_rate": -1.0,
            "sample.solver": "dpm9",
            "reward_fn": {"pikscore": 1.0, "shapes": math.nan},
            "decay_type": 1,
            "resolution": 50,
            "perf": {},
        }
    )
    keys = [re.split(" = | is missing", line)[0] for line in found]
    assert sorted(keys) == [
        "decay_type",
        "perf.compile",
        "perf.embed_cache_gb",
        "perf.gradient_checkpointing",
        "perf.offload_text_encoders",
        "perf.vae_batch_size",
        "resolution",
        "reward_fn",
        "sample.solver",
        "train.learning_rate",
    ]
    (rewards,) = [line for line in found if line.startswith("reward_fn")]
    assert "'pikscore' is unknown" in rewards
    assert "the weight of 'shapes'" in rewards


def test_validation_imports_no_model_library() -> None:
    heavy = "{'diffusers', 'transformers', 'peft', 'wandb', 'open_clip'}"
    code = f"import sys, diffusion_nft.validation.schema; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"
