"""Devices by name; CPU cores."""

import os
import re
from pathlib import Path

import torch
from torch import Tensor

CGROUPS = Path("/sys/fs/cgroup")


def usable_cpus(cgroups: Path = CGROUPS) -> int:
    """Cores that this process may use, by its affinity and its container's CPU quota, rounded down.

    ``cgroups``: where the control groups (version 2 or 1) are mounted.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroups / file).read_text() for file in files).split()
            if quota not in ("max", "-1"):
                return min(cores or 1, max(1, int(quota) // int(period)))
        except (OSError, ValueError):
            continue
    return cores or 1


def usable_device(name: str) -> torch.device:
    """The device ``name``, such as "cuda:1".  Raises ValueError if it cannot be used."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # A missing backend fails an assertion or has no kernel; an invalid index is a RuntimeError.
    except (RuntimeError, AssertionError, ImportError) as error:
        cause = re.split(r"\n|\. ", str(error).strip())[0]
        raise ValueError(f"device {name!r} cannot be used: {cause}") from error
    return device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; the host does not wait for its copy to a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
