"""Shared by the model rewards: loading and features of CLIP, tokenizing, micro-batches."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_nft.images import to_pil
from diffusion_nft.rewards import RewardOutput

MAX_TOKENS = 77


class Clip:
    """A frozen CLIP of transformers with its tokenizer and image processor.

    ``model`` and ``processor``: hub names or local folders; ``processor`` has the tokenizer and the
    preprocessing.  Raises OSError if one is not available and ValueError if the weights do not fit
    the model exactly or the vocabularies of tokenizer and model differ in size.
    """

    def __init__(self, model: str, *, processor: str, device: torch.device, dtype: torch.dtype):
        from transformers import CLIPImageProcessorPil, CLIPTokenizer

        self.device, self.dtype = device, dtype
        clip = _load_clip(model)
        # Read before the cast: bfloat16 would change the scale by about 1%.
        self.logit_scale = clip.logit_scale.detach().exp().item()
        self.model = clip.to(device=device, dtype=dtype).eval().requires_grad_(False)
        self.tokenizer = _from_pretrained(CLIPTokenizer, processor)
        vocabulary = self.model.config.text_config.vocab_size
        if len(self.tokenizer) != vocabulary:
            raise ValueError(
                f"the tokenizer of {processor} has {len(self.tokenizer)} tokens, but the model "
                f"{model} has {vocabulary}"
            )
        # Pillow's bicubic resize, as published; torchvision's differs by up to one 8-bit step.
        self.image_processor = _from_pretrained(CLIPImageProcessorPil, processor)

    def pixels(self, images: Tensor) -> Tensor:
        """Model input ``[B, 3, h, w]`` of ``images: [B, 3, H, W]`` in [0, 1].

        8-bit images, short side resized by Pillow (bicubic), centre crop, normalised.
        """
        return self.image_processor(images=to_pil(images), return_tensors="pt")["pixel_values"]

    def image_features(self, pixels: Tensor) -> Tensor:
        """Unit vectors ``[B, D]``, float32, of model input ``pixels: [B, 3, h, w]``."""
        output = self.model.get_image_features(pixel_values=pixels.to(self.device, self.dtype))
        return F.normalize(output.pooler_output.float(), dim=-1)

    def text_features(self, prompts: list[str]) -> Tensor:
        """Unit vectors ``[B, D]``, float32; prompts are truncated to 77 tokens."""
        tokens = tokenize(self.tokenizer, prompts, MAX_TOKENS).to(self.device)
        output = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return F.normalize(output.pooler_output.float(), dim=-1)

    def cosine(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """Cosine similarity ``[B]`` of each image and its own prompt."""
        return (self.image_features(pixels) * self.text_features(prompts)).sum(-1)


def tokenize(tokenizer: Any, prompts: list[str], length: int) -> Any:
    """``input_ids`` and ``attention_mask`` ``[B, length]``, truncated or padded."""
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )


def _from_pretrained(cls: Any, name: str, **options: Any) -> Any:
    """``cls.from_pretrained(name)``; Any, because pyright cannot follow transformers' types."""
    try:
        return cls.from_pretrained(name, **options)
    except OSError as error:
        raise OSError(
            f"{name!r} is not a local folder with a {cls.__name__} and could not be fetched from "
            f"the hub (`python scripts/download.py rewards` fetches all models): {error}"
        ) from error


def _load_clip(name: str) -> Any:
    """A CLIPModel; ValueError unless ``name`` has exactly its weights."""
    from transformers import CLIPModel

    model, report = _from_pretrained(CLIPModel, name, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(report[f"{kind}_keys"]) for kind in ("missing", "unexpected")}
    if any(wrong.values()):
        listing = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in wrong.items() if keys)
        raise ValueError(f"the weights of {name} do not fit CLIP: {listing}")
    return model


class BatchedReward:
    """Scores ``batch_size`` images at a time; subclasses define ``_score``."""

    batch_size: int

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores ``[b]`` of ``images: [b, 3, H, W]`` in [0, 1] for their prompts."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        """Scores on the CPU.  Raises ValueError for images of another shape than ``[B, 3, H, W]``
        or another number of prompts than B.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], not {list(images.shape)}")
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        parts = []
        for start in range(0, len(images), self.batch_size):
            end = start + self.batch_size
            parts.append(self._score(images[start:end], prompts[start:end]).cpu())
        return RewardOutput(torch.cat(parts) if parts else torch.zeros(0))
