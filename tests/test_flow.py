"""The forward process: ends, inverses, and diffusers' scheduler for the timesteps."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusion_nft.flow import add_noise, timestep_from_sigma, x0_from_velocity

SIGMA = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
G = torch.Generator().manual_seed(0)
X0 = torch.randn(3, 2, 4, 4, generator=G, dtype=torch.float64)
NOISE = torch.randn(3, 2, 4, 4, generator=G, dtype=torch.float64)


def test_the_ends_are_the_image_and_the_noise():
    xt = add_noise(X0, NOISE, SIGMA)
    assert torch.equal(xt[0], X0[0]) and torch.equal(xt[2], NOISE[2])
    torch.testing.assert_close(xt[1], 0.75 * X0[1] + 0.25 * NOISE[1])


def test_the_true_velocity_leads_back_to_the_image():
    xt = add_noise(X0, NOISE, SIGMA)
    torch.testing.assert_close(x0_from_velocity(xt, NOISE - X0, SIGMA), X0)


def test_timesteps_are_diffusers_own_and_not_truncated():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    ours = timestep_from_sigma(scheduler.sigmas[:-1])
    torch.testing.assert_close(ours, scheduler.timesteps)
    assert bool((ours != ours.round()).any())
