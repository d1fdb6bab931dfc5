"""Training algorithms by name, and the interface that they implement.

Most algorithms train on the forward process, on clean samples with new noise (``Batch``).  A policy
gradient trains on the sampler's own steps (``Transitions``).
"""

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

from ml_collections import ConfigDict
from torch import Tensor

from diffusion_nft.advantages import shaped

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
    weight: Tensor  # of the sample, from ``Algorithm.sample_weights``


@dataclass(frozen=True)
class Transitions:
    """Steps of a stochastic sampler from ``xt`` to ``xt_next``, both ``[B, C, h, w]``."""

    xt: Tensor
    xt_next: Tensor
    sigma: Tensor  # [B], on the CPU, as required by ``solvers.sde_step``
    sigma_next: Tensor  # [B], on the CPU
    log_prob: Tensor  # [B]: of the step under the policy that sampled it
    weight: Tensor  # [B], as in ``Batch``


class PolicyVelocity(Protocol):
    """Velocity ``[B, C, h, w]`` at the batch's noisy latents, predicted by the policy ``current``
    (with gradient), ``old`` or ``reference`` (both without).
    """

    def __call__(self, policy: str) -> Tensor: ...


class Algorithm:
    """Base class of the algorithms: a loss, and the weights of samples in it.

    Independent of ranks, precision, checkpoints and logging.
    """

    # Section of the configuration with the algorithm's own keys, including ``kl_weight``.
    section: str
    # True: ``loss`` takes Transitions, and velocities use the rollout's guidance.  False: it takes
    # a Batch, and velocities are unguided.
    on_trajectories = False
    # True: samples of weight 0 count in the mean but are not trained on.
    skips_weightless = False

    def __init__(self, config: ConfigDict):
        self.kl_weight: float = config[self.section].kl_weight
        self.shaping = dict(adv_clip_max=config.train.adv_clip_max, adv_mode=config.train.adv_mode)

    def scale_kl(self, factor: float) -> None:
        """Multiplies the weight of the KL term; called by the monitor after an alarm."""
        self.kl_weight *= factor

    @property
    def policies(self) -> tuple[str, ...]:
        """Policies whose velocity ``loss`` needs; the reference only if there is a KL term."""
        return ("current", *(["reference"] if self.kl_weight else []))

    def sample_weights(self, advantages: Tensor, group_size: int) -> Tensor:
        """``[N]`` weights of an epoch's samples, by default their clipped and shaped advantages.

        ``advantages: [N]``, float64, not clipped, consecutive samples of a group adjacent.  NaN
        for a sample without a score, which is not trained on.
        """
        del group_size
        return shaped(advantages, **self.shaping)

    def loss(self, velocity: PolicyVelocity, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """``[B]`` losses and detached ``[B]`` metrics; the caller weights and reduces them."""
        raise NotImplementedError

    def old_policy_decay(self, step: int) -> float:
        """eta of ``old <- eta old + (1 - eta) current`` after optimizer step ``step``, counted from
        the start of training; by default 0, so each epoch samples with the newest policy.
        """
        del step
        return 0.0

    def _reference(self, velocity: PolicyVelocity) -> Tensor | None:
        return velocity("reference") if "reference" in self.policies else None


def algorithm_class(name: str) -> type[Algorithm]:
    module, _, cls = ALGORITHMS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def build_algorithm(config: ConfigDict) -> Algorithm:
    return algorithm_class(config.algorithm)(config)
