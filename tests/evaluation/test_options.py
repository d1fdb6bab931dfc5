"""Evaluation options: precedence, names of folders, and records of settings."""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.evaluation import options as settings
from diffusion_nft.evaluation.options import add_evaluation_flags, add_model_flags, resolve_options
from tests.launch import train_here

HERE = Distributed(0, 1, 0, torch.device("cpu"))
LENGTH = "max_sequence_length"


def choose(*flags: object, script: dict | None = None):
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    add_evaluation_flags(parser)
    return resolve_options(parser.parse_args(list(map(str, flags))), script)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mine"
    tiny = {"num_epochs": 1, "sample.num_groups": 1, "eval.num_prompts": 1}
    train_here(folder, tiny | {"eval_freq": 0, "eval.at_start": False, "eval.seed": 5})
    return folder


def test_a_flag_wins_then_the_script_then_the_run_then_the_default(run_dir):
    run = ("--checkpoint_path", run_dir)
    assert choose(*run).config.eval.seed == 5
    assert choose(*run, "--seed", 6).config.eval.seed == 6
    assert choose("--pretrained", "shapes").config.eval.seed == 42
    steps = {"eval.num_steps": 3}
    assert choose(*run, script=steps).config.eval.num_steps == 3
    assert choose(*run, "--num_inference_steps", 4, script=steps).config.eval.num_steps == 4


def test_the_published_length_is_for_the_published_model():
    assert choose().config.pretrained[LENGTH] == 128
    assert choose("--match_published").config.pretrained[LENGTH] == 256
    assert choose("--match_published", "--max_sequence_length", 77).config.pretrained[LENGTH] == 77
    assert choose("--match_published", "--pretrained", "shapes").config.pretrained[LENGTH] == 8
    script = {"pretrained.model": "shapes"}
    assert choose("--match_published", script=script).config.pretrained[LENGTH] == 8


def test_a_folder_is_named_by_what_is_most_often_varied(run_dir):
    assert choose().folder_name(0) == "base-cfg1-seed42"
    flags = ("--guidance_scale", 4.5, "--seed", 1, "--match_published")
    assert choose(*flags).folder_name(8) == "base-cfg4.5-seed1-published-8lines"
    assert choose("--checkpoint_path", run_dir).folder_name(0).startswith("mine-checkpoint-")
    other = choose("--solver", "dpm2", "--num_inference_steps", 20, "--mixed_precision", "bf16")
    assert other.folder_name(0) == "base-cfg1-seed42-dpm2-20steps-bf16"
    (weights,) = run_dir.glob("checkpoints/checkpoint-*/lora")
    name = choose("--pretrained", "shapes", "--lora_hf_path", weights, "--adapter", "old").name
    assert name == f"mine-{weights.parent.name}-lora-old"
    assert choose("--lora_hf_path", "owner/name").name == "owner-name"


def test_a_model_is_named_as_it_was_chosen(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Local folders of these names are not used.
    for folder in ("base", "shapes"):
        (tmp_path / folder).mkdir()
    assert choose().name == "base" and choose("--pretrained", "shapes").name == "shapes"
    (tmp_path / "favourite").symlink_to(run_dir)
    chosen = choose("--checkpoint_path", "favourite")
    assert chosen.name == f"favourite-{chosen.checkpoint.name}"
    # A checkpoint outside a run directory, and as the working directory.
    shutil.copytree(chosen.checkpoint, tmp_path / "copied")
    assert choose("--checkpoint_path", "copied").name.endswith(f"{tmp_path.name}-copied")
    monkeypatch.chdir(chosen.checkpoint)
    assert choose("--checkpoint_path", ".").name == f"mine-{chosen.checkpoint.name}"


def test_every_path_is_expanded(run_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(run_dir.parent))
    assert choose("--checkpoint_path=~/mine").run["eval.seed"] == 5
    assert choose("--lora_hf_path=~/mine/lora").lora == f"{run_dir}/lora"
    parser = argparse.ArgumentParser()
    add_evaluation_flags(parser)
    assert parser.parse_args(["--output_dir=~/out"]).output_dir == run_dir.parent / "out"


def test_the_record_has_all_settings_that_affect_results(run_dir, tmp_path):
    test = tmp_path / "test_metadata.jsonl"
    test.write_text('{"prompt": "a red circle"}\n')
    servers = ("--reward_servers", "shapes=http://127.0.0.1:9", "ocr=http://127.0.0.1:8")
    choice = choose("--checkpoint_path", run_dir, *servers)
    record = choice.record(HERE, str(tmp_path), {"shapes": 1.0}, 3)
    json.dumps(record)
    digest = hashlib.sha256(test.read_bytes()).hexdigest()
    assert record["dataset_sha256"] == digest and record["limit"] == 3
    (weights,) = run_dir.glob("checkpoints/checkpoint-*/lora/adapter_model.safetensors")
    assert record["lora_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["eval.seed"] == 5 and record["eval.solver"] == "flow"
    assert not {"output_dir", "world_size"} & record.keys()
    assert record["reward_servers"] == {"shapes": ("http://127.0.0.1:9",)}
    assert record["adapter"] == "default"


def test_flags_override_options_and_servers_of_the_run(run_dir, tmp_path, monkeypatch):
    (tmp_path / "test_metadata.jsonl").write_text('{"prompt": "a red circle"}\n')
    own = {"reward_options.shapes.rule": "lenient", "reward_servers.shapes": ["http://127.0.0.1:9"]}
    real = settings.load_checkpoint

    def loaded(path):
        checkpoint = real(path)
        checkpoint.state["config"] |= own
        return checkpoint

    monkeypatch.setattr(settings, "load_checkpoint", loaded)
    run = ("--checkpoint_path", run_dir)
    assert choose(*run).served == {"shapes": ["http://127.0.0.1:9"]}
    here = choose(*run, "--reward_servers", "shapes=local")
    assert here.served == {}
    assert here.rewards({"shapes": 1.0}, HERE)._rewards["shapes"].rule == "lenient"
    other = choose(*run, "--reward_servers", "shapes=local", "--option", "shapes.rule=standard")
    assert other.rewards({"shapes": 1.0}, HERE)._rewards["shapes"].rule == "standard"
    record = other.record(HERE, str(tmp_path), {"shapes": 1.0}, 0)
    assert record["reward_options"] == {"shapes": {"rule": "standard"}}
    assert record["reward_servers"] == {}
    # Options of rewards with a server, and API keys, are not recorded.
    record = choose(*run).record(HERE, str(tmp_path), {"shapes": 1.0}, 0)
    assert record["reward_options"] == {}
    with pytest.raises(ValueError, match=r"at its server, .*:9, or use .* shapes=local"):
        choose(*run, "--option", "shapes.rule=standard")
    own.update({"reward_options.unifiedreward.api_key": "s3cret"})
    record = choose(*run).record(HERE, str(tmp_path), {"unifiedreward": 1.0}, 0)
    assert "s3cret" not in json.dumps(record)
