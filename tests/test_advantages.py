"""Advantages and optimality against numpy and hand-computed numbers."""

import numpy as np
import pytest
import torch

from diffusion_nft.advantages import group_advantages, optimality, statistics

REWARDS = np.array([0.0, 1.0, 0.5, 0.5, 3.0, -1.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("global_std", [True, False])
def test_group_advantages_equal_numpy(global_std):
    ours = group_advantages(torch.from_numpy(REWARDS), 3, global_std=global_std)
    groups = REWARDS.reshape(3, 3)
    std = REWARDS.std() if global_std else groups.std(axis=1, keepdims=True)
    expected = (groups - groups.mean(axis=1, keepdims=True)) / (std + 1e-4)
    np.testing.assert_allclose(ours.numpy(), expected.ravel(), rtol=1e-12)


def test_a_group_without_spread_has_no_advantage():
    ours = group_advantages(torch.from_numpy(REWARDS), 3, global_std=False)
    assert ours[6:].tolist() == [0.0, 0.0, 0.0]
    assert statistics(torch.from_numpy(REWARDS), 3).zero_std_groups == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [0.0, 0.4, 0.5, 0.6, 1.0]),
        ("positive_only", [0.5, 0.5, 0.5, 0.6, 1.0]),
        ("negative_only", [0.0, 0.4, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6, 0.6]),
    ],
)
def test_optimality_by_hand(mode, expected):
    advantages = torch.tensor([-7.0, -1.0, 0.0, 1.0, 9.0])
    r = optimality(advantages, adv_clip_max=5.0, adv_mode=mode)
    np.testing.assert_allclose(r.numpy(), expected, rtol=1e-6)
