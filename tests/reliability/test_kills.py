"""Killed and stopped commands; tests/reliability/kill_tally.py makes many more."""

import random
import shutil
from pathlib import Path

import pytest

from diffusion_nft.runs.checkpoint import Checkpointer, load_checkpoint
from tests.launch import run, torchrun, train_here
from tests.reliability.compare import differences
from tests.reliability.experiments import (
    FP64_WITHIN,
    KINDS,
    SETTINGS,
    Laboratory,
    command,
    finish,
    plan,
    start,
)
from tests.reliability.faults import PHASES, Strike

pytestmark = pytest.mark.multiproc


RESTARTED = """
import os, signal
from diffusion_nft.distributed.ranks import distributed
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
with distributed(timeout_minutes=1) as dist:
    dist.barrier()
    if dist.rank == 1 and attempt == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    # In a single write, as both ranks share an unbuffered pipe.
    print(f"{attempt} {dist.gather_objects(dist.rank)}\\n", end="", flush=True)
"""


def test_torchruns_restarted_ranks_find_one_another(tmp_path):
    (tmp_path / "ranks.py").write_text(RESTARTED)
    line = torchrun(2, str(tmp_path / "ranks.py"))
    done = run([*line[:3], "--max-restarts=1", "--monitor-interval=0.1", *line[3:]])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 [0, 1]"] * 2


@pytest.mark.slow
def test_torchrun_restarts_a_run_when_a_rank_is_killed(tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    strike = Strike("training", 5, rank=1)
    process = start(command(run_dir, 2, plan=strike.text(), fp64=True, restarts=1), log)
    assert finish(process) == 0, log.read_text()
    # The fifth micro-batch is in the second epoch.
    assert "continuing from" in log.read_text()
    train_here(tmp_path / "one", SETTINGS | {"mixed_precision": "fp64"})
    assert differences(run_dir, tmp_path / "one", FP64_WITHIN) == []


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("laboratory"))


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(KINDS)))
def test_every_kind_of_stop_in_some_phase(laboratory, index):
    kind, phase = plan(index)
    rng = random.Random(index)
    result = laboratory.run(kind, laboratory.choose(kind, phase, rng), f"run-{index}", rng)
    assert result.problems == []


def test_the_plan_pairs_every_kind_with_every_phase():
    number = len(KINDS) * len(PHASES)
    assert len({(kind.name, phase) for kind, phase in map(plan, range(number))}) == number


def test_differences_are_found(finished: Path, tmp_path):
    assert differences(finished, finished) == []
    former, other = finished / "checkpoints" / "checkpoint-4", tmp_path / "other"
    shutil.copytree(finished, other)
    checkpoint = load_checkpoint(former)
    next(iter(checkpoint.tensors["ema"].values())).view(-1)[0] *= 1 + 1e-6

    def keep_lora(folder: Path) -> None:
        shutil.copytree(former / "lora", folder / "lora")
        shutil.copy(former / "pytorch_lora_weights.safetensors", folder)

    state = checkpoint.state | {"evaluated": False}
    Checkpointer(other).save(4, tensors=checkpoint.tensors, state=state, write_extra=keep_lora)
    log = other / "metrics.jsonl"
    log.write_text(log.read_text().replace("0.0005", "0.00050001"))
    found = differences(other, finished)
    assert len(found) == 3, found
    assert found[0].startswith("log, epoch 1: optim/learning_rate 0.00050001")
    assert found[1].startswith("ema differs by") and found[2] == "state.json differs"
    assert differences(other, finished, within=1e-5) == ["state.json differs"]

    def again(**changes) -> list[str]:
        tensors, state = checkpoint.tensors | changes, checkpoint.state
        Checkpointer(other).save(4, tensors=tensors, state=state, write_extra=keep_lora)
        return differences(other, finished, within=1e-5)

    assert again() == []
    (tail,) = differences(other, finished, within=1e-12)
    assert tail.startswith("ema differs by")
    moments = checkpoint.tensors["optimizer"]
    for kind in ("exp_avg", "exp_avg_sq"):
        zeroed = {k: v * 0 if k.endswith(f".{kind}") else v for k, v in moments.items()}
        assert again(optimizer=zeroed) == [f"optimizer differs by 1.0e+00 in {kind}"]
    (other / "checkpoints" / "best.json").write_text('{"checkpoint": "checkpoint-4"}')
    best = Checkpointer(finished).best()
    assert best is not None and best.name != "checkpoint-4"
    assert "best.json differs" in again()
