"""The loss against an independent float64 transcription, and the identities of the paper."""

import itertools

import numpy as np
import pytest
import torch

from diffusion_nft.algorithms import Batch
from diffusion_nft.algorithms.matching import matching_loss
from diffusion_nft.algorithms.nft import nft_loss, old_policy_schedule

SHAPE = (3, 2, 4, 4)


def draw(seed):
    rng = np.random.default_rng(seed)
    names = ("v", "v_old", "v_ref", "x0", "noise")
    return {name: rng.standard_normal(SHAPE) for name in names}


def reference_losses(arrays, sigma, r, beta, kl_weight, clip, weighting, negative=True):
    """Sample by sample, element by element, straight from the formulas."""
    losses = []
    for b in range(SHAPE[0]):
        v, old, ref, x0, noise = (arrays[n][b] for n in ("v", "v_old", "v_ref", "x0", "noise"))
        s = sigma[b]
        xt = (1 - s) * x0 + s * noise

        def branch(mixed, x0=x0, noise=noise, xt=xt, s=s):
            if weighting == "adaptive":
                x0_hat = xt - s * mixed
                return np.mean((x0_hat - x0) ** 2) / max(np.mean(np.abs(x0_hat - x0)), 1e-5)
            weight = {"uniform": 1.0, "sigma": s, "one_minus_sigma": 1 - s}[weighting]
            return weight * np.mean((mixed - (noise - x0)) ** 2)

        positive = branch((1 - beta) * old + beta * v)
        minus = branch((1 + beta) * old - beta * v) if negative else 0.0
        policy = clip * (r[b] * positive + (1 - r[b]) * minus) / beta
        losses.append(policy + kl_weight * np.mean((v - ref) ** 2))
    return np.array(losses)


def ours(arrays, sigma, r, requires_grad=False, **options):
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors["v"].requires_grad_(requires_grad)
    s = torch.from_numpy(sigma)
    xt = (1 - s.view(-1, 1, 1, 1)) * tensors["x0"] + s.view(-1, 1, 1, 1) * tensors["noise"]
    batch = Batch(tensors["x0"], tensors["noise"], xt, s, torch.from_numpy(r))
    velocities = (tensors[name] for name in ("v", "v_old", "v_ref"))
    losses, metrics = nft_loss(*velocities, batch, **options)
    return losses, metrics, tensors["v"]


@pytest.mark.parametrize("weighting", ["adaptive", "uniform", "sigma", "one_minus_sigma"])
@pytest.mark.parametrize(("beta", "r"), itertools.product([0.01, 0.1, 1.0, 3.0], [0.0, 0.3, 0.5]))
def test_value_and_gradient_equal_the_formulas(weighting, beta, r):
    arrays = draw(0)
    sigmas, rs = np.array([0.0089, 0.4, 1.0]), np.array([r, 1 - r, r])
    options = dict(beta=beta, kl_weight=0.3, adv_clip_max=5.0, weighting=weighting)
    losses, metrics, v = ours(arrays, sigmas, rs, requires_grad=True, **options)
    policy = reference_losses(arrays, sigmas, rs, beta, 0.0, 5.0, weighting)
    kl = np.mean((arrays["v"] - arrays["v_ref"]) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(losses.detach().numpy(), policy + 0.3 * kl, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/policy"].numpy(), policy, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/kl"].numpy(), kl, rtol=1e-6)
    assert not any(value.requires_grad for value in metrics.values())

    (gradient,) = torch.autograd.grad(losses.sum(), v)
    if weighting == "adaptive":
        # The denominator is held fixed, so finite differences do not apply: by hand instead.
        for b in range(SHAPE[0]):
            x0, noise, old = arrays["x0"][b], arrays["noise"][b], arrays["v_old"][b]
            cur, ref = arrays["v"][b], arrays["v_ref"][b]
            sigma, n = sigmas[b], x0.size
            xt = (1 - sigma) * x0 + sigma * noise
            plus = xt - sigma * ((1 - beta) * old + beta * cur) - x0
            minus = xt - sigma * ((1 + beta) * old - beta * cur) - x0
            wp, wm = (max(np.mean(np.abs(e)), 1e-5) for e in (plus, minus))
            by_hand = 5.0 * 2 * sigma / n * (-rs[b] * plus / wp + (1 - rs[b]) * minus / wm)
            by_hand += 0.3 * 2 * (cur - ref) / n
            np.testing.assert_allclose(gradient[b].numpy(), by_hand, rtol=1e-6, atol=1e-12)
    else:
        direction = np.random.default_rng(1).standard_normal(SHAPE)
        h = 1e-5
        up, down = (
            reference_losses(arrays | {"v": moved}, sigmas, rs, beta, 0.3, 5.0, weighting).sum()
            for moved in (arrays["v"] + h * direction, arrays["v"] - h * direction)
        )
        np.testing.assert_allclose(
            (gradient.numpy() * direction).sum(), (up - down) / (2 * h), 1e-6
        )


def test_no_negative_branch_drops_the_term():
    arrays, sigma, r = draw(2), np.array([0.2, 0.5, 0.9]), np.array([0.1, 0.6, 1.0])
    options = dict(beta=0.5, kl_weight=0.0, adv_clip_max=5.0, weighting="adaptive")
    losses, metrics, _ = ours(arrays, sigma, r, negative_branch=False, **options)
    expected = reference_losses(arrays, sigma, r, 0.5, 0.0, 5.0, "adaptive", negative=False)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-6)
    assert "loss/negative" not in metrics


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_at_the_old_policy_the_gradient_is_advantage_weighted_flow_matching(beta):
    """d loss / d v = 2 A (v_old - v_target) / n at v = v_old, whatever beta."""
    arrays = draw(3)
    arrays["v"] = arrays["v_old"].copy()
    sigma, advantage = np.array([0.2, 0.5, 0.9]), np.array([-4.0, 0.0, 2.5])
    r = advantage / 5 / 2 + 0.5
    options = dict(beta=beta, kl_weight=0.0, adv_clip_max=5.0, weighting="uniform")
    losses, _, v = ours(arrays, sigma, r, requires_grad=True, **options)
    (gradient,) = torch.autograd.grad(losses.sum(), v)
    target = arrays["noise"] - arrays["x0"]
    n = np.prod(SHAPE[1:])
    expected = 2 * advantage[:, None, None, None] * (arrays["v_old"] - target) / n
    np.testing.assert_allclose(gradient.numpy(), expected, atol=1e-12)


def test_kl_without_a_reference_is_refused():
    x, one = torch.zeros(1, 1, 2, 2), torch.ones(1)
    batch = Batch(x, x, x, one, one)
    with pytest.raises(ValueError, match=r"kl_weight is 0\.3"):
        nft_loss(x, x, None, batch, beta=1, kl_weight=0.3, adv_clip_max=5)
    with pytest.raises(ValueError, match=r"kl_weight is 0\.3"):
        matching_loss(x, None, batch, kl_weight=0.3)


@pytest.mark.parametrize(
    ("name", "step", "eta"),
    [
        ("on_policy", 9999, 0.0),
        ("linear_to_half", 400, 0.4),
        ("linear_to_half", 900, 0.5),
        ("linear_to_095", 900, 0.9),
        ("linear_to_095", 5000, 0.95),
        ("delayed_linear", 75, 0.0),
        ("delayed_linear", 76, 0.0075),
        ("delayed_linear", 5000, 0.999),
        ("constant_09", 1, 0.9),
        ("linear:0.01:0:0.5", 7, 0.07),
        ("linear:0.075:8:0.999", 10, 0.15),
        ("linear:1:0:0.7", 1, 0.7),
    ],
)
def test_old_policy_decay(name, step, eta):
    assert old_policy_schedule(name)(step) == pytest.approx(eta, abs=1e-12)
