"""Flow-GRPO (arXiv 2505.05470): a clipped policy gradient on the steps of a stochastic sampler.

Each step is a Gaussian policy, ``x_next ~ N(mean, std^2)``, whose mean the velocity decides and
whose std it does not.  The log-probability of a step is the MEAN over its C, h, w values, as
published, so ratios stay near 1 and the clip range is small.
"""

import torch
from ml_collections import ConfigDict
from torch import Tensor

from diffusion_nft.advantages import shaped
from diffusion_nft.algorithms import KLWeighted, PolicyVelocity, Transitions
from diffusion_nft.flow import expand
from diffusion_nft.solvers import log_prob, sde_step


def clipped_policy_loss(
    log_ratio: Tensor, advantage: Tensor, clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss (arXiv 1707.06347, eq. 7): ``max(-A ratio, -A clip(ratio, 1 - e, 1 + e))``.

    ``log_ratio, advantage: [B]``; ``log_ratio`` is the new log-probability minus the old one, and
    ``e`` is ``clip_range``.  A sample whose ratio has left the range in the direction that its
    advantage wants has no gradient.  Returns ``[B]`` losses and detached ``[B]`` metrics.
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
    0. Only ``mean`` carries a gradient; ``mean_ref`` may be None if ``kl_weight`` is 0.

        loss = max(-A ratio, -A clip(ratio, 1 - e, 1 + e)) + kl_weight KL
        KL = mean (mean - mean_ref)^2 / (2 std^2)

    KL is the divergence of the two Gaussians per value, as the paper has it (section 4.1): std is
    that of the whole step, ``g sqrt(-dsigma)``.  The published code divides by ``2 g^2`` alone,
    which makes its term smaller by the factor ``-dsigma``.

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


class FlowGRPO(KLWeighted):
    """``flow_grpo_loss`` on the sampler's own steps; the sampling policy follows at once."""

    on_trajectories = True
    section = "grpo"
    skips_weightless = False

    def __init__(self, config: ConfigDict):
        self.solver, self.noise_level = config.sample.solver, config.sample.noise_level
        self.clip_range, self.kl_weight = config.grpo.clip_range, config.grpo.kl_weight
        self.shaping = dict(adv_clip_max=config.train.adv_clip_max, adv_mode=config.train.adv_mode)

    @property
    def policies(self) -> tuple[str, ...]:
        """The old policy's log-probabilities are recorded: no forward for them."""
        return ("current", *(["reference"] if self.kl_weight else []))

    def sample_weights(self, advantages: Tensor, group_size: int) -> Tensor:
        """The clipped and shaped advantage of each sample."""
        return shaped(advantages, **self.shaping)

    def loss(
        self, velocity: PolicyVelocity, batch: Transitions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses ``[B]`` and metrics ``[B]``."""
        mean_ref = None
        if "reference" in self.policies:
            mean_ref, _ = self._step(batch, velocity("reference"))
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
        return sde_step(
            self.solver,
            batch.xt,
            v,
            batch.sigma,
            batch.sigma_next,
            noise_level=self.noise_level,
        )

    def old_policy_decay(self, step: int) -> float:
        """0: each epoch is sampled by the policy that the former one trained."""
        return 0.0
