"""A data distribution whose velocity and flow map are known without any solver."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Every latent element is drawn independently from a mixture of 1-D Gaussians."""

    means: tuple[float, ...]
    stds: tuple[float, ...]

    def _components(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        means = torch.tensor(self.means, dtype=sigma.dtype)
        variances = torch.tensor(self.stds, dtype=sigma.dtype) ** 2
        sigma = sigma.reshape(-1, 1, 1, 1, 1)
        total = (1 - sigma) ** 2 * variances + sigma**2
        return means, variances, sigma, total

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[noise - x0 | xt = x], by Bayes' rule."""
        means, variances, sigma, total = self._components(sigma)
        residual = x.unsqueeze(-1) - (1 - sigma) * means
        weights = torch.softmax(-0.5 * residual**2 / total - 0.5 * total.log(), -1)
        x0 = means + (1 - sigma) * variances / total * residual
        noise = sigma / total * residual
        return (weights * (noise - x0)).sum(-1)

    def _cdf(self, x: Tensor, sigma: float) -> Tensor:
        means, _, s, total = self._components(torch.tensor([sigma], dtype=x.dtype))
        return torch.special.ndtr((x.unsqueeze(-1) - (1 - s) * means) / total.sqrt()).mean(-1)

    def flow_map(self, x: Tensor, start: float = 1.0, end: float = 0.0) -> Tensor:
        """The ODE's solution from ``start`` to ``end``: in 1-D the map that preserves quantiles."""
        quantile = self._cdf(x, start)
        low, high = torch.full_like(x, -20.0), torch.full_like(x, 20.0)
        for _ in range(80):
            middle = (low + high) / 2
            below = self._cdf(middle, end) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2


@pytest.fixture
def gaussian() -> Mixture:
    return Mixture(means=(0.7,), stds=(0.4,))


@pytest.fixture
def mixture() -> Mixture:
    return Mixture(means=(-1.0, 1.2), stds=(0.5, 0.7))


@pytest.fixture
def noise() -> Tensor:
    """``[3, 2, 2, 4]``, float64, covering the bulk of a standard normal."""
    return torch.linspace(-2.0, 2.0, 48, dtype=torch.float64).reshape(3, 2, 2, 4)


@pytest.fixture
def shifted_grid():
    """SD3's grid: uniform levels pushed towards the noise by ``shift``, and 0 at the end."""

    def grid(num_steps: int, shift: float = 3.0) -> Tensor:
        u = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return shift * u / (1 + (shift - 1) * u)

    return grid
