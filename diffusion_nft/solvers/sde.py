"""Stochastic solvers: x' ~ N(mean, std^2) at every step, with a density for policy gradients.

Every step is an Euler step plus a multiple of the predicted noise ``noise_hat = x + (1 - sigma) v``
and new noise ``n``:

    x' = mean + std n,      mean = x + (sigma_next - sigma) v + pull noise_hat

A rule computes ``(pull, std)`` from ``(sigma, sigma_next, noise_level)``; at ``noise_level`` 0 both
are zero.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_nft.flow import expand
from diffusion_nft.solvers.common import Generators, Velocity, at_least_float32, batch_sigma, grid
from diffusion_nft.utils.devices import to_device

StepRule = Callable[[float, float, float], tuple[float, float]]


class Trajectory(NamedTuple):
    """The states of a stochastic solver, from noise to clean latents."""

    xs: Tensor  # [N+1, B, C, h, w]
    log_probs: Tensor  # [N, B], of the steps; NaN for deterministic ones


def flow_rule(sigma: float, sigma_next: float, noise_level: float) -> tuple[float, float]:
    """Flow-GRPO (arXiv 2505.05470, section 4.2): diffusion ``g = a sqrt(sigma / (1 - sigma))``.

    At sigma 1 the denominator uses the next level.
    """
    denominator = 1 - (sigma_next if sigma == 1 else sigma)
    return _reverse_sde(sigma, sigma_next, noise_level * math.sqrt(sigma / denominator))


def dance_rule(sigma: float, sigma_next: float, noise_level: float) -> tuple[float, float]:
    """DanceGRPO (arXiv 2505.07818, the rectified-flow SDE): constant diffusion ``g = eta``."""
    return _reverse_sde(sigma, sigma_next, noise_level)


def ddim_rule(sigma: float, sigma_next: float, noise_level: float) -> tuple[float, float]:
    """DDIM (arXiv 2010.02502, eqs. 12 and 16) with alpha = 1 - sigma and eta = ``noise_level``.

    ``mean = (1-t) x0_hat + sqrt(t^2 - rho^2) noise_hat``; at eta 1 this is ancestral sampling.
    """
    s, t = sigma, sigma_next
    rho = noise_level * t * math.sqrt(1 - (t * (1 - s) / (s * (1 - t))) ** 2)
    # (1-t) x0_hat + t noise_hat is the Euler step: the pull is the change of the second weight.
    return math.sqrt(max(t * t - rho * rho, 0.0)) - t, rho


def _reverse_sde(sigma: float, sigma_next: float, g: float) -> tuple[float, float]:
    """Euler-Maruyama of ``dx = (v - g^2 score / 2) dsigma + g dw``, score = -noise_hat / sigma.

    Its marginals are the ODE's for any ``g`` (Song et al., arXiv 2011.13456, section 4.3).
    """
    d_sigma = sigma_next - sigma
    return 0.5 * g * g * d_sigma / sigma, g * math.sqrt(-d_sigma)


SDE_RULES: dict[str, StepRule] = {"flow": flow_rule, "dance": dance_rule, "ddim": ddim_rule}


def check_noise_level(name: str, noise_level: float) -> None:
    """Raises ValueError if the stochastic solver ``name`` does not support the noise level."""
    highest = 1.0 if name == "ddim" else math.inf
    if not 0 <= noise_level <= highest:
        allowed = "between 0 and 1" if name == "ddim" else "0 or more"
        raise ValueError(f"noise_level of solver '{name}' must be {allowed}, not {noise_level}")


def integrate(
    name: str,
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: Generators = None,
    noise_level: float = 0.0,
) -> Tensor:
    """The stochastic solver ``name``, as in ``common.Solver``."""
    x0 = x
    for x_next, _, _ in _walk(name, velocity, x, sigmas, generator, noise_level):
        x0 = x_next
    return x0


def sample_trajectory(
    name: str,
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: Generators = None,
    noise_level: float,
) -> Trajectory:
    """As ``integrate``; returns all states and the log-probabilities of the steps."""
    xs, log_probs = [at_least_float32(x)], []
    for x_next, mean, std in _walk(name, velocity, x, sigmas, generator, noise_level):
        xs.append(x_next)
        density = log_prob(x_next, mean, batch_sigma(std, x_next)) if std > 0 else math.nan
        log_probs.append(density * torch.ones_like(x_next[:, 0, 0, 0]))
    return Trajectory(torch.stack(xs), torch.stack(log_probs))


def sde_step(
    name: str, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, *, noise_level: float
) -> tuple[Tensor, Tensor]:
    """Mean and std of one step of ``name``, differentiable in ``v``, with one level per sample.

    ``x, v: [B, C, h, w]``; ``sigma, sigma_next: [B]``, on the CPU to avoid a synchronisation.
    Returns ``mean: [B, C, h, w]`` and ``std: [B]``.
    """
    check_noise_level(name, noise_level)
    levels = list(zip(sigma.tolist(), sigma_next.tolist(), strict=True))
    rules = [(s, t, *SDE_RULES[name](s, t, noise_level)) for s, t in levels]
    weights = [(*_weights(s, t, pull), std) for s, t, pull, std in rules]
    x_weight, v_weight, std = to_device(torch.tensor(weights, dtype=x.dtype), x.device).unbind(1)
    return expand(x_weight, x) * x + expand(v_weight, v) * v, std


def _walk(
    name: str,
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    generator: Generators,
    noise_level: float,
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yields ``(x_next, mean, std)`` per step."""
    check_noise_level(name, noise_level)
    x = at_least_float32(x)
    for s, t in pairwise(grid(sigmas)):
        pull, std = SDE_RULES[name](s, t, noise_level)
        x_weight, v_weight = _weights(s, t, pull)
        mean = x_weight * x + v_weight * velocity(x, batch_sigma(s, x))
        x = mean + std * draw_noise(x, generator) if std > 0 else mean
        yield x, mean, std


def _weights(sigma: float, sigma_next: float, pull: float) -> tuple[float, float]:
    """Weights of x and v in ``mean = x + (sigma_next - sigma) v + pull noise_hat``."""
    return 1 + pull, sigma_next - sigma + pull * (1 - sigma)


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of ``x_next: [B, C, h, w]`` under N(mean, std^2), MEAN over C, h, w -> ``[B]``.

    ``std: [B]`` must be positive.
    """
    std = expand(std, mean)
    density = -0.5 * ((x_next - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def draw_noise(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise like ``x``, drawn in float32 on the device of the generator: the
    numbers do not depend on the precision.
    """
    if generator is None:
        return torch.randn_like(x, dtype=torch.float32).to(x)
    if isinstance(generator, torch.Generator):
        noise = torch.randn(x.shape, generator=generator, device=generator.device)
    else:
        assert len(generator) == x.shape[0], "one generator per sample"
        shape = x.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generator])
    return to_device(noise, x.device).to(x.dtype)
