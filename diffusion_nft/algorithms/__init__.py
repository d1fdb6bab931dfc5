"""Algorithms by name: what the trainer minimises.

An algorithm is built from the config and offers ``loss(velocity, batch)`` and
``old_policy_decay(step)``.  ``velocity(policy)`` is the prediction of ``current`` (with gradient),
``old`` or ``reference`` (without) at the batch's noisy latents.  It knows nothing of ranks,
precision, checkpoints or logging.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

from ml_collections import ConfigDict
from torch import Tensor

# config.algorithm -> "module:Class".
ALGORITHMS: dict[str, str] = {
    "nft": "diffusion_nft.algorithms.nft:NFT",
}


@dataclass(frozen=True)
class Batch:
    """(sample, sigma) pairs: ``x0, noise, xt: [B, C, h, w]``, ``sigma, optimality: [B]``."""

    x0: Tensor
    noise: Tensor
    xt: Tensor
    sigma: Tensor
    optimality: Tensor


class Velocity(Protocol):
    """Velocity ``[B, C, h, w]`` of a policy by name."""

    def __call__(self, policy: str) -> Tensor:
        """Of ``current``, ``old`` or ``reference``."""
        ...


class Algorithm(Protocol):
    """The contract between a loss and the trainer."""

    def loss(self, velocity: Velocity, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """``[B]`` losses and detached ``[B]`` metrics; the trainer weights and reduces them."""
        ...

    def old_policy_decay(self, step: int) -> float:
        """eta after global optimizer step ``step``: old <- eta old + (1 - eta) current."""
        ...


def build_algorithm(config: ConfigDict) -> Any:
    """The algorithm that ``config.algorithm`` names."""
    module, _, cls = ALGORITHMS[config.algorithm].partition(":")
    return getattr(importlib.import_module(module), cls)(config)
