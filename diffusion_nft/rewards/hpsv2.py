"""HPSv2.1: human preference, by a CLIP ViT-H/14 tuned on rankings (arXiv 2306.09341)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from diffusion_nft.pictures import to_pil
from diffusion_nft.rewards import RewardOutput
from diffusion_nft.rewards.clip_common import score_in_batches
from diffusion_nft.rewards.weights import load_checkpoint, load_weights, weight_file

if TYPE_CHECKING:
    from open_clip import CLIP
    from PIL.Image import Image


class HPSv2Reward:
    """cos(image, text) with no scale; about 0.2 to 0.35 in practice.

    Pictures of 8 bits, long side resized to 224 (Pillow, bicubic), padded with black, OpenAI's
    mean and std.  The published code computes in float16 autocast; float32 here moves scores by
    rounding only.  ``model_name``: an architecture of open_clip; ``weights``: its checkpoint, None
    for the one in reward_ckpts.  Raises ImportError without open_clip, FileNotFoundError without
    the checkpoint and ValueError if the two do not fit.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        model_name: str = "ViT-H-14",
        weights: Path | None = None,
    ):
        try:
            import open_clip
        except ImportError as error:
            raise ImportError('the hpsv2 reward needs: pip install -e ".[hpsv2]"') from error
        path = weights or weight_file("hpsv2")
        checkpoint = load_checkpoint(path)
        if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
            raise ValueError(f'{path} has no "state_dict"')
        model = cast("CLIP", open_clip.create_model(model_name))
        load_weights(model, checkpoint["state_dict"], path)
        self.model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        size = cast("tuple[int, int]", model.visual.image_size)
        transform = open_clip.image_transform(
            size, is_train=False, resize_mode="longest", fill_color=0
        )
        self.preprocess = cast("Callable[[Image], Tensor]", transform)
        self.tokenizer = open_clip.get_tokenizer(model_name)
        self.device, self.dtype, self.batch_size = device, dtype, batch_size

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        """Scores ``[B]`` of ``images: [B, 3, H, W]`` in [0, 1]; prompts are cut at 77 tokens."""
        del metadata
        return RewardOutput(score_in_batches(self._score, images, prompts, self.batch_size))

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = torch.stack([self.preprocess(picture) for picture in to_pil(images)])
        tokens = self.tokenizer(prompts).to(self.device)
        image = self.model.encode_image(pixels.to(self.device, self.dtype), normalize=True)
        text = self.model.encode_text(tokens, normalize=True)
        return (image.float() * text.float()).sum(-1)
