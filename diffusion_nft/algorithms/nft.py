"""DiffusionNFT (arXiv 2509.16117): the loss and the schedules of the old policy.

The sampling policy ``v_old`` and the trained policy ``v_theta`` define two implicit policies (eq. 5
of the paper; beta is the mixing strength, 1/beta the guidance strength):

    v+ = (1 - beta) v_old + beta v_theta        v- = (1 + beta) v_old - beta v_theta

On a sample of optimality probability r, the positive policy is trained by flow matching with
weight r and the negative one with weight 1 - r.  Only clean samples x0 are needed, neither
trajectories nor likelihoods.
"""

import re
from collections.abc import Callable

import torch
from ml_collections import ConfigDict
from torch import Tensor

from diffusion_nft.advantages import optimality
from diffusion_nft.algorithms import Algorithm, Batch, PolicyVelocity
from diffusion_nft.flow import x0_from_velocity

# Floor of the adaptive weight's denominator.
MIN_DISTANCE = 1e-5


def _per_sample_mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def _adaptive(v: Tensor, batch: Batch) -> Tensor:
    """mean (x0_hat - x0)^2 / sg[mean |x0_hat - x0|]: self-normalised x0 regression, in float64."""
    error = (x0_from_velocity(batch.xt, v, batch.sigma) - batch.x0).to(torch.float64)
    distance = _per_sample_mean(error.detach().abs()).clamp(min=MIN_DISTANCE)
    return _per_sample_mean(error.square()) / distance


def _fixed(weight: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Batch], Tensor]:
    """w(sigma) mean (v - (noise - x0))^2: velocity matching weighted by a function of sigma."""

    def branch(v: Tensor, batch: Batch) -> Tensor:
        error = (v - (batch.noise - batch.x0)).to(torch.float64)
        return weight(batch.sigma.to(torch.float64)) * _per_sample_mean(error.square())

    return branch


# Weightings of a branch's regression (the paper's ablation): [B] losses of a velocity on a batch.
WEIGHTINGS: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "adaptive": _adaptive,
    "uniform": _fixed(torch.ones_like),
    "sigma": _fixed(lambda sigma: sigma),
    "one_minus_sigma": _fixed(lambda sigma: 1 - sigma),
}


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    batch: Batch,
    *,
    beta: float,
    kl_weight: float,
    adv_clip_max: float,
    weighting: str = "adaptive",
    negative_branch: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The NFT loss of each (sample, sigma) pair.

    ``v, v_old, v_ref: [B, C, h, w]``; ``batch.weight`` is the optimality probability r.  Only ``v``
    carries a gradient; ``v_ref`` may be None if ``kl_weight`` is 0.

        loss = adv_clip_max / beta (r l+ + (1 - r) l-) + kl_weight mean (v - v_ref)^2

    Returns ``[B]`` losses and detached ``[B]`` metrics (the caller reduces both).  The KL term is
    logged unweighted.  Raises ValueError as ``with_kl``.
    """
    branch = WEIGHTINGS[weighting]
    v_old = v_old.detach()
    r = batch.weight.to(torch.float64)
    positive = branch((1 - beta) * v_old + beta * v, batch)
    policy = r * positive
    metrics = {"loss/positive": positive.detach()}
    if negative_branch:
        negative = branch((1 + beta) * v_old - beta * v, batch)
        policy = policy + (1 - r) * negative
        metrics["loss/negative"] = negative.detach()
    policy = adv_clip_max * policy / beta
    metrics["loss/policy"] = policy.detach()
    metrics["loss/old_distance"] = _per_sample_mean((v.detach() - v_old).square())
    return with_kl(policy, metrics, v, v_ref, kl_weight)


def with_kl(
    policy: Tensor, metrics: dict[str, Tensor], v: Tensor, v_ref: Tensor | None, kl_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """``policy + kl_weight mean (v - v_ref)^2`` ``[B]``, and ``metrics`` with the unweighted mean
    as ``loss/kl``.  Returns both unchanged if ``v_ref`` is None; raises ValueError if ``kl_weight``
    is not 0 then.
    """
    if v_ref is None:
        if kl_weight:
            raise ValueError(f"kl_weight is {kl_weight}, but no reference velocity was given")
        return policy, metrics
    kl = _per_sample_mean((v - v_ref.detach()).square())
    return policy + kl_weight * kl, metrics | {"loss/kl": kl.detach()}


def _capped_line(slope: float, start: int, cap: float) -> Callable[[int], float]:
    return lambda step: min(slope * max(step - start, 0), cap)


# eta of theta_old <- eta theta_old + (1 - eta) theta, by global optimizer step (counting the steps
# just taken).  The decay types 0, 1, 2 of the published code are the first, second and fourth;
# "linear_to_095" is the paper's choice for OCR in the multi-reward recipe.
OLD_POLICY_DECAYS: dict[str, Callable[[int], float]] = {
    "on_policy": lambda step: 0.0,
    "linear_to_half": _capped_line(0.001, 0, 0.5),
    "linear_to_095": _capped_line(0.001, 0, 0.95),
    "delayed_linear": _capped_line(0.0075, 75, 0.999),
    "constant_09": lambda step: 0.9,
}
_NUMBER = r"\d{1,9}(?:\.\d{1,9})?"


def old_policy_schedule(name: str) -> Callable[[int], float]:
    """eta by optimizer step: one of ``OLD_POLICY_DECAYS``, or "linear:SLOPE:START:CAP" for
    min(SLOPE max(step - START, 0), CAP).  The named schedules suit runs of hundreds of steps.

    Raises ValueError for other names.
    """
    if name in OLD_POLICY_DECAYS:
        return OLD_POLICY_DECAYS[name]
    found = re.fullmatch(rf"linear:({_NUMBER}):(\d{{1,9}}):({_NUMBER})", name, re.ASCII)
    if not found or float(found[3]) >= 1:
        raise ValueError(
            f"choose from {', '.join(OLD_POLICY_DECAYS)}, or linear:SLOPE:START:CAP in plain "
            "decimals, START a whole number of steps and CAP in [0, 1), such as linear:0.01:0:0.5"
        )
    return _capped_line(float(found[1]), int(found[2]), float(found[3]))


class NFT(Algorithm):
    """``nft_loss`` with the options and the old policy's schedule of the configuration."""

    section = "nft"

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        self.options = dict(
            beta=config.nft.beta,
            adv_clip_max=config.train.adv_clip_max,
            weighting=config.nft.weighting,
            negative_branch=config.nft.negative_branch,
        )
        self._schedule = old_policy_schedule(config.nft.old_policy_decay)

    @property
    def policies(self) -> tuple[str, ...]:
        return (*super().policies, "old")

    def sample_weights(self, advantages: Tensor, group_size: int) -> Tensor:
        """``[N]`` optimality probabilities r in [0, 1]."""
        return optimality(advantages, **self.shaping)

    def loss(self, velocity: PolicyVelocity, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        v_old, v_ref = velocity("old"), self._reference(velocity)
        v = velocity("current")
        return nft_loss(v, v_old, v_ref, batch, kl_weight=self.kl_weight, **self.options)

    def old_policy_decay(self, step: int) -> float:
        return self._schedule(step)
