"""Stopping on request: recording signals, agreement of the ranks, and saving."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from diffusion_nft.advantages import optimality
from diffusion_nft.distributed.preemption import REASON, Preempted, requested, stop_on_signals
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.images import Images
from diffusion_nft.rewards.combine import Scores
from diffusion_nft.rewards.worker import ScoringWorker
from diffusion_nft.rollout import gather_scores
from diffusion_nft.run import run
from diffusion_nft.runs.checkpoint import Checkpointer
from diffusion_nft.trainer import Trainer
from tests.launch import TINY, make_trainer, one_thread, smoke, train_here
from tests.reliability.compare import differences
from tests.reliability.experiments import SETTINGS
from tests.reliability.faults import Strike, struck

CPU = torch.device("cpu")
ALONE = Distributed(0, 1, 0, CPU)


def test_signals_are_recorded_within_the_block_only():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_signals():
        assert not requested()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested()
    assert not requested()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_first_interrupt_asks_and_the_second_kills():
    program = """
import os, signal
from diffusion_nft.distributed.preemption import requested, stop_on_signals
with stop_on_signals():
    os.kill(os.getpid(), signal.SIGINT)
    print(requested(), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("alive", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n"
    assert done.returncode == -signal.SIGINT


def test_a_stop_does_not_wait_for_a_slow_reward():
    release = threading.Event()
    with stop_on_signals():
        started = time.monotonic()
        with pytest.raises(Preempted), ScoringWorker(CPU) as worker:
            assert worker.submit(lambda _: release.wait(), Images.concatenate([]))
            os.kill(os.getpid(), signal.SIGTERM)
            assert not worker.submit(lambda _: release.wait(), Images.concatenate([]))
            worker.results()
        assert time.monotonic() - started < 5
    release.set()


@dataclass(frozen=True)
class WithPeer(Distributed):
    """Rank 0 of two, of which only the other was asked to stop."""

    def gather_objects(self, value):
        return [value, (Scores.concatenate([]), torch.zeros(0, 4), Preempted())]

    def all_reduce_sum(self, tensors):
        tensors[-1] += 1


def test_a_rank_without_a_signal_stops_with_its_peers_in_sampling():
    dist = WithPeer(0, 2, 0, CPU)
    total = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(Preempted):
        gather_scores(dist, lambda: [Scores(total, {"x": total})], torch.zeros(1, 4))


def build(run_dir: Path, overrides: dict | None = None) -> Trainer:
    return make_trainer(smoke(run_dir, SETTINGS | (overrides or {})), ALONE)


def test_a_rank_without_a_signal_stops_with_its_peers_in_training(tmp_path):
    trainer = build(tmp_path / "run", {"train.gradient_step_per_epoch": 1})
    rollout = trainer._sample()
    r = optimality(torch.linspace(-1, 1, 12), adv_clip_max=5.0, adv_mode="all")
    before = {name: trainer.policy.state(name) for name in ("current", "old", "ema")}
    before = {name: {k: v.clone() for k, v in group.items()} for name, group in before.items()}
    trainer.learner.dist = WithPeer(0, 1, 0, CPU)
    with pytest.raises(Preempted):
        trainer.learner.train_epoch(rollout, r, epoch=0)
    assert trainer.learner.step == 0
    for name, group in before.items():
        for key, value in trainer.policy.state(name).items():
            assert torch.equal(value, group[key])


def slow(*values: object):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("phase", "call", "epoch", "evaluated"),
    [
        slow("sampling", 1, 0, False),
        slow("scoring", 7, 1, True),
        ("training", 5, 0, False),  # in the second update of the first epoch
        slow("training", 12, 1, True),
        slow("update", 1, 0, False),
        slow("evaluation", 2, 1, False),
        slow("checkpoint", 2, 1, True),  # after the checkpoint is written
    ],
)
def test_a_stopped_run_saves_whole_epochs_and_ends_bitwise_equal(
    finished, tmp_path, capsys, phase, call, epoch, evaluated
):
    run_dir = tmp_path / "run"
    trainer = build(run_dir)
    strike = Strike(phase, call, signal="SIGTERM")
    with one_thread(), stop_on_signals(), struck(strike), pytest.raises(Preempted):
        trainer.run()
    assert f"{REASON}; the state of epoch {epoch} is being saved" in capsys.readouterr().err
    saved = Checkpointer(run_dir).load_latest()
    assert saved is not None
    assert (saved.state["epoch"], saved.state["evaluated"]) == (epoch, evaluated)
    train_here(run_dir, SETTINGS)
    assert differences(run_dir, finished) == []


def test_a_stop_that_comes_while_a_stage_ends_is_not_forgotten_in_the_next(tmp_path):
    stages = ({"num_epochs": 1}, {"num_epochs": 1, "nft.beta": 0.5})
    settings = TINY | {"stages": stages}
    struck_dir, other = tmp_path / "struck", tmp_path / "other"

    def train(run_dir: Path) -> None:
        with one_thread():
            run(smoke(run_dir, settings), ALONE)

    with struck(Strike("checkpoint", 1, signal="SIGTERM")), pytest.raises(Preempted):
        train(struck_dir)
    saved = Checkpointer(struck_dir).load_latest()
    assert saved is not None and saved.state["epoch"] == 1
    train(struck_dir)
    train(other)
    assert differences(struck_dir, other) == []
