"""Devices by name."""

import re

import torch


def usable_device(name: str) -> torch.device:
    """The device ``name``, such as "cuda:1".  Raises ValueError if this process cannot use it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # Torch without that backend asserts, or has no kernel; with it, the number is too high.
    except (RuntimeError, AssertionError, ImportError) as error:
        cause = re.split(r"\n|\. ", str(error).strip())[0]
        raise ValueError(f"device {name!r} cannot be used: {cause}") from error
    return device
