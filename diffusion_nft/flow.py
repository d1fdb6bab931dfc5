"""Rectified flow: the forward process, its velocity, and the sigma <-> timestep conversion.

Notation (arXiv 2509.16117): ``sigma`` in [0, 1] is the noise level, ``xt = (1 - sigma) x0 + sigma
noise``, and the model predicts the velocity ``noise - x0``.
"""

from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def timestep_from_sigma(sigma: Tensor) -> Tensor:
    """The transformer's timestep in [0, 1000], not rounded."""
    return sigma * NUM_TRAIN_TIMESTEPS


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """``sigma: [B]`` or ``[]`` as ``[B, 1, ..., 1]``, to broadcast with ``like: [B, ...]``."""
    return sigma.reshape(-1, *([1] * (like.ndim - 1)))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The forward process: ``xt = (1 - sigma) x0 + sigma noise``; ``sigma: [B]``."""
    s = expand(sigma, x0)
    return (1 - s) * x0 + s * noise


def x0_from_velocity(xt: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The predicted clean latent: ``x0_hat = xt - sigma velocity``."""
    return xt - expand(sigma, xt) * velocity
