"""Training on the sampler's own steps: gradients of a linear model, and short runs of each
algorithm on the built-in model.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal

from diffusion_nft.algorithms import build_algorithm
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models.embeddings import Conditioning
from diffusion_nft.models.precision import Precision
from diffusion_nft.rollout import Rollout
from diffusion_nft.runs.checkpoint import load_checkpoint
from diffusion_nft.solvers import Trajectory, sample_trajectory
from diffusion_nft.tracking.metrics import read_metrics
from diffusion_nft.update import Learner
from tests import test_update
from tests.launch import make_trainer, one_thread, smoke, train_here, train_on_ranks
from tests.test_update import CPU, NUM, SHAPE, Counted, LinearPolicy, copies

LEVELS = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64)
WEIGHTS = torch.linspace(-2, 3, NUM, dtype=torch.float64)
NOISE = 0.7
POOLED = torch.linspace(-0.5, 0.5, NUM, dtype=torch.float64).reshape(-1, 1)
EMPTY = 0.3
FLOW_GRPO = {
    "algorithm": "flow_grpo",
    "sample.solver": "flow",
    "sample.noise_level": NOISE,
    "train.sigma_choice": "first",
    "train.timestep_fraction": 0.99,
}


def predict(weights, xt, sigma, pooled) -> torch.Tensor:
    """``(theta xt + sigma phi) (1 + prompt)``."""
    theta, phi = weights
    v = theta * xt + sigma.reshape(-1, 1, 1, 1) * phi
    return v * (1 + pooled.reshape(-1, 1, 1, 1))


def guided(weights, xt, sigma, pooled, scale: float) -> torch.Tensor:
    """Of two predictions, each written out."""
    empty = torch.full_like(pooled, EMPTY)
    without = predict(weights, xt, sigma, empty)
    return (1 - scale) * without + scale * predict(weights, xt, sigma, pooled)


def make_learner(tmp_path, rank: int = 0, world_size: int = 1, **overrides) -> Learner:
    settings = FLOW_GRPO | {
        "train.gradient_step_per_epoch": 1,
        "train.batch_size": 5,
        "grpo.clip_range": 0.02,
        "grpo.kl_weight": 0.1,
    }
    config = smoke(tmp_path, settings | {k.replace("__", "."): v for k, v in overrides.items()})
    policy = LinearPolicy()
    with torch.no_grad():  # small differences: ratios in and beyond the range
        for name in ("old", "reference"):
            for own, current in zip(policy.weights[name], policy.weights["current"], strict=True):
                own.copy_(current + 0.1 * own)
    model = SimpleNamespace(
        precision=Precision("fp64", CPU),
        velocity=lambda xt, s, cond: predict(policy.weights[policy.active], xt, s, cond.pooled),
        guided=lambda without, with_prompt, scale: without + scale * (with_prompt - without),
    )
    return Learner(
        config,
        dist=Counted(rank, world_size, rank, CPU),
        model=model,
        policy=policy,
        algorithm=build_algorithm(config),
    )


def make_rollout(learner: Learner, scale: float, rank: int = 0, world_size: int = 1) -> Rollout:
    """Samples of the old policy of ``learner`` on a rank."""
    old = learner.policy.weights["old"]
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        xs, log_probs = sample_trajectory(
            "flow",
            lambda x, s: guided(old, x, s, POOLED, scale),
            torch.randn(NUM, *SHAPE, generator=g, dtype=torch.float64),
            LEVELS,
            generator=g,
            noise_level=NOISE,
        )
    rollout = test_update.make_rollout(rank, world_size)
    mine = slice(rollout.indices.start, rollout.indices.stop)
    if not rollout.indices:
        return rollout
    return replace(
        rollout,
        x0=xs[-1, mine],
        cond=Conditioning(
            replace(rollout.cond.prompt, pooled=POOLED[mine]),
            replace(rollout.cond.prompt, pooled=torch.full_like(POOLED[mine], EMPTY)),
        ),
        trajectory=Trajectory(xs[:, mine], log_probs[:, mine]),
    )


def expected_gradient(weights, rollout: Rollout, scale: float) -> list[torch.Tensor]:
    """Autograd of the mean over all samples and the first three steps, from the formulas."""
    assert rollout.trajectory is not None
    xs, old_log_probs = rollout.trajectory
    theta = [w.requires_grad_() for w in weights["current"]]
    losses = []
    for step in range(3):
        s, t = float(LEVELS[step]), float(LEVELS[step + 1])
        g2 = NOISE**2 * s / (1 - (t if s == 1 else s))
        sigma = torch.full((NUM,), s, dtype=torch.float64)

        def gaussian(w, step=step, s=s, t=t, g2=g2, sigma=sigma):
            v = guided(w, xs[step], sigma, POOLED, scale)
            x = xs[step]
            mean = x * (1 + g2 / (2 * s) * (t - s)) + v * (1 + g2 * (1 - s) / (2 * s)) * (t - s)
            return Normal(mean, (g2 * (s - t)) ** 0.5)

        now, ref = gaussian(theta), gaussian(weights["reference"])
        ratio = (now.log_prob(xs[step + 1]).mean((1, 2, 3)) - old_log_probs[step]).exp()
        policy = torch.maximum(-WEIGHTS * ratio, -WEIGHTS * ratio.clamp(0.98, 1.02))
        kl = torch.distributions.kl_divergence(now, ref).mean((1, 2, 3))
        losses.append(policy + 0.1 * kl)
    torch.stack(losses).mean().backward()
    return [w.grad for w in theta]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_gradient_is_autograds_through_both_halves_of_guidance(tmp_path, scale):
    learner = make_learner(tmp_path, sample__guidance_scale=scale)
    before, rollout = copies(learner), make_rollout(learner, scale)
    values = learner.train_epoch(rollout, WEIGHTS, epoch=0)
    assert 0 < values["loss/clip_fraction"] < 1, "some are clipped, and not all"
    expected = expected_gradient(before, rollout, scale)
    torch.testing.assert_close(learner.dist.reduced[0], expected, rtol=1e-9, atol=1e-12)
    assert values["optim/old_policy_decay"] == 0.0
    total = values["loss/policy"] + 0.1 * values["loss/kl"]
    assert values["loss/total"] == pytest.approx(total)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 7), (5, 1), (13, 36)])
def test_ranks_and_micro_batches_change_nothing(tmp_path, world_size, batch_size):
    one = make_learner(tmp_path, sample__guidance_scale=2.0)
    one.train_epoch(make_rollout(one, 2.0), WEIGHTS, epoch=3)
    parts = []
    for rank in range(world_size):
        learner = make_learner(
            tmp_path, rank, world_size, sample__guidance_scale=2.0, train__batch_size=batch_size
        )
        learner.train_epoch(make_rollout(learner, 2.0, rank, world_size), WEIGHTS, epoch=3)
        parts.append(learner.dist.reduced[0])
    sums = [sum(gradients) for gradients in zip(*parts, strict=True)]
    torch.testing.assert_close(sums, one.dist.reduced[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("solver", "scale"),
    [
        ("flow", 2.0),
        pytest.param("flow", 1.0, marks=pytest.mark.slow),
        pytest.param("dance", 1.0, marks=pytest.mark.slow),
        pytest.param("ddim", 2.0, marks=pytest.mark.slow),
    ],
)
def test_recorded_log_probs_are_the_current_policys_at_equal_weights(tmp_path, solver, scale):
    """On the built-in model, with other micro-batches than the rollout's."""
    overrides = FLOW_GRPO | {
        "sample.solver": solver,
        "sample.guidance_scale": scale,
        "sample.num_groups": 2,
        "sample.num_steps": 10,
        "train.gradient_step_per_epoch": 1,
        "grpo.kl_weight": 0.0,
    }
    with one_thread():
        trainer = make_trainer(smoke(tmp_path, overrides), Distributed(0, 1, 0, CPU))
        rollout = trainer._sample()
        weights = torch.ones(8, dtype=torch.float64)
        values = trainer.learner.train_epoch(rollout, weights, epoch=0)
    assert values["loss/ratio"] == pytest.approx(1, abs=1e-6)
    # Half the mean square: no pair strays further than the root of twice its 8 * 9 fold.
    assert (2 * 8 * 9 * values["loss/approx_kl_k2"]) ** 0.5 < 1e-5
    assert values["loss/clip_fraction"] == 0


TINY = {
    "eval.num_prompts": 2,
    "eval.num_steps": 2,
    "eval.at_start": False,
    "eval_freq": 0,
    "num_epochs": 2,
    "sample.num_groups": 1,
}
METRICS = {
    "flow_grpo": {"loss/ratio", "loss/clip_fraction", "loss/approx_kl_k2", "loss/kl"},
    "reward_weighted": {"loss/error", "loss/kl"},
    "advantage_weighted": {"loss/error", "loss/ratio", "loss/clip_fraction", "loss/kl"},
    "best_of_n": {"loss/error", "loss/kl"},
}


@pytest.mark.parametrize("name", METRICS)
def test_a_run_trains_and_samples_with_the_newest_policy(tmp_path, name):
    own = FLOW_GRPO if name == "flow_grpo" else {"algorithm": name}
    train_here(tmp_path, TINY | own | {"num_epochs": 1})
    saved = load_checkpoint(tmp_path / "checkpoints" / "checkpoint-2").tensors
    assert any(v.any() for k, v in saved["current"].items() if "lora_B" in k)
    for key, value in saved["current"].items():
        assert torch.equal(saved["old"][key], value)
    (row,) = (row for row in read_metrics(tmp_path / "metrics.jsonl") if "loss/total" in row)
    assert METRICS[name] | {"loss/policy"} <= row.keys()
    assert row["optim/skipped_steps"] == 0 and row["optim/old_policy_decay"] == 0
    assert row["optim/grad_norm"] > 0


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    overrides = TINY | FLOW_GRPO | {"sample.guidance_scale": 2.0}
    train_here(tmp_path / "whole", overrides)
    train_here(tmp_path / "parts", overrides | {"num_epochs": 1})
    train_here(tmp_path / "parts", overrides)
    whole, parts = (
        load_checkpoint(tmp_path / name / "checkpoints" / "checkpoint-4").tensors
        for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    for group, tensors in whole.items():
        assert all(torch.equal(parts[group][key], value) for key, value in tensors.items())


@pytest.mark.slow
@pytest.mark.multiproc
def test_two_processes_make_the_run_of_one(tmp_path):
    overrides = TINY | FLOW_GRPO | {"sample.guidance_scale": 2.0, "mixed_precision": "fp64"}
    train_here(tmp_path / "one", overrides | {"train.batch_size": 4})
    train_on_ranks([(2, tmp_path / "two", overrides)])
    one, two = (
        load_checkpoint(tmp_path / name / "checkpoints" / "checkpoint-4").tensors["current"]
        for name in ("one", "two")
    )
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-6, atol=1e-9)
