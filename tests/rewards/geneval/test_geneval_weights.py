"""The conversion from mmdet's names, against mmdet's own definitions, and the loading of files."""

import hashlib
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet_names import TINY_DETECTOR, mmdet_position_index, mmdet_state_dict
from torch import Tensor
from transformers import Mask2FormerConfig

from diffusion_nft.rewards.geneval.mask2former import (
    Mask2Former,
    load_mask2former,
    swin_small_config,
)
from diffusion_nft.rewards.geneval.mask2former_weights import convert, load_mmdet_state_dict

PIXEL = "model.pixel_level_module."
DECODER = "model.transformer_module.decoder."
WITHOUT_SOURCE = {f"{PIXEL}encoder.swin.layernorm.{kind}" for kind in ("weight", "bias")}

# Written down from the map of names in the design, one line per kind of parameter.
SAME_TENSOR = {
    f"{PIXEL}encoder.swin.embeddings.patch_embeddings.projection.weight": (
        "backbone.patch_embed.projection.weight"
    ),
    f"{PIXEL}encoder.swin.embeddings.norm.bias": "backbone.patch_embed.norm.bias",
    f"{PIXEL}encoder.swin.encoder.layers.2.blocks.1.attention.o_proj.weight": (
        "backbone.stages.2.blocks.1.attn.w_msa.proj.weight"
    ),
    f"{PIXEL}encoder.swin.encoder.layers.2.blocks.1.layernorm_before.weight": (
        "backbone.stages.2.blocks.1.norm1.weight"
    ),
    f"{PIXEL}encoder.swin.encoder.layers.2.blocks.1.layernorm_after.weight": (
        "backbone.stages.2.blocks.1.norm2.weight"
    ),
    f"{PIXEL}encoder.swin.encoder.layers.0.blocks.1.mlp.fc1.bias": (
        "backbone.stages.0.blocks.1.ffn.layers.0.0.bias"
    ),
    f"{PIXEL}encoder.swin.encoder.layers.0.blocks.1.mlp.fc2.weight": (
        "backbone.stages.0.blocks.1.ffn.layers.1.weight"
    ),
    f"{PIXEL}encoder.hidden_states_norms.stage1.weight": "backbone.norm0.weight",
    f"{PIXEL}encoder.hidden_states_norms.stage4.bias": "backbone.norm3.bias",
    f"{PIXEL}decoder.input_projections.2.0.weight": (
        "panoptic_head.pixel_decoder.input_convs.2.conv.weight"
    ),
    f"{PIXEL}decoder.input_projections.1.1.bias": (
        "panoptic_head.pixel_decoder.input_convs.1.gn.bias"
    ),
    f"{PIXEL}decoder.adapter_1.0.weight": "panoptic_head.pixel_decoder.lateral_convs.0.conv.weight",
    f"{PIXEL}decoder.adapter_1.1.bias": "panoptic_head.pixel_decoder.lateral_convs.0.gn.bias",
    f"{PIXEL}decoder.layer_1.0.weight": "panoptic_head.pixel_decoder.output_convs.0.conv.weight",
    f"{PIXEL}decoder.layer_1.1.weight": "panoptic_head.pixel_decoder.output_convs.0.gn.weight",
    f"{PIXEL}decoder.mask_projection.bias": "panoptic_head.pixel_decoder.mask_feature.bias",
    f"{PIXEL}decoder.level_embed": "panoptic_head.pixel_decoder.level_encoding.weight",
    f"{PIXEL}decoder.encoder.layers.1.self_attn.value_proj.weight": (
        "panoptic_head.pixel_decoder.encoder.layers.1.self_attn.value_proj.weight"
    ),
    f"{PIXEL}decoder.encoder.layers.1.self_attn.output_proj.weight": (
        "panoptic_head.pixel_decoder.encoder.layers.1.self_attn.output_proj.weight"
    ),
    f"{PIXEL}decoder.encoder.layers.1.self_attn_layer_norm.bias": (
        "panoptic_head.pixel_decoder.encoder.layers.1.norms.0.bias"
    ),
    f"{PIXEL}decoder.encoder.layers.1.final_layer_norm.bias": (
        "panoptic_head.pixel_decoder.encoder.layers.1.norms.1.bias"
    ),
    f"{PIXEL}decoder.encoder.layers.0.fc1.weight": (
        "panoptic_head.pixel_decoder.encoder.layers.0.ffn.layers.0.0.weight"
    ),
    f"{PIXEL}decoder.encoder.layers.0.fc2.bias": (
        "panoptic_head.pixel_decoder.encoder.layers.0.ffn.layers.1.bias"
    ),
    f"{DECODER}layers.2.cross_attn.out_proj.weight": (
        "panoptic_head.transformer_decoder.layers.2.cross_attn.attn.out_proj.weight"
    ),
    f"{DECODER}layers.2.self_attn.out_proj.weight": (
        "panoptic_head.transformer_decoder.layers.2.self_attn.attn.out_proj.weight"
    ),
    f"{DECODER}layers.1.cross_attn_layer_norm.weight": (
        "panoptic_head.transformer_decoder.layers.1.norms.0.weight"
    ),
    f"{DECODER}layers.1.self_attn_layer_norm.weight": (
        "panoptic_head.transformer_decoder.layers.1.norms.1.weight"
    ),
    f"{DECODER}layers.1.final_layer_norm.weight": (
        "panoptic_head.transformer_decoder.layers.1.norms.2.weight"
    ),
    f"{DECODER}layers.0.fc1.bias": (
        "panoptic_head.transformer_decoder.layers.0.ffn.layers.0.0.bias"
    ),
    f"{DECODER}layers.0.fc2.bias": "panoptic_head.transformer_decoder.layers.0.ffn.layers.1.bias",
    f"{DECODER}layernorm.bias": "panoptic_head.transformer_decoder.post_norm.bias",
    f"{DECODER}mask_predictor.mask_embedder.0.0.bias": "panoptic_head.mask_embed.0.bias",
    f"{DECODER}mask_predictor.mask_embedder.1.0.weight": "panoptic_head.mask_embed.2.weight",
    f"{DECODER}mask_predictor.mask_embedder.2.0.weight": "panoptic_head.mask_embed.4.weight",
    "model.transformer_module.queries_embedder.weight": "panoptic_head.query_embed.weight",
    "model.transformer_module.queries_features.weight": "panoptic_head.query_feat.weight",
    "model.transformer_module.level_embed.weight": "panoptic_head.level_embed.weight",
    "class_predictor.weight": "panoptic_head.cls_embed.weight",
}


@pytest.fixture
def target(tiny_config: Mask2FormerConfig) -> dict[str, Tensor]:
    return Mask2Former(tiny_config).state_dict()


@pytest.fixture
def source() -> dict[str, Tensor]:
    return mmdet_state_dict(version=3, **TINY_DETECTOR)


def all_values(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors]).sort().values


def test_every_number_arrives_once(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    result = convert(source, target)
    assert result.keys() == target.keys()
    assert all(result[name].shape == target[name].shape for name in target)
    arrived = all_values([v for name, v in result.items() if name not in WITHOUT_SOURCE])
    sent = all_values([v for name, v in source.items() if "position_index" not in name])
    assert torch.equal(arrived, sent)


def test_tensors_go_where_the_map_says(
    source: dict[str, Tensor], target: dict[str, Tensor]
) -> None:
    result = convert(source, target)
    for name, origin in SAME_TENSOR.items():
        assert torch.equal(result[name], source[origin]), name


def test_mmdet_2_names(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    old = mmdet_state_dict(version=2, **TINY_DETECTOR)
    assert old.keys() != source.keys()
    first, second = convert(old, target), convert(source, target)
    assert all(torch.equal(first[name], second[name]) for name in target)


def test_joint_projections(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    result = convert(source, target)
    joint = source["backbone.stages.1.blocks.0.attn.w_msa.qkv.weight"]
    block = f"{PIXEL}encoder.swin.encoder.layers.1.blocks.0.attention"
    # 16 channels in stage 1.
    assert torch.equal(result[f"{block}.q_proj.weight"], joint[:16])
    assert torch.equal(result[f"{block}.k_proj.weight"], joint[16:32])
    assert torch.equal(result[f"{block}.v_proj.weight"], joint[32:])


@pytest.mark.parametrize("kind", ["cross_attn", "self_attn"])
@pytest.mark.parametrize("split", [True, False])
def test_decoder_attention_under_either_naming(
    kind: str, split: bool, source: dict[str, Tensor], target: dict[str, Tensor]
) -> None:
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


def test_patch_merging_computes_what_mmdet_computes(
    source: dict[str, Tensor], tiny_config: Mask2FormerConfig
) -> None:
    """mmdet's PatchMerging: unfold 2 x 2, norm, linear map."""
    model = Mask2Former(tiny_config)
    model.load_state_dict(convert(source, model.state_dict()))
    x = torch.randn(2, 6 * 4, 8, generator=torch.Generator().manual_seed(1))
    merge = model.model.pixel_level_module.encoder.swin.encoder.layers[0].downsample
    with torch.no_grad():
        got = merge(x, (6, 4))

    prefix = "backbone.stages.0.downsample"
    images = x.view(2, 6, 4, 8).permute(0, 3, 1, 2)
    unfolded = torch.nn.functional.unfold(images, 2, stride=2).transpose(1, 2)
    weight, bias = source[f"{prefix}.norm.weight"], source[f"{prefix}.norm.bias"]
    normed = torch.nn.functional.layer_norm(unfolded, (32,), weight, bias)
    expected = normed @ source[f"{prefix}.reduction.weight"].T
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_patch_merging_order_by_hand(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Channel c of neighbour (row, column) is at 4c + 2 row + column in mmdet; with C channels in
    all at C (row + 2 column) + c in transformers."""
    name = "backbone.stages.0.downsample.norm.weight"
    source[name] = torch.arange(32.0)
    got = convert(source, target)[f"{PIXEL}encoder.swin.encoder.layers.0.downsample.norm.weight"]
    for c in range(8):
        for row in range(2):
            for column in range(2):
                assert got[8 * (row + 2 * column) + c] == 4 * c + 2 * row + column


def test_published_architecture() -> None:
    """649 tensors of mmdet fill the whole of the real model."""
    with torch.device("meta"):
        target = Mask2Former(swin_small_config()).state_dict()
    source = mmdet_state_dict(version=2, device="meta")
    assert len(source) == 649
    assert convert(source, target).keys() == target.keys()


def test_what_does_not_fit_is_named(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"panoptic_head\.cls_embed\.bias is missing"):
        convert({k: v for k, v in source.items() if k != "panoptic_head.cls_embed.bias"}, target)
    with pytest.raises(ValueError, match=r"1 problems:\s+panoptic_head\.extra is left over"):
        convert(source | {"panoptic_head.extra": torch.zeros(1)}, target)
    with pytest.raises(ValueError, match=r"transformers' model\.new_thing is unknown"):
        convert(source, target | {"model.new_thing": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"query_embed.* has the shape|shape \(5, 32\), not \(6, 32\)"
    ):
        convert(source | {"panoptic_head.query_embed.weight": torch.zeros(5, 32)}, target)
    index = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"
    with pytest.raises(ValueError, match="orders the window's positions in another way"):
        convert(source | {index: mmdet_position_index(7).flip(0)}, target)


def test_same_as_transformers_own_model(
    source: dict[str, Tensor], tiny_config: Mask2FormerConfig
) -> None:
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


class Trap:
    """Unpickling this would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def save_checkpoint(path: Path, state: dict[str, Tensor], **meta: object) -> str:
    """Writes mmdet's format; returns the file's sha256."""
    torch.save(
        {"meta": {"epoch": 50, "CLASSES": ("person", "bicycle"), **meta}, "state_dict": state}, path
    )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_checkpoint_from_disk(
    tmp_path: Path, source: dict[str, Tensor], tiny_config: Mask2FormerConfig
) -> None:
    path = tmp_path / "detector.pth"
    digest = save_checkpoint(path, source, loss=np.float64(0.5), palette=np.zeros(3, np.int64))
    model = load_mask2former(path, digest[:8], tiny_config)
    assert torch.equal(model.class_predictor.bias, source["panoptic_head.cls_embed.bias"])
    assert not model.training
    with torch.no_grad():
        classes, masks = model(torch.zeros(2, 3, 64, 96))
    assert classes.shape == (2, 6, 81)
    assert masks.shape == (2, 6, 16, 24)


def test_checkpoint_of_numpy_1(tmp_path: Path) -> None:
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


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "detector.pth"
    digest = save_checkpoint(path, {"a": torch.ones(1)})
    with pytest.raises(ValueError, match=f"damaged.*{digest[:8]}, not 743b7d99.*[Dd]ownload"):
        load_mmdet_state_dict(path)


def test_file_that_could_run_code_is_refused(tmp_path: Path) -> None:
    path, touched = tmp_path / "detector.pth", tmp_path / "touched"
    save_checkpoint(path, {"a": torch.ones(1)}, hooks=Trap(touched))
    with pytest.raises(ValueError, match=r'could run code.*save {"state_dict": ...} alone'):
        load_mmdet_state_dict(path, None)
    assert not touched.exists()


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "detector.pth"
    save_checkpoint(path, {"a": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match="cut off"):
        load_mmdet_state_dict(path, None)


def test_file_without_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "detector.pth"
    torch.save([torch.ones(1)], path)
    with pytest.raises(ValueError, match="no mmdet checkpoint"):
        load_mmdet_state_dict(path, None)
