"""Ranks and collectives.  A process without torchrun is a world of one.

Gradients are summed in one flat all-reduce per optimizer step instead of by DDP: the policy
switches adapters between forwards, ranks may have unequal shares or none, and one collective of
sample-weighted sums is exact and cheaper than hooks at every backward pass.
"""

import datetime
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffusion_nft.utils.console import LOGGER, Progress
from diffusion_nft.utils.devices import usable_cpus


class LostContact(ConnectionError):
    """Another rank ended or did not answer in time."""


class LaunchError(ValueError):
    """Several processes were launched without ranks, so that each would do all of the work."""


# Launcher -> its variable for the number of processes.  Not SLURM_NTASKS: in an sbatch script it is
# that of the allocation, even for a command that is a single process.
LAUNCHERS = {
    "srun": "SLURM_STEP_NUM_TASKS",
    "mpirun": "OMPI_COMM_WORLD_SIZE",  # Open MPI
    "mpiexec": "PMI_SIZE",  # MPICH, Intel MPI
}


def check_launch() -> None:
    """Raises LaunchError in one of several processes that have no RANK."""
    if "RANK" in os.environ:
        return
    counts = {name: os.environ.get(variable, "1") for name, variable in LAUNCHERS.items()}
    if os.environ.get("SLURM_PROCID", "0") != "0":  # not the first task of an allocation
        counts["srun"] = os.environ.get("SLURM_NTASKS", "several")
    for launcher, count in counts.items():
        if count != "1":
            raise LaunchError(
                f"{launcher} started {count} processes without ranks (RANK is not set), each of "
                f"which would do all of the work: let {launcher} start one torchrun per node "
                "(docs/operations.md), or a single process (srun -n 1)"
            )


@contextmanager
def _contact(rank: int, world_size: int, backend: str = "gloo") -> Iterator[None]:
    """Turns the failure of a collective of ``backend`` into LostContact."""
    # Gloo does not have an exception class of its own; NCCL's call may also raise the failure of an
    # earlier kernel, which is something else.
    failures = dist.DistError if backend == "nccl" else RuntimeError
    started = time.monotonic()
    try:
        yield
    except failures as error:
        # The first sentence of gloo's text, without its source location.
        cause = re.sub(r"^\[\S*\] ", "", str(error)).partition("\n")[0].partition(". ")[0]
        raise LostContact(
            f"rank {rank} of {world_size} on host {socket.gethostname()} lost contact with the "
            f"others after waiting {time.monotonic() - started:.0f} s: {cause}"
        ) from error


@dataclass(frozen=True)
class Distributed:
    """This process in the job.

    Collectives raise LostContact if another rank has ended, or does not take part within the
    time-out of ``distributed``.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes shared files and prints."""
        return self.rank == 0

    def print_once(self, text: str) -> None:
        """Prints a result on the main rank."""
        if self.is_main:
            print(text, flush=True)

    def log(self, text: str, level: int = logging.INFO) -> None:
        """Logs a message on the main rank, above any progress bar."""
        if self.is_main:
            LOGGER.log(level, text)

    def progress(self, what: str, total: int, *, done: int = 0, outer: bool = False) -> Progress:
        """Progress of the main rank in a loop of ``total`` passes."""
        return Progress(what, total, done=done, outer=outer, enabled=self.is_main)

    def all_reduce_sum(self, tensors: list[Tensor]) -> None:
        """Sums ``tensors`` of one dtype and device over the ranks in place, in one collective."""
        if self.world_size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        with _contact(self.rank, self.world_size, "nccl" if flat.is_cuda else "gloo"):
            dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors, strict=True)])

    def gather_objects(self, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order, on every rank (pickled for transport)."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        with _contact(self.rank, self.world_size):
            dist.all_gather_object(gathered, value)
        return gathered

    def sum_numbers(self, values: Mapping[str, Any]) -> dict[str, float]:
        """The sum of each of ``values`` over the ranks; a rank may lack some."""
        totals: dict[str, float] = {}
        for own in self.gather_objects({key: float(value) for key, value in values.items()}):
            for key, value in own.items():
                totals[key] = totals.get(key, 0.0) + value
        return totals

    def broadcast_object(self, value: Any) -> Any:
        """``value`` of rank 0 on every rank (pickled for transport)."""
        if self.world_size == 1:
            return value
        sent = [value]
        with _contact(self.rank, self.world_size):
            dist.broadcast_object_list(sent)
        return sent[0]

    def barrier(self) -> None:
        """Waits for every rank."""
        self.gather_objects(None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Runs the block on the first rank of each node before all others (downloads, caches)."""
        if self.local_rank != 0:
            self.barrier()
        try:
            yield
        finally:
            if self.local_rank == 0:
                self.barrier()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Runs the block on one rank of each node at a time."""
        own = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        turns = max(self.gather_objects(own))
        for _ in range(self.local_rank):
            self.barrier()
        try:
            yield
        finally:
            for _ in range(self.local_rank, turns):
                self.barrier()


def _store(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """The store through which the ranks rendezvous.

    A torchrun that restarts its ranks keeps the store with the addresses of the dead ones (pytorch
    issue 135712), so each attempt gets its own prefix.  On several nodes, where each torchrun
    counts its own restarts, this requires TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "any"
    return dist.PrefixStore(f"attempt-{attempt}", store)


@contextmanager
def distributed(timeout_minutes: float) -> Iterator[Distributed]:
    """Joins the process group of torchrun during the block.

    Objects travel over gloo, and so do tensors on CPUs; tensors on GPUs over NCCL.

    Raises LostContact if the ranks do not rendezvous in time, and as ``check_launch``.
    """
    check_launch()
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        # The host waits for an NCCL collective, at most until the time-out, and raises its failure.
        # Without this a watchdog thread aborts the process.  An update waits there in any case.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cpus())
    if world_size > 1:
        timeout = datetime.timedelta(minutes=timeout_minutes)
        with _contact(rank, world_size):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=_store(rank, world_size, timeout),
                rank=rank,
                world_size=world_size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
    yield Distributed(rank, world_size, local_rank, device)
    # Not after an error: leaving the group would wait for ranks that wait for this one, and the
    # process could not end and report its failure to torchrun.
    if world_size > 1:
        dist.destroy_process_group()


# Time after which a network file system's client sees a new folder (NFS: acdirmax).
SHARED_FOLDER_TIMEOUT_S = 60.0


def check_shared(
    key: str, folder: Path, dist: Distributed, patience_s: float = SHARED_FOLDER_TIMEOUT_S
) -> None:
    """Creates ``folder``, the value of ``key``, and checks that all ranks see the same one.

    Raises OSError on every rank, naming those that do not: on nodes with local disks a run would
    start but could not resume.
    """
    if dist.world_size == 1:
        return
    probe, failure = folder / f".seen-by-all-{secrets.token_hex(8)}", ""
    with ExitStack() as clearing:
        if dist.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe.touch()
                clearing.callback(probe.unlink, missing_ok=True)
            except OSError as error:
                failure = f"{key} = {str(folder)!r} cannot be written: {error.strerror}"
        name, failure = dist.broadcast_object((probe.name, failure))
        if failure:
            raise OSError(failure)
        blind = _blind(folder / name, dist, patience_s)
    if blind:
        raise OSError(
            f"{key} = {str(folder)!r} is not the same folder on all nodes: what rank 0 writes "
            f"there does not appear {' nor '.join(blind)}; choose one on a file system that all "
            "nodes mount"
        )


def _blind(file: Path, dist: Distributed, patience_s: float) -> list[str]:
    """The places where ``file`` does not appear within ``patience_s`` seconds of rank 0's clock."""
    end = time.monotonic() + patience_s
    place = f"in {file.parent.resolve()} on host {socket.gethostname()}"
    while True:
        views = dist.gather_objects((file.exists(), place, time.monotonic() > end))
        blind: dict[str, list[str]] = {}
        for rank, (seen, where, _) in enumerate(views):
            if not seen:
                blind.setdefault(where, []).append(str(rank))
        if not blind or views[0][2]:
            return [f"{where} (rank {', '.join(ranks)})" for where, ranks in blind.items()]
        time.sleep(0.2)
