"""Flow-GRPO (arXiv 2505.05470): a clipped policy gradient on the steps of a stochastic sampler.

Each step is a Gaussian policy, ``x_next ~ N(mean, std^2)``; the mean depends on the velocity, the
std does not.  The log-probability of a step is the MEAN over its C, h, w values, as in the
published code, so ratios stay near 1 and the clip range is small.
"""

import torch
from ml_collections import ConfigDict
from torch import Tensor

from diffusion_nft.algorithms import Algorithm, PolicyVelocity, Transitions
from diffusion_nft.flow import expand
from diffusion_nft.solvers import log_prob, sde_step


def clipped_policy_loss(
    log_ratio: Tensor, advantage: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss (arXiv 1707.06347, eq. 7): ``max(-A ratio, -A clip(ratio, 1 - e, 1 + e))``.

    ``log_ratio, advantage: [B]``; ``log_ratio`` is the new log-probability minus the old one, and
    ``e`` is ``clip_range``.  A sample has no gradient if its ratio is outside the range in the
    direction favoured by its advantage.  Returns ``[B]`` losses and detached ``[B]`` metrics.
    """
    log_ratio, advantage = log_ratio.to(torch.float64), advantage.to(torch.float64)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    policy = torch.maximum(-advantage * ratio, -advantage * clipped)
    outside = (ratio.detach() - 1).abs() > clip_range
    return policy, {
        "loss/policy": policy.detach(),
        "loss/ratio": ratio.detach(),
        "loss/clip_fraction": outside.to(torch.float64),
        "loss/approx_kl_k2": 0.5 * log_ratio.detach().square(),
    }


def flow_grpo_loss(
    mean: Tensor,
    mean_ref: Tensor | None,
    std: Tensor,
    *,
    x_next: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    clip_range: float,
    kl_weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The Flow-GRPO loss of each recorded step.

    ``mean, mean_ref, x_next: [B, C, h, w]``; ``std, old_log_prob, advantage: [B]``, ``std`` above
    0.  Only ``mean`` carries a gradient; ``mean_ref`` may be None if ``kl_weight`` is 0.

        loss = max(-A ratio, -A clip(ratio, 1 - e, 1 + e)) + kl_weight KL
        KL = mean (mean - mean_ref)^2 / (2 std^2)

    KL is the divergence of the two Gaussians per value, as in section 4.1 of the paper: std is
    that of the whole step, ``g sqrt(-dsigma)``.  The published code divides by ``2 g^2`` alone,
    so its term is smaller by the factor ``-dsigma``.

    Returns ``[B]`` losses and detached ``[B]`` metrics.  The KL term is logged unweighted.  Raises
    ValueError if ``kl_weight`` is not 0 and there is no ``mean_ref``.
    """
    log_ratio = log_prob(x_next, mean, std) - old_log_prob
    policy, metrics = clipped_policy_loss(log_ratio, advantage, clip_range)
    if mean_ref is None:
        if kl_weight:
            raise ValueError(f"kl_weight is {kl_weight}, but no reference mean was given")
        return policy, metrics
    error = ((mean - mean_ref.detach()) / expand(std, mean)).to(torch.float64)
    kl = 0.5 * error.square().flatten(1).mean(dim=1)
    metrics["loss/kl"] = kl.detach()
    return policy + kl_weight * kl, metrics


class FlowGRPO(Algorithm):
    """``flow_grpo_loss`` on the steps of the rollout.

    The old policy needs no forward: its log-probabilities were recorded.
    """

    on_trajectories = True
    section = "grpo"

    def __init__(self, config: ConfigDict):
        super().__init__(config)
        self.solver, self.noise_level = config.sample.solver, config.sample.noise_level
        self.clip_range = config.grpo.clip_range

    def loss(
        self, velocity: PolicyVelocity, batch: Transitions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        v_ref = self._reference(velocity)
        mean_ref = None if v_ref is None else self._step(batch, v_ref)[0]
        mean, std = self._step(batch, velocity("current"))
        return flow_grpo_loss(
            mean,
            mean_ref,
            std,
            x_next=batch.xt_next,
            old_log_prob=batch.log_prob,
            advantage=batch.weight,
            clip_range=self.clip_range,
            kl_weight=self.kl_weight,
        )

    def _step(self, batch: Transitions, v: Tensor) -> tuple[Tensor, Tensor]:
        sigmas = batch.sigma, batch.sigma_next
        return sde_step(self.solver, batch.xt, v, *sigmas, noise_level=self.noise_level)
