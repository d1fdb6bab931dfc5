"""DiffusionNFT (arXiv 2509.16117): the loss and the old policy's schedules.  Pure functions.

The policy that sampled, ``v_old``, and the policy being trained, ``v_theta``, define two implicit
policies around ``v_old`` (eq. 5 of the paper, beta the mixing strength, 1/beta its guidance
strength):

    v+ = (1 - beta) v_old + beta v_theta        v- = (1 + beta) v_old - beta v_theta

A sample of optimality probability r trains the positive one as a flow-matching model with weight r
and the negative one with weight 1 - r.  No trajectory, no likelihood: only clean samples x0.
"""

import re
from collections.abc import Callable

import torch
from ml_collections import ConfigDict
from torch import Tensor

from diffusion_nft.advantages import optimality
from diffusion_nft.algorithms import Batch, KLWeighted, PolicyVelocity
from diffusion_nft.flow import x0_from_velocity

# Floor of the adaptive weight's denominator.
MIN_DISTANCE = 1e-5


def _per_sample_mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def _adaptive(v: Tensor, x0: Tensor, noise: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
    """mean (x0_hat - x0)^2 / sg[mean |x0_hat - x0|]: self-normalised x0 regression, in float64."""
    error = (x0_from_velocity(xt, v, sigma) - x0).to(torch.float64)
    distance = _per_sample_mean(error.detach().abs()).clamp(min=MIN_DISTANCE)
    return _per_sample_mean(error.square()) / distance


def _fixed(weight: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """w(sigma) mean (v - (noise - x0))^2: velocity matching with a weight that is a function of
    sigma.
    """

    def branch(v: Tensor, x0: Tensor, noise: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        error = (v - (noise - x0)).to(torch.float64)
        return weight(sigma.to(torch.float64)) * _per_sample_mean(error.square())

    return branch


# Weightings of a branch's regression (the paper's ablation): [B] losses from
# (v, x0, noise, xt, sigma).
WEIGHTINGS: dict[str, Callable[..., Tensor]] = {
    "adaptive": _adaptive,
    "uniform": _fixed(torch.ones_like),
    "sigma": _fixed(lambda sigma: sigma),
    "one_minus_sigma": _fixed(lambda sigma: 1 - sigma),
}


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    v_ref: Tensor | None,
    *,
    x0: Tensor,
    noise: Tensor,
    xt: Tensor,
    sigma: Tensor,
    r: Tensor,
    beta: float,
    kl_weight: float,
    adv_clip_max: float,
    weighting: str = "adaptive",
    negative_branch: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The NFT loss of each (sample, sigma) pair.

    ``v, v_old, v_ref, x0, noise, xt: [B, C, h, w]``; ``sigma, r: [B]`` in [0, 1].  Only ``v``
    carries a gradient; ``v_ref`` may be None if ``kl_weight`` is 0.

        loss = adv_clip_max / beta (r l+ + (1 - r) l-) + kl_weight mean (v - v_ref)^2

    Returns ``[B]`` losses and detached ``[B]`` metrics (the caller reduces both).  The KL term is
    logged unweighted.
    """
    branch = WEIGHTINGS[weighting]
    v_old = v_old.detach()
    r = r.to(torch.float64)
    positive = branch((1 - beta) * v_old + beta * v, x0, noise, xt, sigma)
    policy = r * positive
    metrics = {"loss/positive": positive.detach()}
    if negative_branch:
        negative = branch((1 + beta) * v_old - beta * v, x0, noise, xt, sigma)
        policy = policy + (1 - r) * negative
        metrics["loss/negative"] = negative.detach()
    policy = adv_clip_max * policy / beta
    metrics["loss/policy"] = policy.detach()
    metrics["loss/old_distance"] = _per_sample_mean((v.detach() - v_old).square())
    return with_kl(policy, metrics, v, v_ref, kl_weight)


def with_kl(
    policy: Tensor, metrics: dict[str, Tensor], v: Tensor, v_ref: Tensor | None, kl_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """``policy + kl_weight mean (v - v_ref)^2`` ``[B]``, and ``metrics`` with ``loss/kl``, the mean
    alone.  Without a reference, both as they are: then ``kl_weight`` must be 0.
    """
    if v_ref is None:
        if kl_weight:
            raise ValueError(f"kl_weight is {kl_weight}, but no reference velocity was given")
        return policy, metrics
    kl = _per_sample_mean((v - v_ref.detach()).square())
    return policy + kl_weight * kl, metrics | {"loss/kl": kl.detach()}


def _capped_line(slope: float, start: int, cap: float) -> Callable[[int], float]:
    return lambda step: min(slope * max(step - start, 0), cap)


# eta at global optimizer step s (counting the steps just taken): theta_old <- eta theta_old +
# (1 - eta) theta.  "on_policy" follows at once; the published decay types 0, 1, 2 are the first,
# second and fourth; "linear_to_095" is the paper's choice for OCR inside the multi-reward recipe.
OLD_POLICY_DECAYS: dict[str, Callable[[int], float]] = {
    "on_policy": lambda step: 0.0,
    "linear_to_half": _capped_line(0.001, 0, 0.5),
    "linear_to_095": _capped_line(0.001, 0, 0.95),
    "delayed_linear": _capped_line(0.0075, 75, 0.999),
    "constant_09": lambda step: 0.9,
}
_NUMBER = r"\d{1,9}(?:\.\d{1,9})?"


def old_policy_schedule(name: str) -> Callable[[int], float]:
    """eta by optimizer step: one of ``OLD_POLICY_DECAYS``, or "linear:SLOPE:START:CAP", which is
    min(SLOPE max(step - START, 0), CAP).  The named lines are made for runs of hundreds of steps.

    Raises ValueError for any other text.
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


class NFT(KLWeighted):
    """``nft_loss`` and the old policy's schedule, as the config sets them."""

    on_trajectories = False
    section = "nft"
    skips_weightless = False

    def __init__(self, config: ConfigDict):
        self.options = dict(
            beta=config.nft.beta,
            adv_clip_max=config.train.adv_clip_max,
            weighting=config.nft.weighting,
            negative_branch=config.nft.negative_branch,
        )
        self.kl_weight = config.nft.kl_weight
        self.shaping = dict(adv_clip_max=config.train.adv_clip_max, adv_mode=config.train.adv_mode)
        self.old_policy_decay = old_policy_schedule(config.nft.old_policy_decay)

    @property
    def policies(self) -> tuple[str, ...]:
        """No reference forward where the KL term is off."""
        return ("current", "old", *(["reference"] if self.kl_weight else []))

    def sample_weights(self, advantages: Tensor, group_size: int) -> Tensor:
        """The optimality r in [0, 1] of each sample."""
        return optimality(advantages, **self.shaping)

    def loss(self, velocity: PolicyVelocity, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[B]`` and metrics ``[B]``."""
        v_old = velocity("old")
        v_ref = velocity("reference") if "reference" in self.policies else None
        return nft_loss(
            velocity("current"),
            v_old,
            v_ref,
            x0=batch.x0,
            noise=batch.noise,
            xt=batch.xt,
            sigma=batch.sigma,
            r=batch.weight,
            kl_weight=self.kl_weight,
            **self.options,
        )
