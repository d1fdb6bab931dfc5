"""Random numbers as a pure function of a key such as (seed, epoch, sample index, purpose).

They depend neither on the rank, nor on the batch, nor on earlier draws, so a run draws the same
numbers on any number of processes, and resumes without generator states.  Noise is drawn on the CPU
in float32, independent of device and precision.
"""

import hashlib

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of ``key``."""
    # The key is hashed by its repr, and repr(numpy.int64(3)) differs from repr(3).
    assert all(type(part) in (int, str) for part in key), key
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def normal(shapes: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """Standard normal float32 ``[len(generators), *shapes]``, row i from generator i."""
    return torch.stack([torch.randn(shapes, generator=g) for g in generators])
