"""Images of 8 bits per channel, rounded once, after decoding; PNG files; diversity."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusion_nft.utils.devices import to_device
from diffusion_nft.utils.files import naming, write_atomically

# Side of the thumbnails that diversity compares.
THUMBNAIL = 8


@cache
def _levels(device: torch.device) -> Tensor:
    """float32 values of the 256 levels, divided on the CPU: CUDA multiplies by 1/255, which rounds
    differently.
    """
    return to_device(torch.arange(256, dtype=torch.float32) / 255, device)


def _rounded(values: Tensor) -> Tensor:
    """``round(255 x)`` of ``x = values`` clamped to [0, 1], as uint8; halves round to even."""
    return (values.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Images:
    """B images of 8 bits per channel, scored, shown and saved without further rounding.

    ``pixels``: uint8 ``[B, 3, H, W]``.  ``finite``: bool ``[B]``, False for images with NaN or
    infinite values before rounding, whose pixels are black.
    """

    pixels: Tensor
    finite: Tensor

    @classmethod
    def from_float(cls, values: Tensor) -> Self:
        """Rounds ``values: [B, 3, H, W]``, clamped to [0, 1]."""
        finite = values.isfinite().flatten(1).all(1)
        return cls(_rounded(values.where(finite.reshape(-1, 1, 1, 1), 0)), finite)

    @classmethod
    def concatenate(cls, parts: Sequence["Images"]) -> Self:
        """All images of ``parts``, possibly none."""
        if not parts:
            return cls.from_float(torch.zeros(0, 3, 1, 1))
        return cls(torch.cat([p.pixels for p in parts]), torch.cat([p.finite for p in parts]))

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Any) -> "Images":
        """``rows``: a slice, or a list or tensor of indices."""
        return Images(self.pixels[rows], self.finite[rows])

    def to(self, device: torch.device | str) -> "Images":
        return Images(self.pixels.to(device), self.finite.to(device))

    def to_float(self) -> Tensor:
        """``pixels / 255``, as rewards receive it: float32 ``[B, 3, H, W]`` in [0, 1]."""
        return _levels(self.pixels.device)[self.pixels.int()]

    def to_pil(self) -> list[Image.Image]:
        """RGB images; fully transparent RGBA images where not finite."""
        blank = Image.new("RGBA", (self.pixels.shape[3], self.pixels.shape[2]))
        opaque = _pil(self.pixels)
        return [p if ok else blank for p, ok in zip(opaque, self.finite.tolist(), strict=True)]


def to_uint8(values: Tensor) -> Tensor:
    """The inverse of ``Images.to_float``, for rewards that need uint8; any shape and device.

    Raises ValueError for NaN or infinite values.
    """
    if not values.isfinite().all():
        raise ValueError("an image has NaN or infinite values")
    return _rounded(values)


def to_pil(values: Tensor) -> list[Image.Image]:
    """RGB images of ``values: [B, 3, H, W]`` in [0, 1].  Raises ValueError as ``to_uint8``."""
    return _pil(to_uint8(values))


def _pil(pixels: Tensor) -> list[Image.Image]:
    return [Image.fromarray(x) for x in pixels.permute(0, 2, 3, 1).cpu().contiguous().numpy()]


def save_png(image: Image.Image, path: Path) -> None:
    """Writes ``path`` atomically and creates its folder.  Raises DiskError."""
    data = io.BytesIO()
    image.save(data, format="PNG")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data.getvalue())


def thumbnails(images: Images) -> Tensor:
    """8 x 8 area averages, ``[B, 192]`` on the CPU; NaN for images that are not finite."""
    small = F.adaptive_avg_pool2d(images.to_float(), THUMBNAIL).flatten(1)
    return small.where(images.finite[:, None], math.nan).cpu()


def diversity(thumbs: Tensor, groups: Sequence[Any]) -> float:
    """Root-mean-square distance per value between two images of a group, averaged over groups.

    ``thumbs: [N, D]``; ``groups``: N keys, equal for images of the same prompt.  NaN if no group
    has two images.
    """
    members: dict[Any, list[int]] = {}
    valid = (~thumbs.isnan().any(1)).nonzero().flatten().tolist()
    for row in valid:
        members.setdefault(groups[row], []).append(row)
    distances = [
        (2 * thumbs[rows].to(torch.float64).var(dim=0, correction=1).mean()).sqrt()
        for rows in members.values()
        if len(rows) > 1
    ]
    return float(torch.stack(distances).mean()) if distances else float("nan")
