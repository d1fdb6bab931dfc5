"""Algorithms by name: what the trainer minimises.

An algorithm is built from the config.  It turns advantages into weights of samples, and offers
``loss(velocity, batch)``; ``velocity(policy)`` is the prediction of ``current`` (with gradient),
``old`` or ``reference`` (without) at the batch's noisy latents.  It knows nothing of ranks,
precision, checkpoints or logging.

Most algorithms train on the forward process, on clean samples that are noised anew (``Batch``).  A
policy gradient trains on the steps that the sampler took (``Transitions``).
"""

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

from ml_collections import ConfigDict
from torch import Tensor

# config.algorithm -> "module:Class".
ALGORITHMS: dict[str, str] = {
    "nft": "diffusion_nft.algorithms.nft:NFT",
    "flow_grpo": "diffusion_nft.algorithms.flow_grpo:FlowGRPO",
    "reward_weighted": "diffusion_nft.algorithms.matching:RewardWeighted",
    "advantage_weighted": "diffusion_nft.algorithms.matching:AdvantageWeighted",
    "best_of_n": "diffusion_nft.algorithms.matching:BestOfN",
}


@dataclass(frozen=True)
class Batch:
    """(sample, sigma) pairs: ``x0, noise, xt: [B, C, h, w]``, ``sigma, weight: [B]``."""

    x0: Tensor
    noise: Tensor
    xt: Tensor
    sigma: Tensor
    weight: Tensor  # what ``Algorithm.sample_weights`` gave the sample


@dataclass(frozen=True)
class Transitions:
    """Steps of a stochastic sampler from ``xt`` to ``xt_next``, both ``[B, C, h, w]``."""

    xt: Tensor
    xt_next: Tensor
    sigma: Tensor  # [B], on the CPU, as ``solvers.sde_step`` wants it
    sigma_next: Tensor  # [B], on the CPU
    log_prob: Tensor  # [B]: of the step under the policy that took it
    weight: Tensor  # [B], as in ``Batch``


class PolicyVelocity(Protocol):
    """Velocity ``[B, C, h, w]`` of a policy by name."""

    def __call__(self, policy: str) -> Tensor:
        """Of ``current``, ``old`` or ``reference``."""
        ...


class Algorithm(Protocol):
    """The contract between a loss and the trainer."""

    # The section of the configuration that has its own keys, ``kl_weight`` among them.
    section: str
    # Whether ``loss`` takes Transitions, not a Batch.  Velocities then have the rollout's guidance,
    # as the steps were taken with it; otherwise they have none.
    on_trajectories: bool
    # Whether samples of weight 0 are left out: they count in the mean, and cost nothing.
    skips_weightless: bool
    kl_weight: float  # of the distance to the reference in the loss

    def scale_kl(self, factor: float) -> None:
        """Multiplies ``kl_weight``: the monitor raises it after an alarm."""
        ...

    @property
    def policies(self) -> tuple[str, ...]:
        """The policies whose velocity ``loss`` asks for."""
        ...

    def sample_weights(self, advantages: Tensor, group_size: int) -> Tensor:
        """``[N]`` weights of all samples of an epoch, from their advantages ``[N]`` (float64, not
        clipped), a group's samples side by side.  NaN for a sample without a score, which is
        not trained on.
        """
        ...

    def loss(self, velocity: PolicyVelocity, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """``[B]`` losses and detached ``[B]`` metrics; the trainer weights and reduces them."""
        ...

    def old_policy_decay(self, step: int) -> float:
        """eta after global optimizer step ``step``: old <- eta old + (1 - eta) current."""
        ...


class KLWeighted:
    """An algorithm's ``kl_weight`` and its scaling."""

    kl_weight: float

    def scale_kl(self, factor: float) -> None:
        """Multiplies ``kl_weight`` by ``factor``."""
        self.kl_weight *= factor


def algorithm_class(name: str) -> Any:
    """The class of algorithm ``name``."""
    module, _, cls = ALGORITHMS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def build_algorithm(config: ConfigDict) -> Any:
    """The algorithm that ``config.algorithm`` names."""
    return algorithm_class(config.algorithm)(config)
