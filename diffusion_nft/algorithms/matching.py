"""Baselines that weight the flow-matching loss of the policy's own samples.

``l`` is the flow-matching error of a clean sample with new noise, ``mean (v - (noise - x0))^2`` or
another of ``nft.WEIGHTINGS``.  The weight of a sample is

- RewardWeighted: ``exp(A / temperature)``, reward-weighted regression (Peters and Schaal 2007).
  ORW-CFM-W2 (arXiv 2502.06061), its variant for flow matching, weights by the reward itself; its
  bound on the Wasserstein distance is the KL term here.
- BestOfN: n / k for the best k of a prompt's n images, else 0 (rejection fine-tuning).
- AdvantageWeighted: A of both signs, AWM (arXiv 2509.25050), with ``-l`` as the log-likelihood and
  the ratio ``exp(l_old - l)`` clipped as in PPO.

All add ``kl_weight mean (v - v_ref)^2`` and sample with the newest policy.
"""

import math

import torch
from ml_collections import ConfigDict
from torch import Tensor

from diffusion_nft.algorithms import Algorithm, Batch, PolicyVelocity
from diffusion_nft.algorithms.flow_grpo import clipped_policy_loss
from diffusion_nft.algorithms.nft import WEIGHTINGS, with_kl


def exponential_weights(advantages: Tensor, temperature: float) -> Tensor:
    """``exp(A / temperature)`` divided by its mean: ``[N]``, NaN where A is NaN."""
    scored = ~advantages.isnan()
    logits = (advantages / temperature).where(scored, -math.inf)
    return (torch.softmax(logits, dim=0) * scored.sum()).where(scored, math.nan)


def best_of_weights(advantages: Tensor, group_size: int, best: int) -> Tensor:
    """``[N]``: ``group_size / best`` for the ``best`` samples of each group, else 0.

    Ties go to the first sample.  The mean is 1 if no advantage is NaN; the weight is NaN where the
    advantage is.
    """
    grouped = advantages.nan_to_num(-math.inf).reshape(-1, group_size)
    chosen = grouped.argsort(dim=1, descending=True, stable=True)[:, :best]
    weights = torch.zeros_like(grouped).scatter(1, chosen, group_size / best)
    return weights.reshape(-1).where(~advantages.isnan(), math.nan)


def matching_loss(
    v: Tensor,
    v_ref: Tensor | None,
    batch: Batch,
    *,
    kl_weight: float,
    weighting: str = "uniform",
) -> tuple[Tensor, dict[str, Tensor]]:
    """``weight l + kl_weight mean (v - v_ref)^2`` of each (sample, sigma) pair.

    ``v, v_ref: [B, C, h, w]``.  Only ``v`` carries a gradient; ``v_ref`` may be None if
    ``kl_weight`` is 0.  Returns ``[B]`` losses and detached ``[B]`` metrics.  Raises ValueError as
    ``with_kl``.
    """
    error = WEIGHTINGS[weighting](v, batch)
    policy = batch.weight.to(torch.float64) * error
    metrics = {"loss/policy": policy.detach(), "loss/error": error.detach()}
    return with_kl(policy, metrics, v, v_ref, kl_weight)


def advantage_matching_loss(
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    batch: Batch,
    *,
    clip_range: float,
    kl_weight: float,
    weighting: str = "uniform",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The AWM loss of each (sample, sigma) pair; shapes, returns and errors as ``matching_loss``.
    ``batch.weight`` is the advantage A.

        loss = max(-A ratio, -A clip(ratio, 1 - e, 1 + e)) + kl_weight mean (v - v_ref)^2
        ratio = exp(l_old - l)

    At ``v = v_old`` the ratio is 1 and the gradient ``A grad l``.  Plain ``A l`` has no minimum for
    a negative A; here the gradient of a bad sample vanishes with the ratio as its error grows.

    Unlike in the published code, the error is not raised to the power 1/4, and the distance to a
    slowly updated copy of the weights is not penalised.
    """
    branch = WEIGHTINGS[weighting]
    error, old_error = branch(v, batch), branch(v_old.detach(), batch)
    policy, metrics = clipped_policy_loss(old_error - error, batch.weight, clip_range)
    metrics["loss/error"] = error.detach()
    return with_kl(policy, metrics, v, v_ref, kl_weight)


class _Matching(Algorithm):
    section = "matching"

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        self.config = config.matching

    def loss(self, velocity: PolicyVelocity, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        v_ref, v = self._reference(velocity), velocity("current")
        weighting = self.config.weighting
        return matching_loss(v, v_ref, batch, kl_weight=self.kl_weight, weighting=weighting)


class RewardWeighted(_Matching):
    """Flow matching on all samples, weighted by the exponential of their shaped advantage."""

    def sample_weights(self, advantages: Tensor, group_size: int) -> Tensor:
        weights = super().sample_weights(advantages, group_size)
        return exponential_weights(weights, self.config.temperature)


class BestOfN(_Matching):
    """Flow matching on the best samples of each prompt; the others have no KL term either."""

    skips_weightless = True

    def sample_weights(self, advantages: Tensor, group_size: int) -> Tensor:
        return best_of_weights(advantages, group_size, self.config.best_of)


class AdvantageWeighted(_Matching):
    """Flow matching weighted by the shaped advantage, within a clipped ratio."""

    @property
    def policies(self) -> tuple[str, ...]:
        return (*super().policies, "old")

    def loss(self, velocity: PolicyVelocity, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        v_ref, v_old = self._reference(velocity), velocity("old")
        return advantage_matching_loss(
            velocity("current"),
            v_old,
            v_ref,
            batch,
            clip_range=self.config.clip_range,
            kl_weight=self.kl_weight,
            weighting=self.config.weighting,
        )
