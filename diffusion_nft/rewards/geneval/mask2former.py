"""Mask2Former with a Swin backbone (arXiv 2112.01527), GenEval's object detector."""

from pathlib import Path

from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerModel

from diffusion_nft.rewards.geneval.mask2former_weights import (
    PUBLISHED_SHA256,
    convert,
    load_mmdet_state_dict,
)
from diffusion_nft.rewards.geneval.vocabulary import OBJECT_NAMES


class Mask2Former(nn.Module):
    """Class and mask logits of the last decoder layer.

    transformers' Mask2FormerForUniversalSegmentation without the loss, which requires SciPy;
    parameter names are the same.
    """

    def __init__(self, config: Mask2FormerConfig):
        super().__init__()
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, len(OBJECT_NAMES) + 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """``pixels: [B, 3, H, W]``, normalised, H and W multiples of 32.

        Returns class logits ``[B, Q, 81]`` (the last class: no object) and mask logits
        ``[B, Q, H / 4, W / 4]`` for Q queries.
        """
        output = self.model(pixels, output_hidden_states=True)
        queries = output.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(queries), output.masks_queries_logits[-1]


def swin_small_config() -> Mask2FormerConfig:
    """The architecture of mmdet's ``mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco``."""
    backbone = {
        "model_type": "swin",
        "image_size": 224,
        "embed_dim": 96,
        "depths": [2, 2, 18, 2],
        "num_heads": [3, 6, 12, 24],
        "window_size": 7,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    return Mask2FormerConfig(backbone_config=backbone, num_queries=100)


def load_mask2former(
    path: Path, sha256: str | None = PUBLISHED_SHA256, config: Mask2FormerConfig | None = None
) -> Mask2Former:
    """Loads an mmdet checkpoint, on the CPU, in evaluation mode.

    ``sha256``: required start of the file's hash (None: not checked).  ``config``: the architecture
    (default: Swin-S).  Raises FileNotFoundError, or ValueError if the file is damaged or does not
    fit.
    """
    state = load_mmdet_state_dict(path, sha256)
    model = Mask2Former(config or swin_small_config())
    model.load_state_dict(convert(state, model.state_dict()))
    return model.eval().requires_grad_(False)
