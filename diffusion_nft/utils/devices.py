"""Devices by name."""

import re

import torch


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
