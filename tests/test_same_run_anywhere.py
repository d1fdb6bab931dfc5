"""The number of processes and the micro-batch sizes change nothing but the order of summation."""

import json
from pathlib import Path

import pytest
import torch

from diffusion_nft.checkpoint import Checkpoint, Checkpointer
from diffusion_nft.metrics import read_metrics
from tests.launch import train

pytestmark = pytest.mark.multiproc

# name -> (processes, overrides); the smoke preset has 12 samples an epoch, so 5 and 7 do not divide.
VARIANTS = {
    "one": (1, ()),
    "two": (2, ()),
    "three": (3, ()),
    "micro": (1, ("train.batch_size=3", "sample.batch_size=12")),
}


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    assert a.keys() == b.keys()
    difference = sum(float((a[key] - b[key]).double().square().sum()) for key in a)
    return (difference / sum(float(b[key].double().square().sum()) for key in b)) ** 0.5


@pytest.fixture(scope="module", params=["fp64", "no"])
def runs(request, tmp_path_factory) -> tuple[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp(request.param)
    for name, (nproc, overrides) in VARIANTS.items():
        train(
            folder / name,
            f"mixed_precision={request.param}",
            "checkpoint.keep=0",
            "log.num_images=0",
            *overrides,
            nproc=nproc,
        )
    return request.param, {name: folder / name for name in VARIANTS}


def load(run_dir: Path, step: int) -> Checkpoint:
    checkpointer = Checkpointer(run_dir)
    return checkpointer.load(run_dir / "checkpoints" / f"checkpoint-{step}")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "one"])
def test_weights_gradients_and_rewards_agree(runs, variant):
    precision, folders = runs
    weights_within, gradient_within = (1e-9, 1e-9) if precision == "fp64" else (1e-3, 1e-5)
    metrics = {name: read_metrics(folder / "metrics.jsonl") for name, folder in folders.items()}
    last = max(row["step"] for row in metrics["one"])
    one, other = (load(folders[name], last) for name in ("one", variant))
    for adapter in ("current", "old", "ema"):
        assert relative_difference(other.tensors[adapter], one.tensors[adapter]) <= weights_within

    # Two optimizer steps an epoch; Adam's first moment carries the accumulated gradients.
    first = min(row["step"] for row in metrics["one"] if "optim/grad_norm" in row)
    moments = [
        {k: v for k, v in load(folders[name], first).tensors["optimizer"].items() if "exp_avg" in k}
        for name in ("one", variant)
    ]
    moments = [{k: v for k, v in m.items() if "sq" not in k} for m in moments]
    assert moments[0]
    assert relative_difference(moments[1], moments[0]) <= gradient_within * 10
    for ours, theirs in zip(metrics["one"], metrics[variant], strict=True):
        for key in ours:
            if key.startswith(("reward/", "eval/")) and key != "reward/x0_rms":
                assert ours[key] == pytest.approx(theirs[key], rel=1e-6, abs=1e-6), key


def test_evaluations_are_byte_identical(runs):
    _, folders = runs
    texts = {
        name: (folder / "eval" / "epoch-000002" / "average_scores.json").read_bytes()
        for name, folder in folders.items()
        if name != "micro"
    }
    assert json.loads(texts["one"])["num_samples"] == 12
