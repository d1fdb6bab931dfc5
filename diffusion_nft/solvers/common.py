"""What every solver shares: the type of a velocity function and the arithmetic of a sigma grid."""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

# velocity(x: [B, C, h, w], sigma: [B] in [0, 1]) -> [B, C, h, w], an estimate of noise - x0
Velocity = Callable[[Tensor, Tensor], Tensor]

# One generator for the whole batch, or one per sample: with the latter a sample's noise depends
# only on its own generator, never on the batch it sits in.  None draws from torch's global state.
Generators = torch.Generator | list[torch.Generator] | None


class Solver(Protocol):
    """The signature of every entry of `SOLVERS`; ODE solvers ignore both keywords."""

    def __call__(
        self,
        velocity: Velocity,
        x: Tensor,
        sigmas: Tensor,
        *,
        generator: Generators = None,
        noise_level: float = 0.0,
    ) -> Tensor:
        """Carry ``x: [B, C, h, w]`` from ``sigmas[0]`` to ``sigmas[-1]``, through N steps."""
        ...


def grid(sigmas: Tensor) -> list[float]:
    """``sigmas: [N+1]``, strictly decreasing in [0, 1], as Python floats.

    Coefficients are computed in them (float64, on the host), so no step waits for the device.
    """
    levels = sigmas.tolist()
    assert len(levels) >= 2
    assert all(0 <= t < s <= 1 for s, t in pairwise(levels))
    return levels


def at_least_float32(x: Tensor) -> Tensor:
    """The state between steps is never kept in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def batch_sigma(sigma: float, x: Tensor) -> Tensor:
    """One noise level as the ``[B]`` tensor that a velocity function takes."""
    return torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device)
