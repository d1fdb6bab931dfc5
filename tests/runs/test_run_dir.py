"""Changes of the configuration with which a run may continue."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusion_nft.data.prompts import changed_prompts, hash_splits
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.runs.run_dir import (
    RunDirError,
    check_prompts_kept,
    check_run_dir,
    differences,
    write_config,
)
from diffusion_nft.validation.flat import flatten
from diffusion_nft.validation.inputs import hash_prompts

# Other values of keys that may change in a run, and of keys that alter its numbers.
KNOBS = {
    "num_epochs": 99,
    "save_freq": 7,
    "eval_freq": 7,
    "sample.batch_size": 3,
    "train.batch_size": 3,
    "eval.num_steps": 3,
    "perf.vae_batch_size": 1,
    "log.num_images": 1,
    "checkpoint.keep": 1,
    "distributed.timeout_minutes": 1.0,
    "run_name": "other",
    "allow_changed_prompts": True,
    "reward_server_timeout_seconds": 1.0,
    "eval.held_out_rewards": ("jpeg_compressibility",),
}
FIXED = {
    "seed": 1,
    "dataset": "other",
    "mixed_precision": "fp64",
    "resolution": 64,
    "pretrained.model": "other/model",
    "pretrained.revision": "v2",
    "reward_fn.shapes": 2.0,
    "sample.standardize_rewards": True,
    "sample.num_groups": 5,
    "sample.num_image_per_prompt": 5,
    "sample.num_steps": 5,
    "sample.solver": "heun",
    "train.learning_rate": 1.0,
    "train.gradient_step_per_epoch": 3,
    "train.lora_rank": 3,
    "nft.beta": 0.7,
    "nft.old_policy_decay": "on_policy",
}


def test_what_changes_the_numbers_is_refused_by_name_and_knobs_may_change(smoke_config):
    write_config(smoke_config)
    before = flatten(smoke_config)
    smoke_config.update_from_flattened_dict(KNOBS)
    assert all(flatten(smoke_config)[key] != before[key] for key in KNOBS)
    check_run_dir(smoke_config)
    smoke_config.update_from_flattened_dict(FIXED)
    with pytest.raises(RunDirError) as caught:
        check_run_dir(smoke_config)
    named = [line.strip() for line in str(caught.value).splitlines() if " -> " in line]
    assert sorted(named) == sorted(f"{key}: {before[key]!r} -> {FIXED[key]!r}" for key in FIXED)


def test_added_and_removed_rewards_are_differences():
    old, new = {"reward_fn.a": 1.0, "seed": 1}, {"reward_fn.b": 1.0, "seed": 1.0}
    assert differences(old, new) == [
        "reward_fn.a: 1.0 -> '(absent)'",
        "reward_fn.b: '(absent)' -> 1.0",
    ]


def rewrite(run_dir: Path, change: Callable[[dict], object]) -> None:
    file = run_dir / "config.json"
    stored = json.loads(file.read_text())
    change(stored)
    file.write_text(json.dumps(stored))


def test_a_key_that_the_run_does_not_know_is_at_its_default_there(smoke_config, tmp_path):
    write_config(smoke_config)
    rewrite(tmp_path / "run", lambda stored: stored.pop("train.shared_noise"))
    check_run_dir(smoke_config)
    smoke_config.train.shared_noise = True
    with pytest.raises(RunDirError, match=r"train\.shared_noise: False -> True"):
        check_run_dir(smoke_config)


def test_a_key_that_this_version_does_not_know_is_refused_as_such(smoke_config, tmp_path):
    write_config(smoke_config)
    rewrite(tmp_path / "run", lambda stored: stored.update({"train.magic": 3, "perf.magic": 4}))
    with pytest.raises(RunDirError) as caught:
        check_run_dir(smoke_config)
    assert "train.magic: 3 -> not a key of this version, which" in str(caught.value)
    assert "perf.magic" not in str(caught.value)


def test_changed_prompts_are_refused_by_file_unless_they_are_allowed(smoke_config, tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("a red circle\n")
    former = hash_splits([str(tmp_path)])
    # Without former hashes.
    check_prompts_kept(smoke_config, {}, former)
    check_prompts_kept(smoke_config, former, former)
    (tmp_path / "test.txt").write_text("a blue circle\n")
    now = hash_splits([str(tmp_path)])
    assert changed_prompts(former, now) == [(str(tmp_path), "test")]
    with pytest.raises(RunDirError) as caught:
        check_prompts_kept(smoke_config, former, now)
    message = str(caught.value)
    assert f"{tmp_path}/test.txt: SHA-256" in message and "train.txt" not in message
    assert "--config.allow_changed_prompts=True" in message
    smoke_config.allow_changed_prompts = True
    check_prompts_kept(smoke_config, former, now)


def test_nodes_with_different_prompts_are_refused_on_every_rank(tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("a red circle\n")
    name = str(tmp_path)
    own = hash_splits([name])
    other = {name: own[name] | {"train": "0"}}
    views = [own, own, other]
    monkeypatch.setattr(Distributed, "gather_objects", lambda self, value: views)
    for rank in range(3):
        with pytest.raises(
            ValueError, match="the train prompts of rank 2 differ from those of rank 0"
        ):
            hash_prompts([name], Distributed(rank, 3, rank, torch.device("cpu")))
    views[2] = own
    assert hash_prompts([name], Distributed(0, 3, 0, torch.device("cpu"))) == own


def test_a_reward_may_move_to_a_server_and_back_but_not_change_its_options(smoke_config):
    write_config(smoke_config)
    with smoke_config.reward_servers.unlocked():
        smoke_config.reward_servers.shapes = ("http://gpu7:8000",)
    check_run_dir(smoke_config)
    write_config(smoke_config)
    with smoke_config.reward_servers.unlocked():
        del smoke_config.reward_servers.shapes
    check_run_dir(smoke_config)
    with smoke_config.reward_options.unlocked():
        smoke_config.reward_options.shapes = {"rule": "lenient"}
    with pytest.raises(RunDirError, match=r"options.shapes.rule: '\(absent\)' -> 'lenient'"):
        check_run_dir(smoke_config)


def test_where_and_how_fast_a_reward_computes_may_change():
    old = {"reward_options.a.device": "cuda:1", "reward_options.a.batch_size": 32}
    new = {"stages.2.reward_options.a.threads": 2, "reward_options.b.base_url": "http://gpu7"}
    assert differences(old, new) == differences(new, old) == []
    # Not the same words elsewhere, nor other options.
    old = {"reward_options.a.dtype": "fp16", "reward_fn.device": 1.0, "reward_options.device.x": 1}
    assert len(differences(old, {})) == 3


def test_the_file_is_the_flat_configuration(smoke_config, tmp_path):
    check_run_dir(smoke_config)  # nothing there yet
    smoke_config.eval.held_out_rewards = ("ocr",)
    write_config(smoke_config)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["train.learning_rate"] == smoke_config.train.learning_rate
    assert written["reward_fn.shapes"] == 1.0 and written["eval.held_out_rewards"] == ["ocr"]
    assert differences(written, flatten(smoke_config)) == []
    assert not list((tmp_path / "run").glob("*.tmp"))
