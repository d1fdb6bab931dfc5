"""Advantages and optimality against numpy and hand-computed numbers."""

import numpy as np
import pytest
import torch

from diffusion_nft.advantages import group_advantages, optimality, standardized_total, statistics

REWARDS = np.array([0.0, 1.0, 0.5, 0.5, 3.0, -1.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("global_std", [True, False])
def test_group_advantages_equal_numpy(global_std):
    ours = group_advantages(torch.from_numpy(REWARDS), 3, global_std=global_std)
    groups = REWARDS.reshape(3, 3)
    std = REWARDS.std() if global_std else groups.std(axis=1, keepdims=True)
    expected = (groups - groups.mean(axis=1, keepdims=True)) / (std + 1e-4)
    np.testing.assert_allclose(ours.numpy(), expected.ravel(), rtol=1e-12)


@pytest.mark.parametrize("global_std", [True, False])
def test_samples_without_a_score_are_as_if_they_were_not_there(global_std):
    scored = [[0.0, 1.0], [0.5, 0.5, 3.0], [2.0], []]
    padded = torch.full((4, 3), torch.nan, dtype=torch.float64)
    for row, values in zip(padded, scored, strict=True):
        row[: len(values)] = torch.tensor(values)
    ours = group_advantages(padded.reshape(-1), 3, global_std=global_std).reshape(4, 3)
    every = np.concatenate([np.array(values) for values in scored])
    for row, values in zip(ours, scored, strict=True):
        assert row[len(values) :].isnan().all()
        if values:
            std = every.std() if global_std else np.std(values)
            expected = (np.array(values) - np.mean(values)) / (std + 1e-4)
            np.testing.assert_allclose(row[: len(values)].numpy(), expected, rtol=1e-12)
    found = statistics(padded.reshape(-1), 3)
    assert (found.mean, found.std) == pytest.approx((every.mean(), every.std()))
    assert found.frac_zero_std == 1 / 4  # the group of one


def test_the_standardized_total_equals_numpy():
    parts = {"a": REWARDS, "b": 100 * np.cos(REWARDS), "held out": REWARDS**2}
    ours = standardized_total(
        {name: torch.from_numpy(values) for name, values in parts.items()}, {"b": -2.0, "a": 0.5}, 3
    )
    expected = 0.0
    for name, weight in (("a", 0.5), ("b", -2.0)):
        groups = parts[name].reshape(3, 3)
        std = groups.std(axis=1, keepdims=True)
        expected += weight * (groups - groups.mean(axis=1, keepdims=True)) / (std + 1e-4)
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours.numpy(), expected.ravel(), rtol=1e-12, atol=1e-12)


def test_standardized_rewards_of_any_scale_count_by_their_weights():
    small = torch.tensor([1.0, 2.0, 3.0, 2.0], dtype=torch.float64)
    wide = torch.tensor([5000.0, 5000.0, 3000.0, 5000.0], dtype=torch.float64)
    total = standardized_total({"s": small, "w": wide}, {"s": 3.0, "w": 1.0}, 4)
    # Deviations by hand: (-1, 0, 1, 0) / sqrt(1/2), and (500, 500, -1500, 500) / 500 sqrt(3).
    expected = [-3 * 2**0.5 + 3**-0.5, 3**-0.5, 3 * 2**0.5 - 3**0.5, 3**-0.5]
    np.testing.assert_allclose(total.numpy(), expected, rtol=1e-3)
    raw = 3 * small + wide
    assert total.argmax() == 2 and raw.argmin() == 2, "the wide one had decided alone"


def test_a_reward_without_spread_adds_nothing():
    values = torch.tensor([0.3, 0.1, 0.7, 0.7], dtype=torch.float64)
    flat = torch.full((4,), 0.1, dtype=torch.float64)
    both = standardized_total({"v": values, "flat": flat}, {"v": 1.0, "flat": 9.0}, 2)
    alone = group_advantages(values, 2, global_std=False)
    np.testing.assert_allclose(both.numpy(), alone.numpy(), atol=1e-9)


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
    advantages = torch.tensor([-7.0, -1.0, 0.0, 1.0, 9.0, torch.nan])
    r = optimality(advantages, adv_clip_max=5.0, adv_mode=mode)
    np.testing.assert_allclose(r.numpy(), [*expected, np.nan], rtol=1e-6)
