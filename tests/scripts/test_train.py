"""The training command: mistakes cost one line, and it runs under torchrun."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.run import devices
from diffusion_nft.tracking.metrics import read_metrics
from diffusion_nft.validation.schema import SCHEMA
from tests.launch import run, smoke, train, train_command
from tests.reliability.bad_inputs import exit_message, training_script

# One is found in the flags, one when the model is loaded.  tests/reliability/test_bad_*.py have the
# others, in one process.
MISTAKES = {
    "a mistyped key": (["train.learning_rat=0.1"], "learning_rate"),
    "a missing model": (["pretrained.model=nobody/nothing", "resolution=48"], "nobody/nothing"),
}


@pytest.mark.multiproc
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(name, tmp_path):
    overrides, word = MISTAKES[name]
    done = run(train_command(tmp_path / "run", *overrides))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr[-1500:]
    lines = [line for line in done.stderr.splitlines() if line.strip() and " INFO " not in line]
    assert any(word in line for line in lines) and len(lines) <= 4, done.stderr[-1500:]
    assert not (tmp_path / "run" / "checkpoints").exists()


def ended(monkeypatch, save_dir) -> str:
    """The message with which training into ``save_dir`` ends, in this process."""
    module = training_script()
    monkeypatch.setattr(module, "CONFIG", SimpleNamespace(value=smoke(save_dir)))
    return exit_message(lambda: module.main(["train"]))


def test_a_launcher_without_torchrun_costs_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    message = ended(monkeypatch, tmp_path / "run")
    assert "srun started 8 processes" in message and "torchrun per node" in message
    assert "\n" not in message and not (tmp_path / "run").exists()


def test_a_full_gpu_costs_two_lines_that_say_what_to_turn(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nStack:")

    monkeypatch.setattr("diffusion_nft.run.run", full)
    first, second = ended(monkeypatch, tmp_path / "run").splitlines()
    assert first == "CUDA out of memory. Tried to allocate 2.00 GiB."
    for key in re.findall(r"[a-z]+\.[a-z_]+", second.partition(";")[0]):
        assert key in SCHEMA
    assert "lower train.batch_size" in second and f"continues the run in {tmp_path}" in second


def test_the_devices_are_named(monkeypatch):
    ranks = Distributed(0, 2, 0, torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert devices(ranks) == f"2 process(es) on CPUs (torch {torch.__version__})"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert devices(ranks).endswith(", built for CUDA 13.0, finds no GPU that it can use)")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    ranks = Distributed(0, 2, 0, torch.device("cuda"))
    assert devices(ranks) == "2 process(es), this one on NVIDIA H100"


SMALL = ["num_epochs=1", "log.num_images=4", "eval.num_prompts=4", "eval.num_steps=2"]


@pytest.mark.multiproc
def test_two_processes_under_torchrun(tmp_path):
    done = train(tmp_path / "run", *SMALL, nproc=2)
    # Said once, not once a rank.
    assert done.stdout.count("best eval/total") == 1
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 1]
    environment = json.loads((tmp_path / "run" / "environments.jsonl").read_text())
    assert environment["world_size"] == 2
