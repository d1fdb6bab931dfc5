"""PickScore: human preference between images of one prompt (arXiv 2305.01569)."""

import torch
from torch import Tensor

from diffusion_nft.rewards import RewardOutput
from diffusion_nft.rewards.clip_common import Clip, score_in_batches

# PickScore's scores lie near 22; the published code brings them near 1 by this.
SCALE = 26.0


class PickScoreReward:
    """exp(logit_scale) cos(text, image) / 26 with CLIP ViT-H/14; about 0.7 to 0.95 in practice.

    ``model``, ``processor``: hub names or local folders.  Raises OSError if one cannot be had and
    ValueError if the weights do not fit.
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

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        """Scores ``[B]`` of ``images: [B, 3, H, W]`` in [0, 1] for their prompts."""
        del metadata
        return RewardOutput(score_in_batches(self._score, images, prompts, self.batch_size))

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        cosine = self.clip.cosine(self.clip.pixels(images), prompts)
        return self.clip.logit_scale * cosine / SCALE
