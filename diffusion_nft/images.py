"""Float images -> 8 bits and PNG files."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffusion_nft.utils.files import naming, write_atomically


def to_uint8(images: Tensor) -> Tensor:
    """``round(255 x)`` of ``x = images``, clamped to [0, 1]; any shape, uint8, on the same device.

    The one home of this conversion: all that is saved, shown or scored as 8 bits passes here.
    Halves round to even.  Raises ValueError for NaN or infinite values, which 8 bits would hide.
    """
    if not images.isfinite().all():
        raise ValueError("an image has NaN or infinite values")
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def finite(images: Tensor) -> Tensor:
    """``[B, 1, 1, 1]``, True for those of ``images: [B, 3, H, W]`` without NaN or infinities."""
    valid = images.isfinite().flatten(1).all(1)
    return valid.reshape(-1, *[1] * (images.ndim - 1))


def to_pil(images: Tensor) -> list[Image.Image]:
    """RGB pictures of ``images: [B, 3, H, W] in [0, 1]``.  Raises ValueError as ``to_uint8``."""
    pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().contiguous().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def with_blanks(images: Tensor) -> list[Image.Image]:
    """As ``to_pil``; an image with NaN or infinite values becomes a fully transparent RGBA one."""
    valid = finite(images)
    blank = Image.new("RGBA", (images.shape[3], images.shape[2]))
    pictures = to_pil(images.where(valid, 0))
    return [p if v else blank for p, v in zip(pictures, valid.flatten().tolist(), strict=True)]


def save_png(picture: Image.Image, path: Path) -> None:
    """Writes ``path``, in a folder that is made if need be; it is there as a whole or not at all.

    Raises DiskError naming the path.
    """
    data = io.BytesIO()
    picture.save(data, format="PNG")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data.getvalue())
