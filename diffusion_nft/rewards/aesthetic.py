"""Aesthetic score: LAION's linear predictor on CLIP features (improved-aesthetic-predictor)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_nft.rewards.clip_common import BatchedReward, Clip
from diffusion_nft.rewards.weights import load_torch_file, load_weights, weight_file


class AestheticMLP(nn.Module):
    """768-1024-128-64-16-1 without activations: an affine map, as published.

    The dropout layers only keep the published parameter names (layers 0, 2, 4, 6, 7).
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(768, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """``features: [B, 768]``, unit vectors -> ``[B]``."""
        return self.layers(features).squeeze(1)


class AestheticReward(BatchedReward):
    """Predicted rating from 1 to 10 (about 4 to 7 in practice), independent of the prompt.

    ``model``: CLIP ViT-L/14, a hub name or a local folder; ``weights``: the predictor's file
    (default: the one in reward_ckpts).  Raises OSError if either is not available and ValueError if
    the weights do not fit.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        model: str = "openai/clip-vit-large-patch14",
        weights: Path | None = None,
    ):
        path = weights or weight_file("aesthetic")
        self.mlp = AestheticMLP()
        load_weights(self.mlp, load_torch_file(path), path)
        self.mlp.to(device).eval().requires_grad_(False)
        self.clip = Clip(model, processor=model, device=device, dtype=dtype)
        self.batch_size = batch_size

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.mlp(self.clip.image_features(self.clip.pixels(images)))
