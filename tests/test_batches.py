"""The search for the largest micro-batch, on a pretended device."""

import types

import pytest
import torch

from diffusion_nft import batches as micro_batch
from diffusion_nft.batches import fitting_micro_batch, largest


@pytest.mark.parametrize("most", [0, 1, 7, 8, 21, 100, 1000])
@pytest.mark.parametrize("limit", [1, 5, 64, 200])
def test_the_largest_size_to_an_eighth(most, limit):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= most

    found = largest(fits, limit)
    best = min(most, limit)
    assert found <= best and best - found <= max(1, found // 8) - (best < 16)
    assert all(1 <= size <= limit for size in tried) and len(tried) <= 16


def test_a_cpu_is_not_tried():
    assert (
        fitting_micro_batch(pytest.fail, 1000, torch.device("cpu")) == micro_batch.CPU_MICRO_BATCH
    )
    assert fitting_micro_batch(pytest.fail, 7, torch.device("cpu")) == 7


class Card:
    """A GPU of 100 bytes: 10 are other processes', 20 the weights', 3 each pair takes."""

    def __init__(self, weights=20):
        self.weights, self.peak = weights, weights

    def run(self, size):
        if 10 + self.weights + 3 * size > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.peak = self.weights + 3 * size

    def cuda(self):
        def reset_peak_memory_stats(device):
            self.peak = self.weights

        return types.SimpleNamespace(
            get_device_properties=lambda device: types.SimpleNamespace(total_memory=100),
            mem_get_info=lambda device: (100 - 10 - self.weights, 100),
            memory_reserved=lambda device: self.weights,
            max_memory_reserved=lambda device: self.peak,
            reset_peak_memory_stats=reset_peak_memory_stats,
            empty_cache=lambda: None,
        )


def test_a_trial_may_take_nine_tenths_of_the_card(monkeypatch):
    card = Card()
    monkeypatch.setattr(torch, "cuda", card.cuda())
    # 10 + 20 + 3 * 20 = 90 of 100.
    assert fitting_micro_batch(card.run, 1000, torch.device("cuda")) in (18, 19, 20)
    assert fitting_micro_batch(card.run, 6, torch.device("cuda")) == 6


def test_what_does_not_fit_at_all_says_what_to_do(monkeypatch):
    card = Card(weights=88)
    monkeypatch.setattr(torch, "cuda", card.cuda())
    with pytest.raises(torch.OutOfMemoryError, match=r"perf\.gradient_checkpointing"):
        fitting_micro_batch(card.run, 1000, torch.device("cuda"))
