"""mmdet's Mask2Former, as names and shapes written down from mmdet's module definitions.

Independent of the converter: mmdet.models.backbones.swin, ...layers.msdeformattn_pixel_decoder and
...dense_heads.mask2former_head of mmdet 2.28 and 3.3.
"""

import math

import torch
from torch import Tensor

# Arguments of mmdet_state_dict for a tiny model; conftest.py has its configuration.
TINY_DETECTOR = {
    "embed": 8,
    "depths": (2, 1, 2, 1),
    "heads": (1, 2, 2, 4),
    "width": 32,
    "attention_heads": 4,
    "pixel_layers": 2,
    "pixel_ffn": 24,
    "layers": 3,
    "ffn": 40,
    "queries": 6,
}


def mmdet_state_dict(
    *,
    version: int,
    embed: int = 96,
    depths: tuple[int, ...] = (2, 2, 18, 2),
    heads: tuple[int, ...] = (3, 6, 12, 24),
    window: int = 7,
    width: int = 256,
    attention_heads: int = 8,
    pixel_layers: int = 6,
    pixel_ffn: int = 1024,
    layers: int = 9,
    ffn: int = 2048,
    queries: int = 100,
    classes: int = 80,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Random tensors under the names of mmdet ``version`` 2 or 3; all values differ."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    layer("backbone.patch_embed.projection", embed, 3, 4, 4)
    layer("backbone.patch_embed.norm", embed)
    for i, depth in enumerate(depths):
        size = embed * 2**i
        for j in range(depth):
            block = f"backbone.stages.{i}.blocks.{j}"
            layer(f"{block}.norm1", size)
            shapes[f"{block}.attn.w_msa.relative_position_bias_table"] = (
                (2 * window - 1) ** 2,
                heads[i],
            )
            layer(f"{block}.attn.w_msa.qkv", 3 * size, size)
            layer(f"{block}.attn.w_msa.proj", size, size)
            layer(f"{block}.norm2", size)
            layer(f"{block}.ffn.layers.0.0", 4 * size, size)
            layer(f"{block}.ffn.layers.1", size, 4 * size)
        if i < 3:
            layer(f"backbone.stages.{i}.downsample.norm", 4 * size)
            layer(f"backbone.stages.{i}.downsample.reduction", 2 * size, 4 * size, bias=False)
        layer(f"backbone.norm{i}", size)

    attention = "attentions.0" if version == 2 else "self_attn"
    feed = "ffns.0" if version == 2 else "ffn"
    pixel = "panoptic_head.pixel_decoder"
    for i in range(3):
        layer(f"{pixel}.input_convs.{i}.conv", width, embed * 2 ** (3 - i), 1, 1)
        layer(f"{pixel}.input_convs.{i}.gn", width)
    for i in range(pixel_layers):
        prefix = f"{pixel}.encoder.layers.{i}"
        points = attention_heads * 3 * 4
        layer(f"{prefix}.{attention}.sampling_offsets", 2 * points, width)
        layer(f"{prefix}.{attention}.attention_weights", points, width)
        layer(f"{prefix}.{attention}.value_proj", width, width)
        layer(f"{prefix}.{attention}.output_proj", width, width)
        layer(f"{prefix}.{feed}.layers.0.0", pixel_ffn, width)
        layer(f"{prefix}.{feed}.layers.1", width, pixel_ffn)
        layer(f"{prefix}.norms.0", width)
        layer(f"{prefix}.norms.1", width)
    shapes[f"{pixel}.level_encoding.weight"] = (3, width)
    layer(f"{pixel}.lateral_convs.0.conv", width, embed, 1, 1, bias=False)
    layer(f"{pixel}.lateral_convs.0.gn", width)
    layer(f"{pixel}.output_convs.0.conv", width, width, 3, 3, bias=False)
    layer(f"{pixel}.output_convs.0.gn", width)
    layer(f"{pixel}.mask_feature", width, width, 1, 1)

    names = ("attentions.0", "attentions.1") if version == 2 else ("cross_attn", "self_attn")
    for i in range(layers):
        prefix = f"panoptic_head.transformer_decoder.layers.{i}"
        for name in names:
            shapes[f"{prefix}.{name}.attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{prefix}.{name}.attn.in_proj_bias"] = (3 * width,)
            layer(f"{prefix}.{name}.attn.out_proj", width, width)
        layer(f"{prefix}.{feed}.layers.0.0", ffn, width)
        layer(f"{prefix}.{feed}.layers.1", width, ffn)
        for k in range(3):
            layer(f"{prefix}.norms.{k}", width)
    layer("panoptic_head.transformer_decoder.post_norm", width)
    for name, rows in (("query_embed", queries), ("query_feat", queries), ("level_embed", 3)):
        shapes[f"panoptic_head.{name}.weight"] = (rows, width)
    layer("panoptic_head.cls_embed", classes + 1, width)
    for i in (0, 2, 4):
        layer(f"panoptic_head.mask_embed.{i}", width, width)

    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.empty(shape, device="meta")
        if device == "meta"
        else _random(name, shape, generator)
        for name, shape in shapes.items()
    }
    for i, depth in enumerate(depths):
        for j in range(depth):
            name = f"backbone.stages.{i}.blocks.{j}.attn.w_msa.relative_position_index"
            state[name] = mmdet_position_index(window)
    return state


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values that keep a signal alive: norms near 1, matrices by their inputs, biases small."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 0.1 * noise + (1 if name.endswith("weight") else 0)
    return noise / math.prod(shape[1:]) ** 0.5


def mmdet_position_index(window: int) -> Tensor:
    """mmdet's WindowMSA: double_step_seq(2W - 1, W, 1, W), plus its transpose, flipped."""
    steps = torch.arange(0, (2 * window - 1) * window, 2 * window - 1)
    sequence = (steps[:, None] + torch.arange(window)[None]).reshape(1, -1)
    return (sequence + sequence.T).flip(1).contiguous()
