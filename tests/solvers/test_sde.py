"""The stochastic solvers: formulas, marginals, densities, independence of the batch."""

import math
import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffusion_nft.solvers import (
    SOLVERS,
    STOCHASTIC_SOLVERS,
    check_solver,
    log_prob,
    sample_trajectory,
    sde_step,
)
from diffusion_nft.solvers.sde import draw_noise

NAMES = sorted(STOCHASTIC_SOLVERS)


def published_step(name: str, x: Tensor, v: Tensor, s: float, t: float, a: float):
    """Mean and std as the papers' code writes them, in x0_hat, the score and the noise."""
    d_sigma = t - s
    x0_hat = x - s * v
    if name == "flow":
        std = a * math.sqrt(s / (1 - (t if s == 1 else s)))
        mean = x * (1 + std**2 / (2 * s) * d_sigma) + v * (1 + std**2 * (1 - s) / (2 * s)) * d_sigma
        return mean, std * math.sqrt(-d_sigma)
    if name == "dance":
        score = -(x - (1 - s) * x0_hat) / s**2
        return x + v * d_sigma - 0.5 * a**2 * score * d_sigma, a * math.sqrt(-d_sigma)
    noise_hat = (x - (1 - s) * x0_hat) / s
    rho = a * t * math.sqrt(1 - t**2 * (1 - s) ** 2 / (s**2 * (1 - t) ** 2))
    return (1 - t) * x0_hat + math.sqrt(t**2 - rho**2) * noise_hat, rho


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_step_is_the_published_formula(name, noise_level):
    """Every sample of the batch at its own level, both ends of the schedule included."""
    levels = [(1.0, 0.9), (0.9, 0.7), (0.3, 0.25), (0.1, 0.0)]
    x, v = torch.randn(
        2, 4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    sigma, sigma_next = torch.tensor(levels, dtype=torch.float64).unbind(1)
    mean, std = sde_step(name, x, v, sigma, sigma_next, noise_level=noise_level)
    for i, (s, t) in enumerate(levels):
        expected_mean, expected_std = published_step(name, x[i], v[i], s, t, noise_level)
        torch.testing.assert_close(mean[i], expected_mean, rtol=1e-12, atol=1e-12)
        assert std[i].item() == pytest.approx(expected_std, abs=1e-12)


def chain_moments(name, data, sigmas, noise_level) -> tuple[float, float]:
    """Exact mean and variance of the chain's end: Gaussian data make every step affine in x."""
    mean, variance = 0.0, 1.0
    for s, t in pairwise(sigmas):
        points = torch.tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
        level = s.expand(2)
        v = data.velocity(points, level)
        at, std = sde_step(name, points, v, level, t.expand(2), noise_level=noise_level)
        offset, slope = at[0].item(), (at[1] - at[0]).item()
        mean, variance = offset + slope * mean, slope**2 * variance + std[0].item() ** 2
    return mean, variance


@pytest.mark.parametrize("noise_level", [0.3, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_marginals_converge_to_the_data(name, noise_level, gaussian, shifted_grid):
    """With small steps the end of the chain is distributed as the data, whatever the noise."""
    errors = []
    for num_steps in (50, 200, 800):
        mean, variance = chain_moments(name, gaussian, shifted_grid(num_steps), noise_level)
        errors.append((abs(mean - 0.7), abs(variance - 0.4**2)))
    for coarse, fine in pairwise(errors):
        assert fine[0] < max(0.5 * coarse[0], 1e-6) and fine[1] < 0.5 * coarse[1]
    assert max(errors[-1]) < 5e-3


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_moments_of_the_chain(name, gaussian, shifted_grid):
    """The solver's own noise: mean and variance of 100,000 samples within 4 standard errors."""
    sigmas, noise_level, count = shifted_grid(8), 0.7, 100_000
    generator = torch.Generator().manual_seed(1)
    x1 = torch.randn(count // 4, 1, 2, 2, dtype=torch.float64, generator=generator)
    x0 = SOLVERS[name](gaussian.velocity, x1, sigmas, generator=generator, noise_level=noise_level)
    mean, variance = chain_moments(name, gaussian, sigmas, noise_level)
    assert abs(x0.mean().item() - mean) < 4 * math.sqrt(variance / count)
    assert abs(x0.var().item() - variance) < 4 * variance * math.sqrt(2 / count)
    # The comparison has teeth: Euler's chain, at the same accuracy, has another variance.
    euler_variance = chain_moments(name, gaussian, sigmas, 0.0)[1]
    assert abs(x0.var().item() - euler_variance) > 8 * variance * math.sqrt(2 / count)


def test_log_prob_is_the_normal_density_averaged_over_elements():
    generator = torch.Generator().manual_seed(2)
    x, mean = torch.randn(2, 5, 3, 2, 4, generator=generator)
    std = torch.rand(5, generator=generator) + 0.1
    normal = torch.distributions.Normal(mean, std.reshape(5, 1, 1, 1))
    expected = normal.log_prob(x).mean(dim=(1, 2, 3))
    torch.testing.assert_close(log_prob(x, mean, std), expected)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_steps_are_rescored_exactly(name, mixture, noise, shifted_grid):
    """Policy gradients need ratio 1 on-policy: the same bits in the rollout and afterwards."""
    x1, sigmas = noise.float(), shifted_grid(6).float()
    options = {"generator": torch.Generator().manual_seed(3), "noise_level": 0.7}
    trajectory = sample_trajectory(name, mixture.velocity, x1, sigmas, **options)
    assert trajectory.xs.shape == (7, *x1.shape) and trajectory.log_probs.shape == (6, 3)
    assert torch.equal(trajectory.xs[0], x1)

    options["generator"] = torch.Generator().manual_seed(3)
    x0 = SOLVERS[name](mixture.velocity, x1, sigmas, **options)
    assert torch.equal(trajectory.xs[-1], x0)

    for i in range(6):
        x, sigma, sigma_next = trajectory.xs[i], sigmas[i].expand(3), sigmas[i + 1].expand(3)
        v = mixture.velocity(x, sigma).requires_grad_()
        mean, std = sde_step(name, x, v, sigma, sigma_next, noise_level=0.7)
        if name == "ddim" and i == 5:
            assert std.eq(0).all() and trajectory.log_probs[i].isnan().all()
            continue
        rescored = log_prob(trajectory.xs[i + 1], mean, std)
        assert torch.equal(rescored, trajectory.log_probs[i])
        (gradient,) = torch.autograd.grad(rescored.sum(), v)
        assert gradient.abs().min() > 0


@pytest.mark.parametrize("each", [False, True])
def test_noise_is_the_same_in_every_precision(each):
    def drawn(dtype: torch.dtype) -> Tensor:
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return draw_noise(torch.zeros(2, 3, dtype=dtype), seeds if each else seeds[0])

    single = drawn(torch.float32)
    for dtype in (torch.float64, torch.bfloat16):
        assert drawn(dtype).dtype == dtype and torch.equal(drawn(dtype), single.to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch(name, mixture, noise, shifted_grid):
    x1, sigmas = noise.float(), shifted_grid(6)

    def run(samples: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(10 + i) for i in samples]
        return SOLVERS[name](
            mixture.velocity, x1[samples], sigmas, generator=generators, noise_level=0.7
        )

    together, reordered = run([0, 1, 2]), run([2, 0])
    assert torch.equal(reordered, together[[2, 0]])
    for i in range(3):
        assert torch.equal(run([i]), together[[i]])
    assert not torch.equal(together, SOLVERS[name](mixture.velocity, x1, sigmas))


@pytest.mark.parametrize(
    ("name", "noise_level", "message"),
    [
        ("flow", -0.1, "noise_level of solver 'flow' must be 0 or more, not -0.1"),
        ("dance", math.nan, "noise_level of solver 'dance' must be 0 or more, not nan"),
        ("ddim", 1.1, "noise_level of solver 'ddim' must be between 0 and 1, not 1.1"),
    ],
)
def test_impossible_noise_levels_are_refused(name, noise_level, message, noise, shifted_grid):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_solver(name, noise_level)
    with pytest.raises(ValueError, match=re.escape(message)):
        SOLVERS[name](lambda x, sigma: x, noise, shifted_grid(2), noise_level=noise_level)
