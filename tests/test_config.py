"""The presets hold the published values (epochs: as in the paper), and all pass validation."""

import json
import sys
from pathlib import Path
from typing import Any

import absl.flags
import pytest
from ml_collections import ConfigDict, config_flags

from diffusion_nft.data import prompts as data
from diffusion_nft.validation.config_files import load_file
from diffusion_nft.validation.flat import flatten
from diffusion_nft.validation.schema import ConfigError, validate
from diffusion_nft.validation.stages import stages_of

ROOT = Path(__file__).resolve().parent.parent


BASE = load_file(ROOT / "config/base.py")
PRESETS = load_file(ROOT / "config/nft.py")
GRPO = load_file(ROOT / "config/grpo.py")
BASELINES = load_file(ROOT / "config/baselines.py")
FAMILIES = load_file(ROOT / "config/families.py")
# Preset -> module.
FILES = {name: module for module in (PRESETS, GRPO, BASELINES, FAMILIES) for name in module.PRESETS}
OBJECT = '{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}\n'


@pytest.fixture(autouse=True)
def prompt_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small prompt sets in the published layouts."""
    root = tmp_path / "dataset"
    files = {f"{s}/{split}.txt": "a cat\n" for s in ("ocr", "pickscore") for split in data.SPLITS}
    files |= {
        f"{name}/{split}_metadata.jsonl": OBJECT
        for name in ("geneval", "shapes")
        for split in data.SPLITS
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(data, "DATASET_ROOT", root)
    monkeypatch.chdir(tmp_path)
    return root


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; a mapping by reward is one value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, dict) and name not in (
            "reward_fn",
            "reward_servers",
            "reward_options",
        )
        flat |= leaves(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def get_config(name: str) -> ConfigDict:
    return FILES[name].get_config(name)


def preset(name: str) -> dict[str, Any]:
    return leaves(get_config(name).to_dict())


@pytest.mark.parametrize("name", FILES)
def test_a_preset_is_valid_and_locked(name: str) -> None:
    config = get_config(name)
    validate(config)
    assert config == get_config(name), "validation changed the configuration"
    with pytest.raises(AttributeError, match="learning_rat"):
        config.train.learning_rat = 1e-4
    with pytest.raises(ValueError, match=f"'sd3_genval' is unknown; choose from .*{name}"):
        FILES[name].get_config("sd3_genval")


def test_save_dirs_differ() -> None:
    assert len({preset(name)["save_dir"] for name in FILES}) == len(FILES)


PUBLISHED_COLUMNS = (
    "num_epochs",
    "dataset",
    "reward_fn",
    "sample.num_steps",
    "nft.beta",
    "nft.old_policy_decay",
    "train.gradient_step_per_epoch",
    "eval.batch_size",
)
THREE = {"pickscore": 1.0, "hpsv2": 1.0, "clipscore": 1.0}
PUBLISHED_ROWS = {
    "sd3_geneval": (1000, "geneval", {"geneval": 1.0}, 10, 1.0, "linear_to_half", 1, 14),
    "sd3_ocr": (150, "ocr", {"ocr": 1.0}, 10, 0.1, "delayed_linear", 2, 16),
    "sd3_pickscore": (2000, "pickscore", {"pickscore": 1.0}, 10, 1.0, "linear_to_half", 1, 16),
    "sd3_hpsv2": (100_000, "pickscore", {"hpsv2": 1.0}, 10, 1.0, "linear_to_half", 1, 16),
    "sd3_multi_reward": (100_000, "pickscore", THREE, 25, 0.1, "linear_to_half", 1, 16),
}


@pytest.mark.parametrize("name", PUBLISHED_ROWS)
def test_values_of_the_published_presets(name: str) -> None:
    """Table and list "Presets published for 8 GPUs"."""
    published = dict(zip(PUBLISHED_COLUMNS, PUBLISHED_ROWS[name], strict=True)) | {
        "save_dir": f"logs/nft/sd3/{name.removeprefix('sd3_')}",
        "seed": 42,
        "algorithm": "nft",
        "save_freq": 30,
        "eval_freq": 10,
        "mixed_precision": "fp16",
        "allow_tf32": True,
        "resume_from": "",
        "pretrained.model": "stabilityai/stable-diffusion-3.5-medium",
        "pretrained.revision": "",
        "pretrained.model_type": "",
        "pretrained.max_sequence_length": 128,
        "resolution": 512,
        "sample.num_groups": 48,
        "sample.num_image_per_prompt": 24,
        "sample.solver": "dpm2",
        "sample.noise_level": 0.7,
        "sample.guidance_scale": 1.0,
        "reward_servers": {},
        "reward_options": {},
        "sample.global_std": True,
        "sample.standardize_rewards": False,
        "train.num_inner_epochs": 1,
        "train.timestep_fraction": 0.99,
        "train.learning_rate": 3e-4,
        "train.adam_beta1": 0.9,
        "train.adam_beta2": 0.999,
        "train.adam_weight_decay": 1e-4,
        "train.adam_epsilon": 1e-8,
        "train.max_grad_norm": 1.0,
        "train.adv_clip_max": 5.0,
        "train.adv_mode": "all",
        "train.lora_rank": 32,
        "train.lora_alpha": 64,
        "train.lora_path": "",
        "train.ema_decay": 0.9,
        "nft.kl_weight": 1e-4,
        "nft.weighting": "adaptive",
        "nft.negative_branch": True,
        "eval.held_out_rewards": (),
        "eval.num_prompts": 0,
        "eval.num_steps": 40,
        "eval.solver": "flow",
        "eval.guidance_scale": 1.0,
    }
    found = preset(name)
    assert {key: found[key] for key in published} == published


@pytest.mark.parametrize(
    ("name", "base", "kl_weight", "epochs"),
    [
        ("sd3_geneval_grpo", "sd3_geneval", 0.009, 5000),
        ("sd3_ocr_grpo", "sd3_ocr", 0.009, 2000),
        ("sd3_pickscore_grpo", "sd3_pickscore", 0.0023, 4000),
    ],
)
def test_flow_grpo_presets_hold_its_published_values(
    name: str, base: str, kl_weight: float, epochs: int
) -> None:
    published = {
        "num_epochs": epochs,
        "algorithm": "flow_grpo",
        "save_dir": f"logs/grpo/sd3/{base.removeprefix('sd3_')}",
        "sample.solver": "flow",
        "sample.noise_level": 0.7,
        "sample.num_steps": 10,
        "sample.guidance_scale": 4.5,
        "train.timestep_fraction": 0.99,
        "train.sigma_choice": "first",
        "train.gradient_step_per_epoch": 2,
        "grpo.clip_range": 1e-4,
        "grpo.kl_weight": kl_weight,
        "eval.guidance_scale": 4.5,
    }
    # The rest is as for NFT: 48 x 24 samples, learning rate 3e-4, LoRA 32/64, clip of 5, ...
    assert preset(name) == preset(base) | published


def test_baselines_differ_from_nft_in_the_algorithm_alone() -> None:
    """On the built-in model: the same prompts, rewards, batch of an epoch and optimizer."""
    free = ("algorithm", "save_dir", "grpo.", "matching.")
    sampled_and_trained = (
        *(f"sample.{key}" for key in ("solver", "guidance_scale")),
        *(f"train.{key}" for key in ("sigma_choice", "timestep_fraction")),
        "eval.guidance_scale",
    )
    expected = preset("shapes")
    for name in (*BASELINES.PRESETS, "shapes_grpo", "shapes_grpo_cfg"):
        other = preset(name)
        changed = {key for key in expected if other[key] != expected[key]}
        allowed = free if name in BASELINES.PRESETS else (*free, *sampled_and_trained)
        assert {key for key in changed if not key.startswith(allowed)} == set()
        assert other["algorithm"] != "nft"


def test_the_papers_multi_reward_model_has_five_stages() -> None:
    """Appendix on the multi-reward model: prompts, rewards, epochs, cap of the old policy."""
    config = PRESETS.get_config("sd3_multi_reward_paper")
    found = [
        (
            stage.config.dataset,
            stage.config.reward_fn.to_dict(),
            stage.config.num_epochs - stage.first_epoch,
            stage.config.nft.old_policy_decay,
        )
        for stage in stages_of(config)
    ]
    first = ("pickscore", THREE)
    geneval = ("geneval", {"geneval": 1.0, **THREE})
    assert found == [
        (*first, 800, "linear_to_half"),
        (*geneval, 300, "linear_to_half"),
        (*first, 200, "linear_to_half"),
        (*geneval, 200, "linear_to_half"),
        ("ocr", {"ocr": 1.0, **THREE}, 100, "linear_to_095"),
    ]
    shared = {(s.config.nft.beta, s.config.sample.num_steps) for s in stages_of(config)}
    assert shared == {(0.1, 40)}


def test_base_config_lacks_only_what_a_preset_gives() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(BASE.get_config())
    keys = [problem.split(" = ")[0] for problem in caught.value.problems]
    assert sorted(keys) == ["dataset", "reward_fn", "save_dir"]


def test_a_preset_serves_rewards_gives_options_and_holds_out() -> None:
    config = PRESETS.get_config("sd3_geneval")
    # As described in config/base.py.
    with config.reward_servers.unlocked():
        config.reward_servers.geneval = ("http://gpu7:8000", "http://gpu8:8000")
    with config.reward_options.unlocked():
        config.reward_options.aesthetic = {"device": "cuda:1", "dtype": "bf16", "batch_size": 8}
    config.eval.held_out_rewards = ("aesthetic",)
    assert config.is_locked and config.reward_servers.is_locked
    validate(config)
    flat = flatten(config)
    assert flat["reward_servers.geneval"] == ["http://gpu7:8000", "http://gpu8:8000"]
    assert flat["reward_options.aesthetic.dtype"] == "bf16"
    assert json.loads(json.dumps(flat)) == flat


def test_the_command_line_sets_what_is_given_by_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [
        "train_nft_sd3.py",
        f"--config={ROOT}/config/nft.py:shapes_smoke",
        "--config.reward_servers={'shapes': ('http://gpu7:8000',)}",
        "--config.reward_options={'ocr': {'backend': 'paddleocr'}}",
        "--config.eval.held_out_rewards=('ocr',)",
        "--config.stages=({'num_epochs': 3, 'nft.beta': 0.5}, {'num_epochs': 4})",
    ]
    # ml_collections looks for the overrides there.
    monkeypatch.setattr(sys, "argv", command)
    values = absl.flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    values(command)
    config = holder.value
    assert config.reward_servers.to_dict() == {"shapes": ("http://gpu7:8000",)}
    assert config.reward_options.to_dict() == {"ocr": {"backend": "paddleocr"}}
    assert config.eval.held_out_rewards == ("ocr",)
    assert config.stages == ({"num_epochs": 3, "nft.beta": 0.5}, {"num_epochs": 4})
    validate(config)
