"""The matching baselines: weights by hand, losses from the formulas, and NFT's gradient."""

import numpy as np
import pytest
import torch

from diffusion_nft.algorithms import Batch, build_algorithm
from diffusion_nft.algorithms.matching import (
    advantage_matching_loss,
    best_of_weights,
    exponential_weights,
)
from tests.launch import smoke

SHAPE = (3, 2, 4, 4)
SIGMA = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)


def draw(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    names = ("v", "v_old", "v_ref", "x0", "noise")
    d = {name: torch.randn(SHAPE, generator=g, dtype=torch.float64) for name in names}
    s = SIGMA.reshape(-1, 1, 1, 1)
    return d | {"xt": (1 - s) * d["x0"] + s * d["noise"], "sigma": SIGMA}


def error(d: dict, name: str, weighting: str, b: int) -> float:
    """Of one sample, straight from the formulas."""
    v, x0, noise, s = (d[n][b].numpy() for n in (name, "x0", "noise", "sigma"))
    if weighting == "adaptive":
        x0_hat = d["xt"][b].numpy() - s * v
        return np.mean((x0_hat - x0) ** 2) / np.mean(np.abs(x0_hat - x0))
    weight = {"uniform": 1.0, "sigma": s, "one_minus_sigma": 1 - s}[weighting]
    return weight * np.mean((v - (noise - x0)) ** 2)


@pytest.mark.parametrize("weighting", ["uniform", "adaptive"])
@pytest.mark.parametrize("closeness", [0.0, 0.5, 0.99])
def test_the_advantage_loss_equals_the_formula(weighting, closeness):
    d = draw(1)
    d["v"] = closeness * d["v_old"] + (1 - closeness) * d["v"]
    advantage = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
    batch = Batch(d["x0"], d["noise"], d["xt"], d["sigma"], advantage)
    losses, metrics = advantage_matching_loss(
        d["v"], d["v_old"], d["v_ref"], batch, clip_range=0.2, kl_weight=0.3, weighting=weighting
    )
    for b, a in enumerate(advantage.tolist()):
        ratio = np.exp(error(d, "v_old", weighting, b) - error(d, "v", weighting, b))
        policy = max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
        kl = float(((d["v"][b] - d["v_ref"][b]) ** 2).mean())
        assert float(losses[b]) == pytest.approx(policy + 0.3 * kl, rel=1e-10)
        assert float(metrics["loss/ratio"][b]) == pytest.approx(ratio, rel=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_exponential_weights_are_exponentials_of_mean_one(temperature):
    advantages = torch.tensor([-5.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    expected = np.exp(advantages.numpy() / temperature)
    ours = exponential_weights(advantages, temperature)
    np.testing.assert_allclose(ours.numpy(), expected / expected.mean(), rtol=1e-12)
    cold = exponential_weights(advantages, 1e-3)
    assert cold.tolist() == [0.0, 0.0, 0.0, 4.0], "no overflow"


def test_the_best_of_each_group_ties_by_index():
    advantages = torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0, -1.0, 2.0, -3.0, 2.5])
    weights = best_of_weights(advantages, 4, 2)
    assert weights.tolist() == [0, 2, 2, 0, 2, 2, 0, 0, 0, 2, 0, 2]
    assert best_of_weights(advantages, 4, 1).reshape(3, 4).argmax(1).tolist() == [1, 0, 3]


ALGORITHMS = {
    # advantages -9 1 | 3 7, groups of two, clipped to 5, temperature 2, best of 1.
    "reward_weighted": np.exp(np.array([-2.5, 0.5, 1.5, 2.5]))
    / np.exp(np.array([-2.5, 0.5, 1.5, 2.5])).mean(),
    "advantage_weighted": np.array([-5.0, 1.0, 3.0, 5.0]),
    "best_of_n": np.array([0.0, 2.0, 0.0, 2.0]),
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    ("kl_weight", "weighting"),
    [(0.0, "sigma"), (0.1, "adaptive"), (0.1, "uniform"), (0.1, "one_minus_sigma")],
)
def test_the_algorithms_follow_the_config(tmp_path, name, kl_weight, weighting):
    config = smoke(
        tmp_path,
        {
            "algorithm": name,
            "matching.temperature": 2.0,
            "matching.kl_weight": kl_weight,
            "matching.weighting": weighting,
            "nft.old_policy_decay": "constant_09",
        },
    )
    algorithm = build_algorithm(config)
    weights = algorithm.sample_weights(torch.tensor([-9.0, 1.0, 3.0, 7.0]).double(), 2)
    np.testing.assert_allclose(weights.numpy(), ALGORITHMS[name], rtol=1e-12)
    assert algorithm.old_policy_decay(50) == 0.0, "NFT's schedule is not theirs"

    d, asked = draw(4), []
    policies = {"current": "v", "old": "v_old", "reference": "v_ref"}

    def velocity(policy):
        asked.append(policy)
        return d[policies[policy]]

    batch = Batch(d["x0"], d["noise"], d["xt"], d["sigma"], weights[1:])
    losses, metrics = algorithm.loss(velocity, batch)
    assert sorted(asked) == sorted(algorithm.policies)
    assert ("reference" in asked) == ("loss/kl" in metrics) == bool(kl_weight)
    errors = np.array([error(d, "v", weighting, b) for b in range(3)])
    if name == "advantage_weighted":
        old = np.array([error(d, "v_old", weighting, b) for b in range(3)])
        ratio, a = np.exp(old - errors), weights[1:].numpy()
        policy = np.maximum(-a * ratio, -a * ratio.clip(0, 2))
    else:
        policy = weights[1:].numpy() * errors
    kl = ((d["v"] - d["v_ref"]) ** 2).mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(losses.numpy(), policy + kl_weight * kl, rtol=1e-9)
    np.testing.assert_allclose(metrics["loss/policy"].numpy(), policy, rtol=1e-9)
    if name != "advantage_weighted":
        np.testing.assert_allclose(metrics["loss/error"].numpy(), errors)
    if kl_weight:
        np.testing.assert_allclose(metrics["loss/kl"].numpy(), kl)


def test_samples_without_a_score_get_no_weight_and_take_none():
    advantages = torch.tensor([0.5, torch.nan, -1.0, torch.nan, 2.0, 0.1], dtype=torch.float64)
    ours = exponential_weights(advantages, 0.5)
    scored = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64).div(0.5).exp()
    torch.testing.assert_close(ours[~advantages.isnan()], scored / scored.mean())
    assert torch.equal(ours.isnan(), advantages.isnan())
    best = best_of_weights(advantages, 3, 2)
    assert best.nan_to_num(-1).tolist() == [1.5, -1, 1.5, -1, 1.5, 1.5]
