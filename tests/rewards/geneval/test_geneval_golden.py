"""The detector against what mmdet 2.28.2 itself found: see tests/golden/make_mmdet.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Mask2FormerConfig

from diffusion_nft.rewards.geneval.detector import Detector, prepare, resized_size
from diffusion_nft.rewards.geneval.mask2former import load_mask2former
from diffusion_nft.rewards.geneval.vocabulary import OBJECT_NAMES

GOLDEN = Path(__file__).parents[2] / "golden"
RECORD = json.loads((GOLDEN / "mmdet.json").read_text())
# The sizes that make_mmdet.py gives mmdet.
CONFIG = Mask2FormerConfig(
    backbone_config={
        "model_type": "swin",
        "embed_dim": 8,
        "depths": [2, 1, 2, 1],
        "num_heads": [1, 2, 2, 4],
        "window_size": 7,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    feature_size=64,
    mask_feature_size=64,
    hidden_dim=64,
    num_attention_heads=4,
    encoder_layers=2,
    encoder_feedforward_dim=96,
    decoder_layers=4,
    dim_feedforward=96,
    num_queries=12,
)


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "mmdet.safetensors")


@pytest.fixture
def network(tensors, tmp_path):
    """Read from a file in the published format."""
    state = {
        name.removeprefix("weights/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("weights/")
    }
    path = tmp_path / "detector.pth"
    torch.save({"meta": {"epoch": 50}, "state_dict": state}, path)
    return load_mask2former(path, None, CONFIG)


def recorded_image(tensors: dict[str, Tensor], index: int) -> Tensor:
    return tensors[f"picture/{index}"].permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("index", range(3))
def test_network_input(index, tensors):
    """The corner with the padding; one of 255 levels would be 0.017."""
    golden, image = RECORD["images"][index], recorded_image(tensors, index)
    resized = resized_size(*image.shape[-2:], *golden["sides"])
    assert (resized == tuple(image.shape[-2:])) == (index == 0)
    got = prepare(image, resized, golden["channel_order"])[0]
    assert list(got.shape) == golden["input"]
    corner = tensors[f"corner/{index}"]
    got = got[:, -corner.shape[1] :, -corner.shape[2] :]
    torch.testing.assert_close(got, corner, atol=1e-5, rtol=0)


# How far scores and masks (share of their pixels) may be off by the rounding of floats.
SCORE_OFF, MASK_OFF = 1e-4, 0.001


@pytest.mark.parametrize("index", range(3))
def test_detections(index, tensors, network):
    golden, image = RECORD["images"][index], recorded_image(tensors, index)
    short_side, long_side = golden["sides"]
    detect = Detector(
        network,
        torch.device("cpu"),
        channel_order=golden["channel_order"],
        min_score=RECORD["min_score"] - SCORE_OFF,
        short_side=short_side,
        long_side=long_side,
    )
    unmatched = detect(image)[0]
    assert len(golden["scores"]) >= 20
    size = image.shape[-2:]
    bits = np.unpackbits(tensors[f"masks/{index}"].numpy(), axis=1, count=size.numel())
    masks = bits.reshape(-1, *size).astype(bool)
    objects = zip(golden["labels"], golden["scores"], golden["boxes"], masks, strict=True)
    for label, score, box, mask in objects:
        candidates = [
            found
            for found in unmatched
            if found.label == OBJECT_NAMES[label] and abs(found.score - score) <= SCORE_OFF
        ]
        assert candidates, f"no {OBJECT_NAMES[label]} of score {score}"
        found = min(candidates, key=lambda found: (found.mask ^ mask).sum())
        assert (found.mask ^ mask).sum() <= MASK_OFF * mask.sum()
        assert list(found.box) == box
        unmatched.remove(found)
    # What mmdet scored right below the bound of the record.
    assert all(found.score <= RECORD["min_score"] + SCORE_OFF for found in unmatched)
