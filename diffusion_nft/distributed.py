"""Ranks and what they exchange.  A plain process without torchrun is a world of one.

Gradients travel in one flat all-reduce per optimizer step instead of through DDP: the policy
switches adapters between forwards, ranks may have unequal shares or none, and one collective of
sample-weighted sums is both exact and cheaper than hooks that fire at every backward pass.
"""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True)
class Distributed:
    """This process' place in the job."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes shared files and speaks."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints ``text`` once for the whole job, above any progress bar."""
        if self.is_main:
            tqdm.write(text)

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """Sums ``tensors`` (one dtype, one device) over the ranks in place, in one collective."""
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    def gather_objects(self, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order, on every rank (pickled between our own
        processes).
        """
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Lets the first rank of each node run the block before the others (downloads, caches)."""
        if self.local_rank != 0:
            self.barrier()
        try:
            yield
        finally:
            if self.local_rank == 0:
                self.barrier()


@contextmanager
def distributed(timeout_minutes: float) -> Iterator[Distributed]:
    """Joins the process group that torchrun describes (NCCL on GPUs, else gloo), and leaves it."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(minutes=timeout_minutes),
            device_id=device if device.type == "cuda" else None,
        )
    yield Distributed(rank, world_size, local_rank, device)
    # Not after an error: leaving the group waits for ranks that wait for this one, and the process
    # could not end to tell torchrun of its failure.
    if world_size > 1:
        dist.destroy_process_group()
