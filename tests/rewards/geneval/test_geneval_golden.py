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
from diffusion_nft.rewards.geneval.mask2former import Mask2Former, load_mask2former
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
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "mmdet.safetensors")


@pytest.fixture
def network(tensors: dict[str, Tensor], tmp_path: Path) -> Mask2Former:
    """Read from a file in the published format."""
    state = {
        name.removeprefix("weights/"): tensor
        for name, tensor in tensors.items()
        if name.startswith("weights/")
    }
    path = tmp_path / "detector.pth"
    torch.save({"meta": {"epoch": 50}, "state_dict": state}, path)
    return load_mask2former(path, None, CONFIG)


def picture(tensors: dict[str, Tensor], index: int) -> Tensor:
    return tensors[f"picture/{index}"].permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("index", range(3))
def test_network_input(index: int, tensors: dict[str, Tensor]) -> None:
    """The corner with the padding: OpenCV rounds a few resized values to the other neighbour."""
    golden, image = RECORD["pictures"][index], picture(tensors, index)
    height, width = resized_size(*image.shape[-2:], *golden["sides"])
    got = prepare(image, (height, width), golden["channel_order"])[0]
    assert list(got.shape) == golden["input"]
    corner = tensors[f"corner/{index}"]
    steps = (got[:, -corner.shape[1] :, -corner.shape[2] :] - corner) * torch.tensor(
        [58.395, 57.12, 57.375]
    ).view(3, 1, 1)
    resized = tuple(image.shape[-2:]) != (height, width)
    assert resized == (index > 0)
    assert steps.abs().max() <= (1.001 if resized else 1e-4)
    assert (steps.abs() > 1e-4).float().mean() < 0.05


# Of each picture how far scores, boxes (pixels) and masks (share of their pixels) may be off.  The
# first is not resized, so that only rounding of floats is left; in the others one step in 255 of
# some 4 % of the input (measured at most: 0.011, 1 pixel and 3 %).
TOLERANCES = [(1e-4, 0, 0.001), (0.02, 2, 0.04), (0.02, 2, 0.04)]


@pytest.mark.parametrize("index", range(3))
def test_detections(index: int, tensors: dict[str, Tensor], network: Mask2Former) -> None:
    golden, image = RECORD["pictures"][index], picture(tensors, index)
    score_off, box_off, mask_off = TOLERANCES[index]
    short_side, long_side = golden["sides"]
    detect = Detector(
        network,
        torch.device("cpu"),
        channel_order=golden["channel_order"],
        min_score=RECORD["min_score"] - score_off,
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
            if found.label == OBJECT_NAMES[label] and abs(found.score - score) <= score_off
        ]
        assert candidates, f"no {OBJECT_NAMES[label]} of score {score}"
        found = min(candidates, key=lambda found: (found.mask ^ mask).sum())
        assert (found.mask ^ mask).sum() <= mask_off * mask.sum()
        assert np.abs(np.subtract(found.box, box)).max() <= box_off
        unmatched.remove(found)
    # What mmdet scored right below the bound of the record.
    assert all(found.score <= RECORD["min_score"] + score_off for found in unmatched)
