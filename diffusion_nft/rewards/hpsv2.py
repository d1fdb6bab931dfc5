"""HPSv2.1: a CLIP ViT-H/14 fine-tuned on human preferences (arXiv 2306.09341)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_nft.images import to_pil, to_uint8
from diffusion_nft.rewards.clip_common import BatchedReward
from diffusion_nft.rewards.weights import load_torch_file, load_weights, weight_file

if TYPE_CHECKING:
    from open_clip import CLIP


class HPSv2Reward(BatchedReward):
    """cos(image, text) without a scale; about 0.2 to 0.35 in practice.

    As published, 8-bit images are resized to a long side of 224 in floating point (bicubic,
    antialiased, neither rounded nor clamped), padded with black and normalised by OpenAI's mean and
    std.  Prompts are truncated to 77 tokens.  The published code computes in float16 autocast;
    float32 here changes scores by rounding only.

    ``backend``: "open_clip", or "hpsv2x" for that package's own model, tokenizer and preprocessing,
    which needs a separate environment.  ``model_name``: an architecture of the backend;
    ``weights``: its checkpoint (default: the one in reward_ckpts).  Raises ImportError without the
    backend's package, FileNotFoundError without the checkpoint and ValueError if checkpoint and
    architecture do not fit.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        backend: Literal["open_clip", "hpsv2x"] = "open_clip",
        model_name: str = "ViT-H-14",
        weights: Path | None = None,
    ):
        path = weights or weight_file("hpsv2")
        build = _hpsv2x if backend == "hpsv2x" else _open_clip
        model, self.tokenizer, self.preprocess = build(model_name)
        checkpoint = load_torch_file(path)
        if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
            raise ValueError(f'{path} has no "state_dict"')
        load_weights(model, checkpoint["state_dict"], path)
        self.model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.device, self.dtype, self.batch_size = device, dtype, batch_size

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = self.preprocess(images.to(self.device)).to(self.device, self.dtype)
        tokens = self.tokenizer(prompts).to(self.device)
        image = self.model.encode_image(pixels, normalize=True)
        text = self.model.encode_text(tokens, normalize=True)
        return (image.float() * text.float()).sum(-1)


# Model, tokenizer, and preprocessing of images [B, 3, H, W] in [0, 1].
_Parts = tuple["CLIP", Callable[[list[str]], Tensor], Callable[[Tensor], Tensor]]


def _open_clip(model_name: str) -> _Parts:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError('the hpsv2 reward needs: pip install -e ".[hpsv2]"') from error
    model = cast("CLIP", open_clip.create_model(model_name))
    side = cast("tuple[int, int]", model.visual.image_size)[0]
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).reshape(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).reshape(3, 1, 1)

    def preprocess(images: Tensor) -> Tensor:
        square = fit_in_square(to_uint8(images) / 255, side)
        return (square - mean.to(square)) / std.to(square)

    return model, open_clip.get_tokenizer(model_name), preprocess


def fit_in_square(images: Tensor, side: int) -> Tensor:
    """``images: [B, 3, H, W]`` -> ``[B, 3, side, side]``, resized and centred on zeros."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    size = (round(height * scale), round(width * scale))
    resized = F.interpolate(images, size, mode="bicubic", antialias=True)
    below, right = side - size[0], side - size[1]
    return F.pad(resized, (right // 2, right - right // 2, below // 2, below - below // 2))


def _hpsv2x(model_name: str) -> _Parts:
    try:
        from hpsv2.src import open_clip  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "the hpsv2x backend needs a separate environment with: pip install hpsv2x==1.2.0"
        ) from error
    # light_augmentation selects the published preprocessing.
    model, _, transform = open_clip.create_model_and_transforms(model_name, light_augmentation=True)

    def preprocess(images: Tensor) -> Tensor:
        return torch.stack([transform(image) for image in to_pil(images)])

    return model, open_clip.get_tokenizer(model_name), preprocess
