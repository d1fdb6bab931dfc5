"""The conversion from mmdet's names, against mmdet's own definitions, and the loading of files.

test_geneval_golden.py shows that each number goes to its place.
"""

import hashlib
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet_names import TINY_DETECTOR, mmdet_position_index, mmdet_state_dict
from torch import Tensor

from diffusion_nft.rewards.geneval.mask2former import (
    Mask2Former,
    load_mask2former,
    swin_small_config,
)
from diffusion_nft.rewards.geneval.mask2former_weights import convert, load_mmdet_state_dict

PIXEL = "model.pixel_level_module."
DECODER = "model.transformer_module.decoder."
WITHOUT_SOURCE = {f"{PIXEL}encoder.swin.layernorm.{kind}" for kind in ("weight", "bias")}


@pytest.fixture
def target(tiny_config):
    return Mask2Former(tiny_config).state_dict()


@pytest.fixture
def source():
    return mmdet_state_dict(version=3, **TINY_DETECTOR)


def all_values(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).sort().values


def test_every_number_arrives_once(source, target):
    result = convert(source, target)
    assert result.keys() == target.keys()
    assert all(result[name].shape == target[name].shape for name in target)
    arrived = all_values([v for name, v in result.items() if name not in WITHOUT_SOURCE])
    sent = all_values([v for name, v in source.items() if "position_index" not in name])
    assert torch.equal(arrived, sent)


def test_mmdet_2_names(source, target):
    old = mmdet_state_dict(version=2, **TINY_DETECTOR)
    assert old.keys() != source.keys()
    first, second = convert(old, target), convert(source, target)
    assert all(torch.equal(first[name], second[name]) for name in target)


@pytest.mark.parametrize("kind", ["cross_attn", "self_attn"])
@pytest.mark.parametrize("split", [True, False])
def test_decoder_attention_under_either_naming(kind, split, source, target):
    """transformers has named these in_proj or q_proj, k_proj, v_proj, depending on its version."""
    layer = f"{DECODER}layers.1.{kind}"
    joint = source[f"panoptic_head.transformer_decoder.layers.1.{kind}.attn.in_proj_weight"]
    names = [f"{layer}.{part}_proj" for part in "qkv"]
    kept = {k: v for k, v in target.items() if not re.match(rf"{layer}\.(in|q|k|v)_proj", k)}
    if split:
        renamed = {f"{name}.weight": torch.empty(32, 32) for name in names}
        renamed |= {f"{name}.bias": torch.empty(32) for name in names}
    else:
        renamed = {f"{layer}.in_proj_weight": torch.empty(96, 32)}
        renamed |= {f"{layer}.in_proj_bias": torch.empty(96)}
    result = convert(source, kept | renamed)
    if split:
        arrived = torch.cat([result[f"{name}.weight"] for name in names])
    else:
        arrived = result[f"{layer}.in_proj_weight"]
    assert torch.equal(arrived, joint)


def test_published_architecture():
    """649 tensors of mmdet fill the whole of the real model."""
    with torch.device("meta"):
        target = Mask2Former(swin_small_config()).state_dict()
    source = mmdet_state_dict(version=2, device="meta")
    assert len(source) == 649
    assert convert(source, target).keys() == target.keys()


def test_what_does_not_fit_is_named(source, target):
    with pytest.raises(ValueError, match=r"panoptic_head\.cls_embed\.bias is missing"):
        convert({k: v for k, v in source.items() if k != "panoptic_head.cls_embed.bias"}, target)
    with pytest.raises(ValueError, match=r"1 problems:\s+panoptic_head\.extra is unexpected"):
        convert(source | {"panoptic_head.extra": torch.zeros(1)}, target)
    with pytest.raises(ValueError, match=r"transformers' model\.new_thing is unknown"):
        convert(source, target | {"model.new_thing": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"query_embed.* has the shape|shape \(5, 32\), not \(6, 32\)"
    ):
        convert(source | {"panoptic_head.query_embed.weight": torch.zeros(5, 32)}, target)
    index = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"
    with pytest.raises(ValueError, match="has another order of the window's positions"):
        convert(source | {index: mmdet_position_index(7).flip(0)}, target)


def test_same_as_transformers_own_model(source, tiny_config):
    pytest.importorskip("scipy", reason="transformers' loss needs SciPy")
    from transformers import Mask2FormerForUniversalSegmentation

    theirs = Mask2FormerForUniversalSegmentation(tiny_config)
    theirs.load_state_dict(convert(source, theirs.state_dict()))
    ours = Mask2Former(tiny_config)
    ours.load_state_dict(convert(source, ours.state_dict()))
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs.eval()(pixels)
        classes, masks = ours.eval()(pixels)
    assert torch.equal(classes, expected.class_queries_logits)
    assert torch.equal(masks, expected.masks_queries_logits)


def save_checkpoint(path: Path, state: dict[str, Tensor], **meta: object) -> str:
    """Writes mmdet's format; returns the file's sha256."""
    torch.save(
        {"meta": {"epoch": 50, "CLASSES": ("person", "bicycle"), **meta}, "state_dict": state}, path
    )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_checkpoint_from_disk(tmp_path, source, tiny_config):
    path = tmp_path / "detector.pth"
    digest = save_checkpoint(path, source, loss=np.float64(0.5), palette=np.zeros(3, np.int64))
    model = load_mask2former(path, digest[:8], tiny_config)
    assert torch.equal(model.class_predictor.bias, source["panoptic_head.cls_embed.bias"])
    assert not model.training
    with torch.no_grad():
        classes, masks = model(torch.zeros(2, 3, 64, 96))
    assert classes.shape == (2, 6, 81)
    assert masks.shape == (2, 6, 16, 24)


def test_checkpoint_of_numpy_1(tmp_path):
    """NumPy 1 pickled its scalars under another module's name."""
    new, old = tmp_path / "new.pth", tmp_path / "old.pth"
    save_checkpoint(new, {"a": torch.ones(1)}, loss=np.float64(0.5), palette=np.zeros(3))
    with zipfile.ZipFile(new) as read, zipfile.ZipFile(old, "w") as write:
        for name in read.namelist():
            content = read.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray\n" in content
                content = content.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")
            write.writestr(name, content)
    assert load_mmdet_state_dict(old, None)["a"] == 1


def test_a_damaged_cut_or_other_file_is_refused(tmp_path):
    path = tmp_path / "detector.pth"
    digest = save_checkpoint(path, {"a": torch.ones(1000)})
    with pytest.raises(ValueError, match=f"damaged.*{digest[:8]}, not 743b7d99.*[Dd]ownload"):
        load_mmdet_state_dict(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="truncated"):
        load_mmdet_state_dict(path, None)
    torch.save([torch.ones(1)], path)
    with pytest.raises(ValueError, match="not an mmdet checkpoint"):
        load_mmdet_state_dict(path, None)
