"""Whole runs of every family, on tiny random weights: what is optimised goes up, on any number of
processes, also after a kill.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_nft.runs.checkpoint import load_checkpoint
from diffusion_nft.tracking.metrics import read_metrics
from tests.launch import train_here, train_on_ranks
from tests.models.tiny import FAMILIES, SIZE, save

PROMPTS = ["a red circle", "two blue squares and a much longer text", "x", "a green sky"]


def make_base(family: str, folder: Path) -> Path:
    """``folder`` with the pipeline, in "model", and a prompt set, in "prompts"."""
    save(family, folder / "model")
    (folder / "prompts").mkdir()
    for split in ("train", "test"):
        (folder / "prompts" / f"{split}.txt").write_text("\n".join(PROMPTS))
    return folder


def settings(base: Path, **changes: Any) -> dict[str, Any]:
    return {
        "pretrained.model": str(base / "model"),
        "pretrained.max_sequence_length": 24,
        "dataset": str(base / "prompts"),
        "resolution": SIZE,
        "eval.resolution": 32,
        "reward_fn": {"jpeg_compressibility": 1.0},
        "sample.num_groups": 3,
        "sample.num_image_per_prompt": 4,
        "sample.num_steps": 3,
        "train.gradient_step_per_epoch": 1,
        "train.sigma_range": 0.7,
        "train.timestep_fraction": 1.0,
        "train.lora_targets": "attention+mlp",
        "eval.num_steps": 2,
        "eval.num_prompts": 2,
        "eval.at_start": False,
        "eval_freq": 0,
        "checkpoint.keep": 0,
        **changes,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_optimised_goes_up(family, tmp_path):
    base = make_base(family, tmp_path / "base")
    train_here(
        tmp_path / "run",
        settings(
            base,
            **{
                "num_epochs": 5,
                "sample.num_groups": 4,
                "sample.num_image_per_prompt": 16,
                "sample.batch_size": 64,
                "train.batch_size": 64,
                "train.gradient_step_per_epoch": 4,
                "train.learning_rate": FAMILIES[family].learning_rate,
                "train.sigma_range": 1.0,
                "nft.beta": 0.1,
                "nft.kl_weight": 0.0,
                "nft.old_policy_decay": "on_policy",
                "eval.at_start": True,
                "eval.num_prompts": 4,
                "eval.num_steps": 3,
                "log.num_images": 4,
            },
        ),
    )
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    trained = [row["reward/mean"] for row in rows if "reward/mean" in row]
    before, after = (row["eval/total"] for row in rows if "eval/total" in row)
    assert min(trained[-2:]) > trained[0] + 1e-5 and after > before


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """``runs / family / "one"`` and ``"two"``, on one and two processes, in float64."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = []
    for family in FAMILIES:
        base = make_base(family, folder / family)
        given = settings(base, **{"mixed_precision": "fp64", "num_epochs": 2, "save_freq": 1})
        train_here(base / "one", given)
        jobs.append((2, base / "two", given | {"train.batch_size": 3, "sample.batch_size": 5}))
        # As a run that was killed after its first epoch.
        shutil.copytree(base / "one", base / "killed")
        shutil.rmtree(base / "killed" / "checkpoints" / "checkpoint-2")
        train_here(base / "killed", given)
    train_on_ranks(jobs)
    return folder


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(run_dir / "checkpoints" / "checkpoint-2").tensors["current"]


@pytest.mark.multiproc
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_is_the_same_on_two_processes_and_after_a_kill(runs, family):
    one, two, killed = (weights(runs / family / name) for name in ("one", "two", "killed"))
    assert any(value.any() for key, value in one.items() if ".lora_B." in key)
    for key, value in one.items():
        assert torch.equal(killed[key], value), key
        torch.testing.assert_close(two[key], value, rtol=1e-9, atol=1e-9)
    logs = [read_metrics(runs / family / name / "metrics.jsonl") for name in ("one", "two")]
    for ours, theirs in zip(*logs, strict=True):
        for key in {"loss/total", "reward/mean", "optim/grad_norm", "eval/total"} & ours.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key
