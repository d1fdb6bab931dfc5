"""PickScore: human preference between images of one prompt (arXiv 2305.01569)."""

import torch
from torch import Tensor

from diffusion_nft.rewards.clip_common import BatchedReward, Clip

# PickScore's raw scores are near 22; the published code divides them by this.
SCALE = 26.0


class PickScoreReward(BatchedReward):
    """exp(logit_scale) cos(text, image) / 26 with CLIP ViT-H/14; about 0.7 to 0.95 in practice.

    ``model``, ``processor``: hub names or local folders.  Raises OSError if one is not
    available and ValueError if the weights do not fit.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ):
        self.clip = Clip(model, processor=processor, device=device, dtype=dtype)
        self.batch_size = batch_size

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        cosine = self.clip.cosine(self.clip.pixels(images), prompts)
        return self.clip.logit_scale * cosine / SCALE
