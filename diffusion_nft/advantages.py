"""Rewards to advantages and optimality probabilities (arXiv 2509.16117, section 3.2 and appendix).

Rewards have the shape ``[num_groups * group_size]``, with the samples of a group adjacent.  A NaN
reward marks a sample without a score.  Such samples are excluded from every mean and standard
deviation, and their results are NaN.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

STD_EPSILON = 1e-4

ADV_MODES = {
    "all": lambda a: a,
    "positive_only": lambda a: a.clamp(min=0),
    "negative_only": lambda a: a.clamp(max=0),
    "one_only": lambda a: (a > 0).to(a.dtype),
    "binary": torch.sign,
}


@dataclass(frozen=True)
class GroupStatistics:
    """Statistics of an epoch's rewards, logged under ``reward/``."""

    mean: float
    std: float  # of the population
    frac_zero_std: float  # share of groups with equal rewards, which give no training signal


def zero_std_groups(rewards: Tensor, group_size: int) -> Tensor:
    """``[num_groups]``: True if all scored samples of the group have the same reward."""
    grouped = rewards.reshape(-1, group_size)
    return grouped.nan_to_num(-math.inf).amax(1) == grouped.nan_to_num(math.inf).amin(1)


def group_advantages(rewards: Tensor, group_size: int, *, global_std: bool) -> Tensor:
    """``(reward - group mean) / (std + 1e-4)``, float64, not clipped.

    ``std`` is the population's (ddof 0), over all rewards if ``global_std``, else per group.
    """
    grouped = rewards.to(torch.float64).reshape(-1, group_size)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)
    # The mean of equal numbers may differ from them in the last bit, and "binary" takes the sign.
    centred[zero_std_groups(rewards, group_size)] *= 0
    if global_std:
        std = grouped[~grouped.isnan()].std(correction=0)
    else:
        std = grouped.std(dim=1, keepdim=True, correction=0)
        std = std.where(~std.isnan(), centred.square().nanmean(dim=1, keepdim=True).sqrt())
    return (centred / (std + STD_EPSILON)).reshape(-1)


def standardized_total(
    parts: Mapping[str, Tensor], weights: Mapping[str, float], group_size: int
) -> Tensor:
    """Weighted sum, float64, of rewards that are each standardised per group first.

    Weights then count in standard deviations, independent of the scale of each reward.
    """
    advantages = [
        weight * group_advantages(parts[name], group_size, global_std=False)
        for name, weight in weights.items()
    ]
    return torch.stack(advantages).sum(dim=0)


def shaped(advantages: Tensor, *, adv_clip_max: float, adv_mode: str) -> Tensor:
    """Advantages clipped to ``+-adv_clip_max``, then transformed by ``ADV_MODES[adv_mode]``."""
    modified = ADV_MODES[adv_mode](advantages.clamp(-adv_clip_max, adv_clip_max))
    return modified.where(~advantages.isnan(), math.nan)


def optimality(advantages: Tensor, *, adv_clip_max: float, adv_mode: str) -> Tensor:
    """Optimality probabilities ``r = clip(A / adv_clip_max / 2 + 1/2, 0, 1)``; A is ``shaped``."""
    a = shaped(advantages, adv_clip_max=adv_clip_max, adv_mode=adv_mode)
    return (a / adv_clip_max / 2 + 0.5).clamp(0, 1)


def statistics(rewards: Tensor, group_size: int) -> GroupStatistics:
    scored = rewards[~rewards.isnan()].to(torch.float64)
    return GroupStatistics(
        mean=float(scored.mean()),
        std=float(scored.std(correction=0)),
        frac_zero_std=float(zero_std_groups(rewards, group_size).to(torch.float64).mean()),
    )
