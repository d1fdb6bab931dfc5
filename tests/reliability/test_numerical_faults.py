"""Numerical faults in whole epochs: counted, logged, survived, and alike on every rank.

The update alone, on numbers small enough for a closed form, is tests/test_update.py's.
"""

import dataclasses
import json
import math
import threading
from types import SimpleNamespace

import pytest
import torch

from diffusion_nft.advantages import group_advantages, optimality
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.evaluation.results import RESULTS_FILE
from diffusion_nft.images import Images
from diffusion_nft.models.precision import FIRST_LOSS_SCALE
from diffusion_nft.models.sd3 import SD3Model
from diffusion_nft.rewards import REWARDS, RewardOutput
from diffusion_nft.rewards.combine import RewardError, UnscoredError
from diffusion_nft.rollout import Rollout, rollout_metrics
from diffusion_nft.runs.checkpoint import Checkpointer
from diffusion_nft.tracking.metrics import Metrics, read_metrics
from diffusion_nft.trainer import Trainer
from tests.launch import TINY, make_trainer, one_thread, smoke, train_here
from tests.test_update import NUM, R, copies, make_fp16_learner, make_learner, make_rollout

CPU = torch.device("cpu")
ALONE = Distributed(0, 1, 0, CPU)


def rows_of_epochs(folder) -> list[dict]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if "reward/mean" in row]


class Constant:
    """Gives every image the same score."""

    value = 0.5

    def __init__(self, device: torch.device):
        del device

    def __call__(self, images, prompts, metadata):
        return RewardOutput(torch.full((len(prompts),), self.value))


class Tiny(Constant):
    """Differences below every epsilon."""

    def __call__(self, images, prompts, metadata):
        return RewardOutput(0.5 + torch.arange(len(prompts), dtype=torch.float64) * 1e-16)


def with_reward(folder, name: str, overrides: dict, monkeypatch):
    monkeypatch.setitem(REWARDS, name, f"{__name__}:{name.capitalize()}")
    config = smoke(folder, TINY | overrides)
    with config.unlocked():
        config.reward_fn = {name: 1.0}
    return config


def run(config) -> Trainer:
    with one_thread():
        trainer = make_trainer(config, ALONE)
        trainer.run()
    return trainer


@pytest.mark.parametrize(
    ("name", "standardize", "global_std"),
    [
        ("constant", False, True),
        pytest.param("constant", True, False, marks=pytest.mark.slow),
        pytest.param("tiny", True, False, marks=pytest.mark.slow),
    ],
)
def test_a_reward_without_spread_is_logged_and_survived(
    name, standardize, global_std, tmp_path, monkeypatch
):
    settings = {"sample.global_std": global_std, "sample.standardize_rewards": standardize}
    config = with_reward(tmp_path, name, settings | {"num_epochs": 1}, monkeypatch)
    trainer = run(config)
    (row,) = rows_of_epochs(tmp_path)
    assert row["reward/mean"] == pytest.approx(0.5) and row["optim/skipped_steps"] == 0
    assert row["reward/std"] == pytest.approx(0, abs=1e-15)
    if name == "constant":
        assert row["reward/frac_zero_std"] == 1
    # Every sample is as good as the others.
    quartiles = [row[f"reward/optimality_{name}"] for name in ("q25", "q50", "q75")]
    assert quartiles == pytest.approx([0.5] * 3)
    assert all(math.isfinite(row[key]) for key in ("loss/total", "optim/grad_norm"))
    weights = trainer.policy.state("ema").values()
    assert all(weight.isfinite().all() for weight in weights)


def test_a_nan_in_one_samples_latent_costs_that_epoch_alone(tmp_path, monkeypatch):
    trainer = make_trainer(smoke(tmp_path, TINY), ALONE)
    real = trainer._sample

    def sample() -> Rollout:
        rollout = real()
        if trainer.state.epoch == 1:
            rollout.x0[2, 0, 0, 0] = math.nan
            rollout = dataclasses.replace(rollout, x0_rms=math.nan)
        return rollout

    monkeypatch.setattr(trainer, "_sample", sample)
    with one_thread():
        trainer.run()
    rows = rows_of_epochs(tmp_path)
    assert [row["optim/skipped_steps"] for row in rows] == [0, 1, 1]
    assert [row["optim/nonfinite_losses"] > 0 for row in rows] == [False, True, False]
    assert [row["step"] for row in rows] == [1, 1, 2]
    # JSON has no NaN.
    assert [row["reward/x0_rms"] is None for row in rows] == [False, True, False]
    assert rows[1]["optim/grad_norm"] is None
    assert all(weight.isfinite().all() for weight in trainer.policy.state("ema").values())
    train_here(tmp_path / "sound", TINY | {"num_epochs": 1})
    sound, ours = rows_of_epochs(tmp_path / "sound")[0], rows[0]
    assert ours["loss/total"] == sound["loss/total"]


def test_too_many_faults_in_a_row_end_the_run_by_name(tmp_path, monkeypatch):
    settings = TINY | {"save_freq": 1, "train.max_skipped_steps": 1}
    trainer = make_trainer(smoke(tmp_path, settings), ALONE)
    real = trainer._sample
    before = {key: value.clone() for key, value in trainer.policy.state("current").items()}

    def sample() -> Rollout:
        rollout = real()
        rollout.x0[0, 0, 0, 0] = math.nan
        return rollout

    monkeypatch.setattr(trainer, "_sample", sample)
    with (
        one_thread(),
        pytest.raises(FloatingPointError, match=r"2 updates in a row .*max_skipped_steps = 1"),
    ):
        trainer.run()
    assert all(torch.equal(v, before[k]) for k, v in trainer.policy.state("current").items())
    saved = Checkpointer(tmp_path).load_latest()
    assert saved is not None
    assert saved.state["epoch"] == 1 and saved.state["updater"]["skipped"] == 1


def test_fp16_overflow_halves_the_scale_until_a_step_fits(tmp_path):
    """On the CPU too the scaler is on for fp16; a fault of scale alone does not last."""
    learner = make_fp16_learner(tmp_path)
    rollout = dataclasses.replace(make_rollout(), x0=make_rollout().x0.float())
    velocity, loss = learner.model.velocity, learner.algorithm.loss
    # As under autocast: the gradient passes through fp16, whose largest number is 65504.
    learner.model.velocity = lambda *given: velocity(*given).half().float()

    def steep(velocity, batch):
        losses, metrics = loss(velocity, batch)
        return losses * 1000, metrics

    learner.algorithm.loss = steep
    scales, skipped = [], []
    for epoch in range(12):
        values = learner.train_epoch(rollout, R, epoch=epoch)
        scales.append(values["optim/loss_scale"])
        skipped.append(values["optim/skipped_steps"])
        assert values["optim/nonfinite_losses"] == 0
        if learner.step:
            break
    assert learner.step == 1 and skipped[-1] == len(skipped) - 1 > 0
    assert scales == [FIRST_LOSS_SCALE / 2 ** min(i + 1, skipped[-1]) for i in range(len(scales))]
    assert learner.skipped_in_row == 0 and math.isfinite(values["optim/grad_norm"])


class Rendezvous(Distributed):
    """Ranks in threads: what each gives is exchanged where all have come."""

    def __init__(self, rank: int, shared: SimpleNamespace):
        super().__init__(rank, shared.size, rank, CPU)
        object.__setattr__(self, "shared", shared)

    def gather_objects(self, value):
        self.shared.values[self.rank] = value
        self.shared.barrier.wait(20)
        gathered = list(self.shared.values)
        self.shared.barrier.wait(20)
        return gathered

    def all_reduce_sum(self, tensors):
        gathered = self.gather_objects([t.clone() for t in tensors])
        for i, tensor in enumerate(tensors):
            tensor.copy_(sum(given[i] for given in gathered))


def test_a_nan_on_one_rank_is_skipped_by_all_of_them_in_step(tmp_path):
    size = 3
    shared = SimpleNamespace(size=size, values=[None] * size, barrier=threading.Barrier(size))
    learners, logs, errors = [], [[] for _ in range(size)], []
    for rank in range(size):
        learner = make_learner(tmp_path, rank, size, train__gradient_step_per_epoch=2)
        learner.dist = Rendezvous(rank, shared)
        learners.append(learner)

    def work(rank: int) -> None:
        try:
            for epoch in range(4):
                rollout = make_rollout(rank, size)
                if rank == 1 and epoch in (1, 2):
                    rollout.x0[0] = math.nan
                logs[rank].append(learners[rank].train_epoch(rollout, R, epoch=epoch))
        except BaseException as error:
            errors.append(error)
            shared.barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and not any(thread.is_alive() for thread in threads)
    first, *others = learners
    # Of the two steps of an epoch, the one that has the sample.
    assert first.step == 6 and first.skipped == 2
    for other, log in zip(others, logs[1:], strict=True):
        assert (other.step, other.skipped, other.skipped_in_row) == (6, 2, first.skipped_in_row)
        assert repr(log) == repr(logs[0])
        for name, weights in copies(first).items():
            for mine, theirs in zip(copies(other)[name], weights, strict=True):
                assert torch.equal(mine, theirs) and mine.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_log_of_an_epoch_takes_any_optimality(value, smoke_config, tmp_path):
    pytest.importorskip("tensorboard")
    r = torch.full((NUM,), 0.5, dtype=torch.float64)
    r[3] = value
    smoke_config.log.tensorboard = True
    with Metrics(smoke_config, tmp_path) as metrics:
        metrics.log(rollout_metrics(make_rollout(), r, 4), step=1, epoch=1)
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["reward/optimality_q50"] == 0.5


@pytest.mark.parametrize("scale", [0.0, 5e-324, 1e-300, 1e150])
@pytest.mark.parametrize("global_std", [True, False])
def test_optimality_stays_a_probability_at_any_scale_of_the_rewards(scale, global_std):
    rewards = torch.linspace(-1, 1, 12, dtype=torch.float64) * scale
    advantages = group_advantages(rewards, 4, global_std=global_std)
    r = optimality(advantages, adv_clip_max=5.0, adv_mode="all")
    assert r.isfinite().all() and 0 <= r.min() <= r.max() <= 1


class Sometimes(Constant):
    """Scores by prompt and position, and fails on the prompts in ``bad``."""

    bad: tuple[str, ...] = ()

    def __call__(self, images, prompts, metadata):
        if bad := [prompt for prompt in prompts if prompt in self.bad]:
            raise ValueError(f"no objects for {bad[0]}")
        return RewardOutput(images.mean((1, 2, 3)))


def test_a_run_goes_on_without_the_images_that_have_no_score(tmp_path, monkeypatch):
    settings = {"log.num_images": 4, "num_epochs": 2}
    config = with_reward(tmp_path, "sometimes", settings, monkeypatch)
    real = SD3Model.decode
    monkeypatch.setattr(SD3Model, "decode", lambda self, x0: broken(real(self, x0)))

    def broken(images):
        finite = torch.arange(len(images)) != 1  # of each batch the second: sample 1 of 4, line 2
        return Images(images.pixels, finite)

    with pytest.raises(UnscoredError, match=r"sample 1 of epoch 0 \('.*'\): it has NaN or inf"):
        run(config)
    # The same command meets the same images; the number that may be missing can change.
    with pytest.raises(UnscoredError, match="sample 1 of epoch 0"):
        run(config)
    config.max_unscored = 1
    trainer = run(config)
    rows = rows_of_epochs(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["reward/unscored"] == 1 and row["optim/skipped_steps"] == 0
        assert all(math.isfinite(v) for k, v in row.items() if k.startswith(("reward/", "loss/")))
    (evaluated,) = (r for r in read_metrics(tmp_path / "metrics.jsonl") if "eval/total" in r)
    assert evaluated["eval/unscored"] == 1 and math.isfinite(evaluated["eval/total"])
    (folder,) = (tmp_path / "eval").iterdir()
    scores = [json.loads(line)["scores"] for line in (folder / RESULTS_FILE).open()]
    assert scores[1] == {"total": None, "sometimes": None} and None not in scores[0].values()
    for adapter in ("current", "old", "ema"):
        assert all(weight.isfinite().all() for weight in trainer.policy.state(adapter).values())


def test_a_reward_that_fails_on_one_prompt_may_be_left_out(tmp_path, monkeypatch):
    config = with_reward(tmp_path, "sometimes", {"num_epochs": 1}, monkeypatch)
    prompts = make_trainer(config, ALONE)._prompts(0)
    monkeypatch.setattr(Sometimes, "bad", (prompts[1].text,))
    with pytest.raises(RewardError, match="ValueError: no objects for"):
        run(config)
    config.max_unscored = 2
    run(config)
    (row,) = rows_of_epochs(tmp_path)
    assert row["reward/unscored"] == 2 and math.isfinite(row["reward/mean"])


def test_no_run_goes_on_without_any_score(tmp_path, monkeypatch):
    config = with_reward(tmp_path, "constant", {"max_unscored": 99}, monkeypatch)
    monkeypatch.setattr(Constant, "value", math.nan)
    with pytest.raises(RewardError, match="none of the 4 images has a score: sample 0 of epoch 0"):
        run(config)
