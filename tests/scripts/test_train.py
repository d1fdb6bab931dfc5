"""The training command: mistakes cost one line, and it runs under torchrun."""

import json
import re
import sys

import pytest
import torch

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.run import devices
from diffusion_nft.tracking.metrics import read_metrics
from diffusion_nft.validation.schema import SCHEMA
from tests.launch import run, train, train_command

MISTAKES = {
    "a mistyped key": (["train.learning_rat=0.1"], "learning_rate"),
    "a wrong type": (["train.batch_size=many"], "train.batch_size"),
    "a wrong value": (["sample.num_image_per_prompt=1"], "sample.num_image_per_prompt"),
    "an unknown reward": (["reward_fn={'pikscore': 1.0}"], "pikscore"),
    "a missing data set": (["dataset=nowhere"], "nowhere"),
    "an unknown solver": (["sample.solver=dmp2"], "dpm2"),
    "a missing model": (["pretrained.model=nobody/nothing", "resolution=48"], "nobody/nothing"),
}


def assert_one_line_error(done, *words: str) -> None:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr[-1500:]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert any(all(word in line for word in words) for line in lines), done.stderr[-1500:]
    assert len(lines) <= 4, done.stderr[-1500:]


@pytest.mark.multiproc
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(name, tmp_path):
    overrides, word = MISTAKES[name]
    done = run(train_command(tmp_path / "run", *overrides))
    assert_one_line_error(done, word)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.multiproc
def test_a_launcher_without_torchrun_costs_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    done = run(train_command(tmp_path / "run"))
    assert_one_line_error(done, "srun started 8 processes", "torchrun per node")
    assert not (tmp_path / "run").exists()


@pytest.mark.multiproc
def test_an_unknown_preset_costs_one_line(tmp_path):
    done = run(train_command(tmp_path / "run", preset="shapez"))
    assert_one_line_error(done, "shapez", "shapes_smoke")


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("config", "word"), [("config/nf.py:shapes", "no such file"), ("config/nft.py", "shapes_smoke")]
)
def test_a_preset_that_is_not_named_rightly_costs_one_line(config, word):
    assert_one_line_error(
        run([sys.executable, "scripts/train_nft_sd3.py", "--config", config]), word
    )


FULL_GPU = """
import runpy, sys, torch
import diffusion_nft.run

def run(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\\nStack:")

diffusion_nft.run.run = run
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.multiproc
def test_a_full_gpu_costs_two_lines_that_say_what_to_turn(tmp_path):
    done = run([sys.executable, "-c", FULL_GPU, *train_command(tmp_path / "run")[1:]])
    first, second = done.stderr.splitlines()
    assert done.returncode == 1 and first == "CUDA out of memory. Tried to allocate 2.00 GiB."
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


@pytest.mark.multiproc
def test_two_processes_under_torchrun(tmp_path):
    done = train(tmp_path / "run", "num_epochs=1", "log.num_images=4", nproc=2)
    # Said once, not once a rank.
    assert done.stdout.count("best eval/total") == 1
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 1]
    environment = json.loads((tmp_path / "run" / "environments.jsonl").read_text())
    assert environment["world_size"] == 2
