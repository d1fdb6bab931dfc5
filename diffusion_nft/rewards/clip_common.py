"""What the rewards built on CLIP share: loading, preprocessing, features, micro-batches."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_nft.images import to_pil

MAX_TOKENS = 77


class Clip:
    """A frozen CLIP of transformers with its tokenizer and image processor.

    ``model`` and ``processor``: hub names or local folders; ``processor`` has the tokenizer and the
    preprocessing.  Raises OSError if one cannot be had, ValueError if the weights are not exactly
    the model's or the tokenizer has another vocabulary than the model.
    """

    def __init__(self, model: str, *, processor: str, device: torch.device, dtype: torch.dtype):
        from transformers import CLIPImageProcessorPil, CLIPTokenizer

        self.device, self.dtype = device, dtype
        clip = _load_clip(model)
        # Read before the cast: bfloat16 would move the scale by a per cent.
        self.logit_scale = clip.logit_scale.detach().exp().item()
        self.model = clip.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.tokenizer = _from_pretrained(CLIPTokenizer, processor)
        vocabulary = self.model.config.text_config.vocab_size
        if len(self.tokenizer) != vocabulary:
            raise ValueError(
                f"the tokenizer of {processor} knows {len(self.tokenizer)} tokens, "
                f"the model {model} {vocabulary}"
            )
        # Pillow's bicubic resize, as published; torchvision's differs by up to one 8-bit step.
        self.image_processor = _from_pretrained(CLIPImageProcessorPil, processor)

    def pixels(self, images: Tensor) -> Tensor:
        """Model input ``[B, 3, h, w]`` of ``images: [B, 3, H, W]`` in [0, 1].

        Images of 8 bits, short side resized by Pillow (bicubic), centre crop, normalised.
        """
        return self.image_processor(images=to_pil(images), return_tensors="pt")["pixel_values"]

    def image_features(self, pixels: Tensor) -> Tensor:
        """Unit vectors ``[B, D]``, float32, of model input ``pixels: [B, 3, h, w]``."""
        output = self.model.get_image_features(pixel_values=pixels.to(self.device, self.dtype))
        return F.normalize(output.pooler_output.float(), dim=-1)

    def text_features(self, prompts: list[str]) -> Tensor:
        """Unit vectors ``[B, D]``, float32; prompts are cut after 77 tokens."""
        tokens = tokenize(self.tokenizer, prompts, MAX_TOKENS).to(self.device)
        output = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return F.normalize(output.pooler_output.float(), dim=-1)

    def cosine(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Cosine ``[B]`` in [-1, 1] of each image and its own prompt."""
        return (self.image_features(pixels) * self.text_features(prompts)).sum(-1)


def tokenize(tokenizer: Any, prompts: list[str], length: int) -> Any:
    """``input_ids`` and ``attention_mask`` ``[B, length]``: prompts cut or padded to ``length``."""
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )


def _from_pretrained(cls: Any, name: str, **options: Any) -> Any:
    """``cls.from_pretrained(name)``; typed as Any, as pyright cannot follow transformers' types."""
    try:
        return cls.from_pretrained(name, **options)
    except OSError as error:
        raise OSError(
            f"{name!r} is no local folder with a {cls.__name__} and could not be fetched from the "
            f"hub (`python scripts/download.py rewards` fetches what the rewards need): {error}"
        ) from error


def _load_clip(name: str) -> Any:
    """A CLIPModel with exactly the weights of ``name``: none missing, none left over."""
    from transformers import CLIPModel

    model, report = _from_pretrained(CLIPModel, name, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(report[f"{kind}_keys"]) for kind in ("missing", "unexpected")}
    if any(wrong.values()):
        listing = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in wrong.items() if keys)
        raise ValueError(f"the weights of {name} do not fit CLIP: {listing}")
    return model


@torch.no_grad()
def score_in_batches(
    score: Callable[[Tensor, list[str]], Tensor],
    images: Tensor,
    prompts: list[str],
    batch_size: int,
) -> Tensor:
    """Scores ``[B]`` on the CPU, ``batch_size`` images at a time.

    ``score``: images ``[b, 3, H, W]`` and their prompts -> ``[b]``.  Raises ValueError for
    images of another shape than ``[B, 3, H, W]`` or another number of prompts than B.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B, 3, H, W], not {list(images.shape)}")
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    parts = [
        score(images[start : start + batch_size], prompts[start : start + batch_size]).cpu()
        for start in range(0, len(images), batch_size)
    ]
    return torch.cat(parts) if parts else torch.zeros(0)
