"""Keyed noise: equal keys equal streams, other keys other streams, normal in distribution."""

import torch

from diffusion_nft.randomness import generator, normal


def test_a_key_is_a_stream_whatever_ran_before():
    first = torch.randn(5, generator=generator(1, 2, "rollout"))
    torch.manual_seed(3)
    torch.randn(7)
    assert torch.equal(torch.randn(5, generator=generator(1, 2, "rollout")), first)


def test_another_process_draws_the_same():
    # The built-in hash of a str differs from process to process: it must not be used.
    assert generator(4, "x").initial_seed() == 8300301278436662848


def test_neighbouring_keys_differ():
    keys = [(seed, epoch, i, what) for seed in (0, 1) for epoch in (0, 1) for i in range(12)
            for what in ("a", "b")]  # fmt: skip
    keys += [(1, 11), (11, 1), (111,), ("1", 11)]
    seeds = {generator(*key).initial_seed() for key in keys}
    assert len(seeds) == len(keys)


def test_rows_depend_on_their_own_generator_and_are_standard_normal():
    rows = normal((1000,), [generator(i) for i in range(50)])
    assert rows.shape == (50, 1000) and rows.dtype == torch.float32
    assert torch.equal(normal((1000,), [generator(7)])[0], rows[7])
    assert abs(float(rows.mean())) < 0.02 and abs(float(rows.std()) - 1) < 0.02
    correlation = torch.corrcoef(rows) - torch.eye(50)
    assert float(correlation.abs().max()) < 0.16  # 5 standard errors of 1 / sqrt(1000)
