"""Latents as the tokens of FLUX and Qwen-Image: one per 2 x 2 patch."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_nft.utils.devices import to_device


def pack(x: Tensor) -> Tensor:
    """``[B, C, h, w] -> [B, h w / 4, 4 C]``."""
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of ``pack``; ``shape``: of x."""
    height, width = shape[2] // 2, shape[3] // 2
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), 2)


@cache
def grid_ids(sides: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions of the tokens of a grid, the last index fastest: float32 ``[tokens, axes]``."""
    ids = torch.cartesian_prod(*(torch.arange(1.0 * side) for side in sides))
    return to_device(ids, device)
