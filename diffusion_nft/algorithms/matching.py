"""Baselines that weight the flow-matching loss of the policy's own samples.

``l`` is the flow-matching error of a clean sample noised anew, ``mean (v - (noise - x0))^2`` or
another of ``nft.WEIGHTINGS``.  They differ in the weight of a sample:

- RewardWeighted: ``exp(A / temperature)``, reward-weighted regression (Peters and Schaal 2007); for
  flow matching ORW-CFM-W2 (arXiv 2502.06061), which weights by the reward itself and whose bound on
  the Wasserstein distance is the KL term here.
- BestOfN: rejection fine-tuning, the best k of a prompt's n images and no others.
- AdvantageWeighted: A of both signs, AWM (arXiv 2509.25050), which reads ``-l`` as a log-likelihood
  and clips the ratio ``exp(l_old - l)`` as PPO does.

All add ``kl_weight mean (v - v_ref)^2`` and sample with the newest policy.
"""

import math

import torch
from ml_collections import ConfigDict
from torch import Tensor

from diffusion_nft.advantages import shaped
from diffusion_nft.algorithms import Batch, KLWeighted, PolicyVelocity
from diffusion_nft.algorithms.flow_grpo import clipped_policy_loss
from diffusion_nft.algorithms.nft import WEIGHTINGS, with_kl


def exponential_weights(advantages: Tensor, temperature: float) -> Tensor:
    """``exp(A / temperature)`` over its mean: ``[N]`` weights of mean 1, NaN where A is."""
    scored = ~advantages.isnan()
    logits = (advantages / temperature).where(scored, -math.inf)
    return (torch.softmax(logits, dim=0) * scored.sum()).where(scored, math.nan)


def best_of_weights(advantages: Tensor, group_size: int, best: int) -> Tensor:
    """``group_size / best`` for the ``best`` samples of each group, else 0; ``[N]``, of mean 1.

    Of equal ones the first counts as the better.  Where an advantage is NaN, so is the weight, and
    the mean is another.
    """
    grouped = advantages.nan_to_num(-math.inf).reshape(-1, group_size)
    chosen = grouped.argsort(dim=1, descending=True, stable=True)[:, :best]
    weights = torch.zeros_like(grouped).scatter(1, chosen, group_size / best)
    return weights.reshape(-1).where(~advantages.isnan(), math.nan)


def matching_loss(
    v: Tensor,
    v_ref: Tensor | None,
    *,
    x0: Tensor,
    noise: Tensor,
    xt: Tensor,
    sigma: Tensor,
    weight: Tensor,
    kl_weight: float,
    weighting: str = "uniform",
) -> tuple[Tensor, dict[str, Tensor]]:
    """``weight l + kl_weight mean (v - v_ref)^2`` of each (sample, sigma) pair.

    ``v, v_ref, x0, noise, xt: [B, C, h, w]``; ``sigma: [B]`` in [0, 1], ``weight: [B]``.  Only
    ``v`` carries a gradient; ``v_ref`` may be None if ``kl_weight`` is 0.  Returns ``[B]`` losses
    and detached ``[B]`` metrics.  Raises ValueError if ``kl_weight`` is not 0 and there is no
    ``v_ref``.
    """
    error = WEIGHTINGS[weighting](v, x0, noise, xt, sigma)
    policy = weight.to(torch.float64) * error
    metrics = {"loss/policy": policy.detach(), "loss/error": error.detach()}
    return with_kl(policy, metrics, v, v_ref, kl_weight)


def advantage_matching_loss(
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    *,
    x0: Tensor,
    noise: Tensor,
    xt: Tensor,
    sigma: Tensor,
    advantage: Tensor,
    clip_range: float,
    kl_weight: float,
    weighting: str = "uniform",
) -> tuple[Tensor, dict[str, Tensor]]:
    """The AWM loss of each (sample, sigma) pair; shapes, returns and errors as `matching_loss`.

        loss = max(-A ratio, -A clip(ratio, 1 - e, 1 + e)) + kl_weight mean (v - v_ref)^2
        ratio = exp(l_old - l)

    At ``v = v_old`` the ratio is 1 and the gradient ``A grad l``.  Plain ``A l`` has no minimum for
    a negative A; here a bad sample's pull fades with the ratio as its error grows.

    The published code has two things that are left out: a power 1/4 of the error for ``l``, and a
    second pull, to a slowly following copy of the weights.
    """
    branch = WEIGHTINGS[weighting]
    error = branch(v, x0, noise, xt, sigma)
    old_error = branch(v_old.detach(), x0, noise, xt, sigma)
    policy, metrics = clipped_policy_loss(old_error - error, advantage, clip_range)
    metrics["loss/error"] = error.detach()
    return with_kl(policy, metrics, v, v_ref, kl_weight)


class _Matching(KLWeighted):
    """What the three have in common: everything but the weights of samples."""

    on_trajectories = False
    section = "matching"
    skips_weightless = False

    def __init__(self, config: ConfigDict):
        self.config, self.kl_weight = config.matching, config.matching.kl_weight
        self.shaping = dict(adv_clip_max=config.train.adv_clip_max, adv_mode=config.train.adv_mode)

    @property
    def policies(self) -> tuple[str, ...]:
        """No reference forward where the KL term is off."""
        return ("current", *(["reference"] if self.kl_weight else []))

    def loss(self, velocity: PolicyVelocity, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[B]`` and metrics ``[B]``."""
        v_ref = self._reference(velocity)
        return matching_loss(
            velocity("current"),
            v_ref,
            x0=batch.x0,
            noise=batch.noise,
            xt=batch.xt,
            sigma=batch.sigma,
            weight=batch.weight,
            kl_weight=self.kl_weight,
            weighting=self.config.weighting,
        )

    def _reference(self, velocity: PolicyVelocity) -> Tensor | None:
        return velocity("reference") if "reference" in self.policies else None

    def old_policy_decay(self, step: int) -> float:
        """0: each epoch is sampled by the policy that the former one trained."""
        return 0.0


class RewardWeighted(_Matching):
    """Flow matching on all samples, weighted by the exponential of their advantage."""

    def sample_weights(self, advantages: Tensor, group_size: int) -> Tensor:
        """``exp(A / temperature)`` of the clipped and shaped advantage, of mean 1."""
        return exponential_weights(shaped(advantages, **self.shaping), self.config.temperature)


class BestOfN(_Matching):
    """Flow matching on the best samples of each prompt; the others have no KL term either."""

    skips_weightless = True

    def sample_weights(self, advantages: Tensor, group_size: int) -> Tensor:
        """n / k for the best k of a group's n samples, else 0."""
        return best_of_weights(advantages, group_size, self.config.best_of)


class AdvantageWeighted(_Matching):
    """Towards good samples and away from bad ones, within a clipped ratio."""

    @property
    def policies(self) -> tuple[str, ...]:
        """The old policy's error is the ratio's denominator."""
        return (*super().policies, "old")

    def sample_weights(self, advantages: Tensor, group_size: int) -> Tensor:
        """The clipped and shaped advantage of each sample."""
        return shaped(advantages, **self.shaping)

    def loss(self, velocity: PolicyVelocity, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[B]`` and metrics ``[B]``."""
        v_ref, v_old = self._reference(velocity), velocity("old")
        return advantage_matching_loss(
            velocity("current"),
            v_old,
            v_ref,
            x0=batch.x0,
            noise=batch.noise,
            xt=batch.xt,
            sigma=batch.sigma,
            advantage=batch.weight,
            clip_range=self.config.clip_range,
            kl_weight=self.kl_weight,
            weighting=self.config.weighting,
        )
