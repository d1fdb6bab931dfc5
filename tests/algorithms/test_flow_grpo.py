"""Flow-GRPO's loss against torch.distributions and finite differences."""

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from torch.distributions import Normal, kl_divergence

from diffusion_nft.algorithms import Transitions, build_algorithm
from diffusion_nft.algorithms.flow_grpo import clipped_policy_loss, flow_grpo_loss
from diffusion_nft.solvers import log_prob
from tests.launch import smoke

SHAPE = (4, 2, 3, 3)
OPTIONS = dict(clip_range=0.1, kl_weight=0.3)


def draw(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "mean": normal(*SHAPE),
        "mean_ref": normal(*SHAPE),
        "std": torch.rand(SHAPE[0], generator=g, dtype=torch.float64) + 0.3,
        "x_next": normal(*SHAPE),
        "advantage": 3 * normal(SHAPE[0]),
    }


def density(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Of one sample: the mean over its values, by torch.distributions."""
    return Normal(mean, std).log_prob(x).mean()


def reference_loss(d: dict, old: torch.Tensor, clip_range: float, kl_weight: float) -> list[float]:
    """Sample by sample, from the formulas."""
    losses = []
    for b in range(SHAPE[0]):
        ratio = float((density(d["x_next"][b], d["mean"][b], d["std"][b]) - old[b]).exp())
        low, high = 1 - clip_range, 1 + clip_range
        a = float(d["advantage"][b])
        policy = max(-a * ratio, -a * min(max(ratio, low), high))
        gaussians = (Normal(d[name][b], d["std"][b]) for name in ("mean", "mean_ref"))
        losses.append(policy + kl_weight * float(kl_divergence(*gaussians).mean()))
    return losses


# Old log-probabilities below, near and above the new ones: ratios beyond, in and below the range.
@pytest.mark.parametrize("shift", [-0.5, -0.05, 0.0, 0.05, 0.5])
def test_the_loss_equals_the_formulas(shift):
    d = draw(0)
    new = torch.stack([density(*triple) for triple in zip(*by_name(d), strict=True)])
    old = new + shift
    losses, metrics = flow_grpo_loss(**d, old_log_prob=old, **OPTIONS)
    np.testing.assert_allclose(losses.numpy(), reference_loss(d, old, **OPTIONS), rtol=1e-10)
    np.testing.assert_allclose(metrics["loss/ratio"].numpy(), np.exp(-shift), rtol=1e-12)
    assert metrics["loss/clip_fraction"].tolist() == [float(abs(shift) > 0.1)] * SHAPE[0]
    np.testing.assert_allclose(metrics["loss/approx_kl_k2"].numpy(), shift**2 / 2, atol=1e-15)
    total = metrics["loss/policy"] + 0.3 * metrics["loss/kl"]
    np.testing.assert_allclose(losses.numpy(), total.numpy(), rtol=1e-12)


def by_name(d: dict) -> tuple[torch.Tensor, ...]:
    return d["x_next"], d["mean"], d["std"]


def test_at_equal_policies_the_gradient_is_that_of_minus_a_log_prob():
    d = draw(2)
    mean = d["mean"].requires_grad_()
    old = log_prob(d["x_next"], d["mean"], d["std"]).detach()
    losses, metrics = flow_grpo_loss(**d, old_log_prob=old, clip_range=1e-4, kl_weight=0.0)
    (gradient,) = torch.autograd.grad(losses.sum(), mean)
    # d/dmean of the mean over n values of -(x - mean)^2 / (2 std^2).
    n = d["mean"][0].numel()
    with torch.no_grad():
        a, std = (d[name].reshape(-1, 1, 1, 1) for name in ("advantage", "std"))
        expected = -a * (d["x_next"] - mean) / std**2 / n
    np.testing.assert_allclose(gradient.numpy(), expected.numpy(), rtol=1e-9)
    assert metrics["loss/ratio"].tolist() == [1.0] * SHAPE[0]
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [
        (1.2, 1.0, False),  # likelier already than the range allows
        (1.2, -1.0, True),
        (0.8, 1.0, True),
        (0.8, -1.0, False),
        (1.05, 1.0, True),
        (0.95, -1.0, True),
    ],
)
def test_a_ratio_beyond_the_range_where_it_was_to_go_has_no_gradient(ratio, advantage, moves):
    log_ratio = torch.tensor([np.log(ratio)], requires_grad=True)
    policy, _ = clipped_policy_loss(log_ratio, torch.tensor([advantage]), 0.1)
    (gradient,) = torch.autograd.grad(policy.sum(), log_ratio)
    assert float(gradient) == pytest.approx(-advantage * ratio if moves else 0.0)


def test_kl_without_a_reference_is_refused():
    d = draw(3) | {"mean_ref": None}
    with pytest.raises(ValueError, match=r"kl_weight is 0\.3"):
        flow_grpo_loss(**d, old_log_prob=torch.zeros(4), **OPTIONS)


def config(tmp_path, **overrides) -> ConfigDict:
    settings = {
        "algorithm": "flow_grpo",
        "sample.solver": "flow",
        "sample.noise_level": 0.7,
        "grpo.clip_range": 0.2,
    }
    return smoke(tmp_path, settings | {k.replace("__", "."): v for k, v in overrides.items()})


def test_the_weights_are_clipped_and_shaped_advantages(tmp_path):
    advantages = torch.tensor([-9.0, -1.0, 0.5, 7.0], dtype=torch.float64)
    algorithm = build_algorithm(config(tmp_path))
    assert algorithm.sample_weights(advantages, 2).tolist() == [-5.0, -1.0, 0.5, 5.0]
    binary = build_algorithm(config(tmp_path, train__adv_mode="binary", train__adv_clip_max=1.0))
    assert binary.sample_weights(advantages, 2).tolist() == [-1.0, -1.0, 1.0, 1.0]


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_it_asks_for_the_policies_that_it_names(tmp_path, kl_weight):
    algorithm = build_algorithm(config(tmp_path, grpo__kl_weight=kl_weight))
    asked = []

    def velocity(policy):
        asked.append(policy)
        return torch.zeros(2, 1, 2, 2, requires_grad=policy == "current")

    zeros = torch.zeros(2, 1, 2, 2)
    levels = torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.2])
    losses, metrics = algorithm.loss(
        velocity, Transitions(zeros, zeros, *levels, torch.zeros(2), torch.ones(2))
    )
    assert sorted(asked) == sorted(algorithm.policies)
    assert losses.shape == (2,) and losses.requires_grad
    assert ("loss/kl" in metrics) == bool(kl_weight)
    assert algorithm.old_policy_decay(100) == 0.0
