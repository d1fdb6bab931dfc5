"""From rewards to optimality probabilities.  Pure functions of an epoch's rewards, on one process.

A NaN reward is that of a sample without a score.  Such samples are left out of every mean and
deviation, and what is computed for each sample is NaN for them.

Paper: arXiv 2509.16117, section 3.2 (optimality probability r) and appendix (practical choices).
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
    """What an epoch's rewards look like; logged under ``reward/``."""

    mean: float
    std: float
    frac_zero_std: float  # share of groups whose images all scored the same: no signal in them


def zero_std_groups(rewards: Tensor, group_size: int) -> Tensor:
    """``[num_groups]``, True where all scored samples of a group have the same reward."""
    grouped = rewards.reshape(-1, group_size)
    return grouped.nan_to_num(-math.inf).amax(1) == grouped.nan_to_num(math.inf).amin(1)


def group_advantages(rewards: Tensor, group_size: int, *, global_std: bool) -> Tensor:
    """Rewards centred on their group's mean and divided by a standard deviation.

    ``rewards: [num_groups * group_size]``, a group's samples side by side.  The deviation is the
    population's (ddof 0), over all rewards if ``global_std`` else over each group, plus 1e-4.
    Returns float64 ``[num_groups * group_size]``, not clipped.
    """
    grouped = rewards.to(torch.float64).reshape(-1, group_size)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)
    # The mean of equal numbers may differ from them in the last bit, of which a mode makes a sign.
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
    """Weighted sum of rewards that are each standardised in their own groups first.

    ``parts[name]: [num_groups * group_size]`` for each name of ``weights``, a group's samples side
    by side.  Each is centred on its group's mean and divided by its group's population deviation
    plus 1e-4, so that a weight counts deviations of its reward and the widest reward does not
    drown the others.  Returns float64 ``[num_groups * group_size]``.
    """
    advantages = [
        weight * group_advantages(parts[name], group_size, global_std=False)
        for name, weight in weights.items()
    ]
    return torch.stack(advantages).sum(dim=0)


def shaped(advantages: Tensor, *, adv_clip_max: float, adv_mode: str) -> Tensor:
    """Advantages clipped to ``+-adv_clip_max`` and then shaped by ``adv_mode`` (ADV_MODES)."""
    modified = ADV_MODES[adv_mode](advantages.clamp(-adv_clip_max, adv_clip_max))
    return modified.where(~advantages.isnan(), math.nan)


def optimality(advantages: Tensor, *, adv_clip_max: float, adv_mode: str) -> Tensor:
    """Optimality probability r in [0, 1] of each sample: ``r = clip(A / adv_clip_max / 2 + 1/2, 0,
    1)``.

    ``A`` is the ``shaped`` advantage.
    """
    a = shaped(advantages, adv_clip_max=adv_clip_max, adv_mode=adv_mode)
    return (a / adv_clip_max / 2 + 0.5).clamp(0, 1)


def statistics(rewards: Tensor, group_size: int) -> GroupStatistics:
    """Mean, population deviation and share of groups without any spread of ``rewards: [N]``."""
    scored = rewards[~rewards.isnan()].to(torch.float64)
    return GroupStatistics(
        mean=float(scored.mean()),
        std=float(scored.std(correction=0)),
        frac_zero_std=float(zero_std_groups(rewards, group_size).to(torch.float64).mean()),
    )
