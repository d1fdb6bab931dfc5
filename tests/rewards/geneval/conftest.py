"""Tiny models of the real architectures, on disk, in the formats of the real weights."""

import json

import open_clip
import pytest
import torch
from transformers import Mask2FormerConfig

from diffusion_nft.rewards.geneval.colors import ColorClassifier


@pytest.fixture
def tiny_config():
    """The configuration that fits ``mmdet_state_dict(**TINY_DETECTOR)``."""
    backbone = {
        "model_type": "swin",
        "image_size": 64,
        "embed_dim": 8,
        "depths": [2, 1, 2, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 7,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    return Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        num_attention_heads=4,
        encoder_layers=2,
        encoder_feedforward_dim=24,
        decoder_layers=4,
        dim_feedforward=40,
        num_queries=6,
        num_labels=80,
    )


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """Name and weights of a CLIP with QuickGELU for open_clip."""
    folder = tmp_path_factory.mktemp("clip")
    for name, quick_gelu in (("geneval-tiny-quickgelu", True), ("geneval-tiny", False)):
        config = {
            "embed_dim": 16,
            "quick_gelu": quick_gelu,
            "vision_cfg": {
                "image_size": 32,
                "layers": 2,
                "width": 32,
                "head_width": 16,
                "patch_size": 8,
            },
            "text_cfg": {
                "context_length": 77,
                "vocab_size": 49408,
                "width": 16,
                "heads": 2,
                "layers": 2,
            },
        }
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("geneval-tiny-quickgelu")
    with torch.no_grad():
        # So that what an image shows outweighs the constant class token.
        model.visual.conv1.weight *= 20
    weights = folder / "weights.pt"
    torch.save(model.state_dict(), weights)
    return "geneval-tiny-quickgelu", str(weights)


@pytest.fixture
def tiny_colors(tiny_clip):
    name, weights = tiny_clip
    return ColorClassifier.load(torch.device("cpu"), weights, name)
