"""Randomness as a pure function of a key such as (seed, epoch, sample index, purpose).

Nothing random depends on the rank, the batch a sample sits in, or what ran before: the same run on
any number of processes draws the same numbers, and a resumed run needs no generator state.  All
noise is drawn on the CPU in float32, so it is also the same on every device and in every precision.
"""

import hashlib

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of ``key``; equal keys give equal streams."""
    # repr(numpy.int64(3)) is not repr(3): another type would silently be another stream.
    assert all(type(part) in (int, str) for part in key), key
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def normal(shapes: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Standard normal float32 ``[len(generators), *shapes]``, row i from generator i."""
    return torch.stack([torch.randn(shapes, generator=g) for g in generators])
