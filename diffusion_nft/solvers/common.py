"""Types and helpers of all solvers."""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

# velocity(x: [B, C, h, w], sigma: [B] in [0, 1]) -> [B, C, h, w], an estimate of noise - x0
Velocity = Callable[[Tensor, Tensor], Tensor]

# One generator for the batch, or one per sample, which makes its noise independent of the batch.
# None: torch's global generator.
Generators = torch.Generator | list[torch.Generator] | None


class Solver(Protocol):
    """Signature of all ``SOLVERS``; deterministic ones ignore both keywords."""

    def __call__(
        self,
        velocity: Velocity,
        x: Tensor,
        sigmas: Tensor,
        *,
        generator: Generators = None,
        noise_level: float = 0.0,
    ) -> Tensor:
        """Solves from ``x: [B, C, h, w]`` at ``sigmas[0]`` to ``sigmas[-1]`` in N steps."""
        ...


def grid(sigmas: Tensor) -> list[float]:
    """``sigmas: [N+1]``, strictly decreasing in [0, 1], as Python floats.

    Coefficients are then computed in float64 on the host, without synchronising the device.
    """
    levels = sigmas.tolist()
    assert len(levels) >= 2
    assert all(0 <= t < s <= 1 for s, t in pairwise(levels))
    return levels


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or wider; the state between steps is never in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def batch_sigma(sigma: float, x: Tensor) -> Tensor:
    """``sigma`` as a ``[B]`` tensor."""
    return torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device)
