"""A run on another device than the CPU: tensors never mix, and the numbers are the CPU's."""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from diffusion_nft.distributed.ranks import Distributed
from tests.launch import insist, make_trainer, one_thread, run, smoke
from tests.simulated_gpu import WAITS, simulated_gpu

SETTINGS = {
    "num_epochs": 1,
    "eval.num_prompts": 2,
    "sample.num_groups": 2,
    "sample.num_image_per_prompt": 2,
    "log.num_images": 2,
    "sample.batch_size": 4,
}
VARIANTS = {
    "nft": {"nft.kl_weight": 0.1, "train.gradient_step_per_epoch": 2},
    "flow_grpo": {
        "algorithm": "flow_grpo",
        "sample.solver": "flow",
        "sample.noise_level": 0.7,
        "sample.guidance_scale": 2.0,
        "train.adv_mode": "all",
    },
    "bf16": {
        "mixed_precision": "bf16",
        "perf.gradient_checkpointing": True,
        "eval.at_start": False,
        "sample.num_groups": 1,
    },
}


def rows(folder: Path, device: torch.device, **settings) -> list[dict]:
    """The metrics of a run on ``device``."""
    with one_thread():
        make_trainer(smoke(folder, SETTINGS | settings), Distributed(0, 1, 0, device)).run()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def compare(name: str) -> None:
    """Insists that a run of the variant ``name`` logs the same on both devices."""
    gpu = simulated_gpu()  # before autograd looks for devices
    with tempfile.TemporaryDirectory() as folder:
        on_cpu, on_gpu = (
            rows(Path(folder, device.type), device, **VARIANTS[name])
            for device in (torch.device("cpu"), gpu)
        )
    assert len(on_cpu) == len(on_gpu) > 1
    for left, right in zip(on_cpu, on_gpu, strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            if name == "bf16" and key in ("loss/total", "reward/x0_rms"):
                assert right[key] == pytest.approx(value, rel=0.02), key
            # Attention is computed by its formula rather than by a fused kernel.
            elif name != "bf16" and isinstance(value, float) and not key.startswith("time/"):
                assert right[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_on_another_device_is_the_same(name):
    code = f"import tests.conftest; from tests.test_simulated_gpu import compare; compare({name!r})"
    insist(run([sys.executable, "-c", code]))


def test_the_simulated_device_does_not_mix_with_the_cpu():
    here = torch.ones(2, 3)
    there = here.to(simulated_gpu())
    assert (there + there).cpu().equal(here + here)
    for operation in (lambda: there + here, lambda: here[there.long()], lambda: here.add_(there)):
        with pytest.raises(RuntimeError, match="meets one on the GPU"):
            operation()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    WAITS.clear()
    assert float(there.sum()) == 6
    assert WAITS.total() == 1
