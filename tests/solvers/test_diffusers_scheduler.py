"""diffusers schedulers as black-box solvers."""

import pytest
import torch

from diffusion_nft.solvers import check_solver, solve

SECOND_ORDER = [
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMatchHeunDiscreteScheduler",
]
ALL = [*SECOND_ORDER, "SASolverScheduler", "FlowMatchEulerDiscreteScheduler"]


def test_euler_visits_sd3s_own_grid(mixture, noise, shifted_grid):
    """Shift 3, 10 steps: the levels that diffusers' SD3 pipeline uses (they start 1, .9643...)."""
    x0, visited = solve(
        "FlowMatchEulerDiscreteScheduler", mixture.velocity, noise, shifted_grid(10), shift=3.0
    )
    assert visited[0] == 1 and len(visited) == 10
    assert (1000 * visited[[1, -1]]).tolist() == pytest.approx([960.13, 8.93], abs=0.01)
    # The same grid given to our own Euler is the same sampler.
    sigmas = torch.cat([visited, torch.zeros(1)])
    expected, ours = solve("flow", mixture.velocity, noise, sigmas)
    torch.testing.assert_close(x0, expected, rtol=0, atol=1e-5)
    assert torch.equal(ours, visited)


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_accuracy_in_20_steps(name, mixture, noise, shifted_grid):
    """Nearer to the exact flow map than half the error of Euler's method, and near: the data's
    standard deviation is 1.25."""
    x1 = noise.float()
    x0, _ = solve(name, mixture.velocity, x1, shifted_grid(20), shift=1.0)
    euler, _ = solve("flow", mixture.velocity, x1, shifted_grid(20, 1.0))
    exact = mixture.flow_map(noise).float()
    error, euler_error = (x0 - exact).abs().mean(), (euler - exact).abs().mean()
    assert error < 0.02
    assert error < 0.5 * euler_error


@pytest.mark.parametrize("name", ALL)
def test_visited_sigmas_are_what_the_model_saw(name, gaussian, noise, shifted_grid):
    """Distinct, decreasing, non-zero, and not rounded to whole timesteps."""
    seen = []

    def velocity(x, sigma):
        assert sigma.shape == (3,) and sigma.dtype == torch.float32
        seen.append(sigma[0].item())
        return gaussian.velocity(x, sigma)

    _, visited = solve(name, velocity, noise.float(), shifted_grid(7), shift=3.0)
    assert visited.tolist() == sorted(set(seen), reverse=True)
    assert len(visited) == 7 and visited.min() > 0
    assert ((1000 * visited).frac() > 0.01).any()


def test_a_stochastic_scheduler_uses_each_samples_own_generator(gaussian, noise, shifted_grid):
    def run(samples: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(10 + i) for i in samples]
        x1 = noise.float()[samples]
        x0, _ = solve(
            "SASolverScheduler",
            gaussian.velocity,
            x1,
            shifted_grid(7),
            shift=1.0,
            generator=generators,
        )
        return x0

    together = run([0, 1, 2])
    assert torch.equal(run([2]), together[[2]])
    assert torch.equal(run([1, 2, 0]), together[[1, 2, 0]])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dpm3", "solver 'dpm3' is unknown; choose from flow, dance, ddim, dpm1, dpm2, heun"),
        ("UniPCScheduler", "is not a scheduler of the installed diffusers"),
        ("DDIMScheduler", "does not take flow sigmas"),
        ("HeliosScheduler", "does not take flow sigmas"),
        ("DPMSolverMultistepInverseScheduler", "does not take flow sigmas"),
        ("FlowMatchLCMScheduler", "does not sample a flow"),
    ],
)
def test_bad_names_are_refused_in_one_line(name, message, noise, shifted_grid):
    with pytest.raises(ValueError, match=message) as refusal:
        check_solver(name)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)
    if name in ("dpm3", "DDIMScheduler"):
        with pytest.raises(ValueError, match=message):
            solve(name, lambda x, sigma: x, noise, shifted_grid(2), shift=1.0)


def test_a_scheduler_needs_the_shift(noise, shifted_grid):
    with pytest.raises(ValueError, match="needs the model's shift"):
        solve("UniPCMultistepScheduler", lambda x, sigma: x, noise, shifted_grid(2))
