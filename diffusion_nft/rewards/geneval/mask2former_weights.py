"""Converts Mask2Former checkpoints of mmdet 2.x and 3.x to the parameter names of transformers.

transformers renames parameters between versions, so that the conversion starts from the target's
state dict; every name on either side must be accounted for.
"""

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_nft.rewards.weights import WEIGHT_FILES
from diffusion_nft.utils import files

# The start of the published file's sha256.
PUBLISHED_SHA256 = WEIGHT_FILES["geneval"].sha256

_SWIN = r"model\.pixel_level_module\.encoder\.swin\."
_BLOCK = _SWIN + r"encoder\.layers\.(\d+)\.blocks\.(\d+)\."
_MM_BLOCK = r"backbone.stages.\1.blocks.\2."
_PIXEL = r"model\.pixel_level_module\.decoder\."
_PIXEL_LAYER = _PIXEL + r"encoder\.layers\.(\d+)\."
_MM_PIXEL = "panoptic_head.pixel_decoder."
_MM_PIXEL_LAYER = _MM_PIXEL + r"encoder.layers.\1."
_MODULE = r"model\.transformer_module\."
_LAYER = _MODULE + r"decoder\.layers\.(\d+)\."
_MM_LAYER = r"panoptic_head.transformer_decoder.layers.\1."

# Target name (a regular expression) -> mmdet 3.x name.  Attention has one in_proj, as in torch and
# mmdet, or three projections, each a third of in_proj.
_RULES: list[tuple[str, str]] = [
    (
        _SWIN + r"embeddings\.patch_embeddings\.projection\.(\w+)",
        r"backbone.patch_embed.projection.\1",
    ),
    (_SWIN + r"embeddings\.norm\.(\w+)", r"backbone.patch_embed.norm.\1"),
    (_BLOCK + r"attention\.[qkv]_proj\.(\w+)", _MM_BLOCK + r"attn.w_msa.qkv.\3"),
    (_BLOCK + r"attention\.o_proj\.(\w+)", _MM_BLOCK + r"attn.w_msa.proj.\3"),
    (
        _BLOCK + r"attention\.relative_position_bias\.relative_position_bias_table",
        _MM_BLOCK + "attn.w_msa.relative_position_bias_table",
    ),
    (_BLOCK + r"layernorm_before\.(\w+)", _MM_BLOCK + r"norm1.\3"),
    (_BLOCK + r"layernorm_after\.(\w+)", _MM_BLOCK + r"norm2.\3"),
    (_BLOCK + r"mlp\.fc1\.(\w+)", _MM_BLOCK + r"ffn.layers.0.0.\3"),
    (_BLOCK + r"mlp\.fc2\.(\w+)", _MM_BLOCK + r"ffn.layers.1.\3"),
    (
        _SWIN + r"encoder\.layers\.(\d+)\.downsample\.(norm|reduction)\.(\w+)",
        r"backbone.stages.\1.downsample.\2.\3",
    ),
    *(
        (
            rf"model\.pixel_level_module\.encoder\.hidden_states_norms\.stage{i + 1}\.(\w+)",
            rf"backbone.norm{i}.\1",
        )
        for i in range(4)
    ),
    (_PIXEL + r"input_projections\.(\d+)\.0\.(\w+)", _MM_PIXEL + r"input_convs.\1.conv.\2"),
    (_PIXEL + r"input_projections\.(\d+)\.1\.(\w+)", _MM_PIXEL + r"input_convs.\1.gn.\2"),
    (_PIXEL + r"adapter_1\.0\.(\w+)", _MM_PIXEL + r"lateral_convs.0.conv.\1"),
    (_PIXEL + r"adapter_1\.1\.(\w+)", _MM_PIXEL + r"lateral_convs.0.gn.\1"),
    (_PIXEL + r"layer_1\.0\.(\w+)", _MM_PIXEL + r"output_convs.0.conv.\1"),
    (_PIXEL + r"layer_1\.1\.(\w+)", _MM_PIXEL + r"output_convs.0.gn.\1"),
    (_PIXEL + r"mask_projection\.(\w+)", _MM_PIXEL + r"mask_feature.\1"),
    (_PIXEL + r"level_embed", _MM_PIXEL + "level_encoding.weight"),
    (_PIXEL_LAYER + r"self_attn\.(\w+)\.(\w+)", _MM_PIXEL_LAYER + r"self_attn.\2.\3"),
    (_PIXEL_LAYER + r"self_attn_layer_norm\.(\w+)", _MM_PIXEL_LAYER + r"norms.0.\2"),
    (_PIXEL_LAYER + r"final_layer_norm\.(\w+)", _MM_PIXEL_LAYER + r"norms.1.\2"),
    (_PIXEL_LAYER + r"fc1\.(\w+)", _MM_PIXEL_LAYER + r"ffn.layers.0.0.\2"),
    (_PIXEL_LAYER + r"fc2\.(\w+)", _MM_PIXEL_LAYER + r"ffn.layers.1.\2"),
    (_LAYER + r"(cross_attn|self_attn)\.[qkv]_proj\.(\w+)", _MM_LAYER + r"\2.attn.in_proj_\3"),
    (_LAYER + r"(cross_attn|self_attn)\.in_proj_(\w+)", _MM_LAYER + r"\2.attn.in_proj_\3"),
    (_LAYER + r"(cross_attn|self_attn)\.out_proj\.(\w+)", _MM_LAYER + r"\2.attn.out_proj.\3"),
    (_LAYER + r"cross_attn_layer_norm\.(\w+)", _MM_LAYER + r"norms.0.\2"),
    (_LAYER + r"self_attn_layer_norm\.(\w+)", _MM_LAYER + r"norms.1.\2"),
    (_LAYER + r"final_layer_norm\.(\w+)", _MM_LAYER + r"norms.2.\2"),
    (_LAYER + r"fc1\.(\w+)", _MM_LAYER + r"ffn.layers.0.0.\2"),
    (_LAYER + r"fc2\.(\w+)", _MM_LAYER + r"ffn.layers.1.\2"),
    (_MODULE + r"decoder\.layernorm\.(\w+)", r"panoptic_head.transformer_decoder.post_norm.\1"),
    *(
        (
            _MODULE + rf"decoder\.mask_predictor\.mask_embedder\.{i}\.0\.(\w+)",
            rf"panoptic_head.mask_embed.{2 * i}.\1",
        )
        for i in range(3)
    ),
    (_MODULE + r"queries_embedder\.weight", "panoptic_head.query_embed.weight"),
    (_MODULE + r"queries_features\.weight", "panoptic_head.query_feat.weight"),
    (_MODULE + r"level_embed\.weight", "panoptic_head.level_embed.weight"),
    (r"class_predictor\.(\w+)", r"panoptic_head.cls_embed.\1"),
]

# Target parameters without a counterpart and without effect on the output: the norm after Swin's
# last stage (the backbone has one norm per stage) and the class weights of the loss.
_UNUSED_IN_TARGET = re.compile(_SWIN + r"layernorm\.(weight|bias)|criterion\.empty_weight")
_POSITION_INDEX = ".relative_position_index"


def convert(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmdet's state dict ``source`` under the names of transformers' state dict ``target``.

    Raises ValueError for target names without a rule, and for tensors that are missing, unexpected
    or of another shape.
    """
    source = {mmdet3_name(name): tensor for name, tensor in source.items()}
    result: dict[str, Tensor] = {}
    problems: list[str] = []
    used: set[str] = set()
    for name, value in target.items():
        if _UNUSED_IN_TARGET.fullmatch(name):
            result[name] = value
            continue
        origin = _source_name(name)
        if origin is None:
            problems.append(f"transformers' {name} is unknown")
        elif origin not in source:
            problems.append(f"{origin} is missing (for {name})")
        else:
            used.add(origin)
            result[name] = _adapted(source[origin], name)
            if result[name].shape != value.shape:
                shapes = f"{tuple(result[name].shape)}, not {tuple(value.shape)}"
                problems.append(f"{origin} gives {name} the shape {shapes}")
    for name in sorted(source.keys() - used):
        if not name.endswith(_POSITION_INDEX):
            problems.append(f"{name} is unexpected")
        elif not torch.equal(source[name], _position_index(source[name])):
            problems.append(f"{name} has another order of the window's positions")
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(
            f"the Mask2Former weights do not fit, {len(problems)} problems:\n  {shown}"
        )
    return result


def mmdet3_name(name: str) -> str:
    """The mmdet 3.x name of a parameter with the 2.x or 3.x name ``name``."""
    if name.startswith(_MM_PIXEL):
        name = name.replace(".attentions.0.", ".self_attn.")
    name = name.replace(".attentions.0.", ".cross_attn.").replace(".attentions.1.", ".self_attn.")
    return name.replace(".ffns.0.", ".ffn.")


def _source_name(target_name: str) -> str | None:
    for pattern, template in _RULES:
        match = re.fullmatch(pattern, target_name)
        if match:
            return match.expand(template)
    return None


def _adapted(tensor: Tensor, target_name: str) -> Tensor:
    """``tensor`` for the target: a third of a joint projection, or reordered channels."""
    part = re.search(r"\.([qkv])_proj\.", target_name)
    if part:
        return tensor.chunk(3)["qkv".index(part[1])].contiguous()
    if ".downsample." in target_name:
        return _patch_merging_order(tensor)
    return tensor


def _patch_merging_order(tensor: Tensor) -> Tensor:
    """Reorders the 2x2 neighbours in ``tensor: [..., 4C]`` from mmdet's to transformers' order.

    mmdet unfolds: channel major, neighbours (row, column) in the order 00, 01, 10, 11.
    transformers concatenates C channels of each of 00, 10, 01, 11.
    """
    neighbours = tensor.reshape(*tensor.shape[:-1], -1, 4).transpose(-2, -1)
    return neighbours[..., [0, 2, 1, 3], :].flatten(-2)


def _position_index(index: Tensor) -> Tensor:
    """Swin's index into the bias table for the window size w of ``index: [w*w, w*w]``.

    (y_i - y_j + w - 1)(2w - 1) + (x_i - x_j + w - 1) in the original, mmdet and transformers.
    """
    side = round(len(index) ** 0.5)
    positions = torch.arange(len(index), device=index.device)
    y, x = positions // side, positions % side
    row, column = y[:, None] - y[None] + side - 1, x[:, None] - x[None] + side - 1
    return (row * (2 * side - 1) + column).to(index.dtype)


def load_mmdet_state_dict(path: Path, sha256: str | None = PUBLISHED_SHA256) -> dict[str, Tensor]:
    """The "state_dict" of an mmdet checkpoint; its "meta" may also hold NumPy scalars and arrays.

    Raises FileNotFoundError, and ValueError if the file's sha256 does not start with ``sha256``
    (None: not checked), if it cannot be read, holds other objects, which could run code, or has no
    state dict.
    """
    if sha256 is not None:
        _check_sha256(path, sha256)
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # On arbitrary bytes the unpickler raises any of these.
    except (EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a PyTorch checkpoint, or is truncated: {error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a PyTorch checkpoint, or holds objects other than tensors, plain "
            "values and NumPy numbers, which could run code.  If you trust it, save only "
            f'{{"state_dict": ...}} and use that file.  torch: {error}'
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f'{path} is not an mmdet checkpoint: it has no "state_dict"')
    return dict(checkpoint["state_dict"])


def _check_sha256(path: Path, start: str) -> None:
    digest = files.sha256(path)
    if not digest.startswith(start):
        raise ValueError(
            f"{path} is damaged or another file: its sha256 starts with {digest[: len(start)]}, "
            f"not {start}.  Download it again"
        )


def _numpy_globals() -> list[Callable | tuple[Callable, str]]:
    """Functions and types in pickled NumPy scalars and arrays, under the names of NumPy 1 and 2."""
    functions: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]]
    named = [
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for function in functions
        for core in ("core", "_core")
    ]
    kinds = [
        type(np.dtype(kind)) for kind in ("bool", "i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8")
    ]
    return [*named, np.ndarray, np.dtype, *kinds]
