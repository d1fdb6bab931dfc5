"""The deterministic solvers against closed-form flows and against diffusers."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from diffusion_nft.solvers import SOLVERS, STOCHASTIC_SOLVERS

ORDER = {"dpm1": 1, "flow": 1, "dance": 1, "ddim": 1, "heun": 2, "dpm2": 2}


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_order_of_convergence(name, mixture, noise):
    """Inside (0, 1), halving the step divides the distance to the exact flow by 2^order."""
    start, end, steps = 0.9, 0.1, [80, 160, 320]
    exact = mixture.flow_map(noise, start, end)
    errors = []
    for num_steps in steps:
        sigmas = torch.linspace(start, end, num_steps + 1, dtype=torch.float64)
        errors.append((SOLVERS[name](mixture.velocity, noise, sigmas) - exact).abs().mean())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDER[name], abs=0.15)


@pytest.mark.parametrize("name", sorted(ORDER))
def test_order_over_the_whole_schedule(name, mixture, noise, shifted_grid):
    """From pure noise to sigma 0.  Near the ends, where lambda is infinite, dpm2's error is
    h^2 log(1/h), so its slope comes up to 2 slowly."""
    exact = mixture.flow_map(noise)
    coarse, fine = (
        (SOLVERS[name](mixture.velocity, noise, shifted_grid(n)) - exact).abs().mean()
        for n in (160, 640)
    )
    slope = math.log2(coarse / fine) / 2
    assert ORDER[name] - (0.4 if name == "dpm2" else 0.1) < slope < ORDER[name] + 0.1


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_flow_to_a_point_is_solved_in_any_number_of_steps(name, noise, shifted_grid):
    """v = (x - c) / sigma: straight lines, on which x0_hat is c from the first step on."""
    for num_steps in (1, 2, 5):
        x0 = SOLVERS[name](
            lambda x, sigma: (x - 0.3) / sigma.reshape(-1, 1, 1, 1), noise, shifted_grid(num_steps)
        )
        torch.testing.assert_close(x0, torch.full_like(x0, 0.3))


def diffusers_result(scheduler, velocity, x, sigmas):
    """Drive a diffusers scheduler over exactly these sigmas."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas.float()
    scheduler.timesteps = 1000 * sigmas[:-1].float()
    scheduler.set_begin_index(0)
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        v = velocity(x, sigma.expand(len(x)).to(x.dtype))
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 10])
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_equals_diffusers(order, num_steps, mixture, noise, shifted_grid):
    """Both keep the state in float32 and agree to rounding."""
    scheduler = DPMSolverMultistepScheduler(
        solver_order=order,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        lower_order_final=True,
    )
    sigmas = shifted_grid(num_steps).float()
    expected = diffusers_result(scheduler, mixture.velocity, noise.float(), sigmas)
    result = SOLVERS[f"dpm{order}"](mixture.velocity, noise.float(), sigmas)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=2e-6)


def test_first_order_solvers_are_one_map(mixture, noise, shifted_grid):
    """At noise 0 the stochastic solvers are bitwise Euler; dpm1 is Euler in other words."""
    sigmas = shifted_grid(10)
    x = noise
    for s, t in pairwise(sigmas.tolist()):
        x = x + (t - s) * mixture.velocity(x, torch.full((len(x),), s, dtype=x.dtype))
    for name in STOCHASTIC_SOLVERS:
        assert torch.equal(SOLVERS[name](mixture.velocity, noise, sigmas), x)
    dpm1 = SOLVERS["dpm1"](mixture.velocity, noise, sigmas)
    torch.testing.assert_close(dpm1, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "calls"), [("heun", 9), ("dpm2", 5), ("dpm1", 5), ("flow", 5)])
def test_evaluations_are_at_the_grid_and_never_at_zero(name, calls, noise, shifted_grid):
    sigmas = shifted_grid(5)
    seen = []

    def velocity(x, sigma):
        assert sigma.shape == (3,) and sigma.dtype == x.dtype == torch.float32
        seen.append(sigma[0].item())
        return -x

    x0 = SOLVERS[name](velocity, noise.half(), sigmas, generator=None, noise_level=0.0)
    assert x0.dtype == torch.float32  # half precision is never the state between steps
    assert len(seen) == calls
    assert list(dict.fromkeys(seen)) == sigmas[:-1].float().tolist()
