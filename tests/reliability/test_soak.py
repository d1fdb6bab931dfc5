"""Resources of a run do not grow over epochs."""

import os
import threading

import pytest

from tests.launch import TINY, train_here
from tests.reliability.soak import ALLOWED, growth


def rows(**last: float) -> list[dict[str, float]]:
    steady = dict.fromkeys(ALLOWED, 100.0)
    return [{"epoch": i, **steady, **(last if i > 80 else {})} for i in range(100)]


def test_growth_compares_the_first_and_last_medians():
    assert all(first == end for first, end in growth(rows()).values())
    first, end = growth(rows(memory_mb=120.0))["memory_mb"]
    assert (first, end) == (100.0, 120.0)
    with pytest.raises(ValueError, match="no epoch"):
        growth([])


def test_a_short_run_leaves_nothing_open(tmp_path):
    settings = TINY | {"sample.num_groups": 1, "save_freq": 1, "log.image_freq": 0}
    train_here(tmp_path, settings)
    held = len(os.listdir("/proc/self/fd")), threading.active_count()
    train_here(tmp_path, settings | {"num_epochs": 8})
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == held
    # The newest three and the best.
    assert 3 <= len(list(tmp_path.glob("checkpoints/checkpoint-*"))) <= 4
