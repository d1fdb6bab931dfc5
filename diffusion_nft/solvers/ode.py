"""Deterministic solvers of the probability-flow ODE  dx/dsigma = velocity(x, sigma).

They have the signature of ``common.Solver`` and ignore ``generator`` and ``noise_level``.
"""

import math
from itertools import pairwise

from torch import Tensor

from diffusion_nft.flow import x0_from_velocity
from diffusion_nft.solvers.common import Generators, Velocity, at_least_float32, batch_sigma, grid


def heun(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: Generators = None,
    noise_level: float = 0.0,
) -> Tensor:
    """Heun's method, second order, 2N-1 evaluations (EDM, arXiv 2206.00364, Algorithm 1).

    ``x' = x + (t - s) (v(x, s) + v(x_euler, t)) / 2``; the step to sigma 0 is an Euler step, so
    that the velocity is never evaluated at sigma 0.
    """
    x = at_least_float32(x)
    for s, t in pairwise(grid(sigmas)):
        v = velocity(x, batch_sigma(s, x))
        euler = x + (t - s) * v
        if t > 0:
            v = 0.5 * (v + velocity(euler, batch_sigma(t, x)))
        x = x + (t - s) * v
    return x


def dpm(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    order: int,
    generator: Generators = None,
    noise_level: float = 0.0,
) -> Tensor:
    """Multistep DPM-Solver++ of ``order`` 1 or 2 (arXiv 2211.01095), N evaluations.

    Order 1 (the case k = 1, which is DDIM with eta 0 and Euler's method):
    ``x' = (t/s) x - (1-t) (exp(-h) - 1) x0_hat`` with ``h = lambda_t - lambda_s`` and
    ``lambda = log((1-sigma)/sigma)``; for flows ``(1-t) (1 - exp(-h)) = 1 - t/s``, which is finite.

    Order 2 ("2M", Algorithm 2) extrapolates x0_hat in lambda to the middle of the step:
    ``x0_hat_i + (x0_hat_i - x0_hat_{i-1}) h_i / (2 h_{i-1})``.  The first step, without history,
    and the last, which ends at lambda = infinity, are of order 1.
    """
    x = at_least_float32(x)
    levels = grid(sigmas)
    last = len(levels) - 2
    x0_previous = None
    for i, (s, t) in enumerate(pairwise(levels)):
        sigma = batch_sigma(s, x)
        x0_hat = x0_from_velocity(x, velocity(x, sigma), sigma)
        target = x0_hat
        if order == 2 and x0_previous is not None and i < last:
            h, h_previous = _log_snr(t) - _log_snr(s), _log_snr(s) - _log_snr(levels[i - 1])
            target = x0_hat + (0.5 * h / h_previous) * (x0_hat - x0_previous)
        x = (t / s) * x + (1 - t / s) * target
        x0_previous = x0_hat
    return x


def _log_snr(sigma: float) -> float:
    """``log((1 - sigma) / sigma)`` for sigma in (0, 1]."""
    return -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)
