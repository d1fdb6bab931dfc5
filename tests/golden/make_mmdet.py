"""Records what mmdet itself finds with a small random Mask2Former, for tests of GenEval's detector.

Writes mmdet.safetensors (weights under mmdet's names, images, masks, a corner of each network
input) and mmdet.json (versions, sizes, boxes and scores) beside this file.  It runs in an
environment of its own, of Python 3.11:

    pip install torch==2.13.0 "setuptools<81" wheel safetensors
    MMCV_WITH_OPS=0 pip install --no-build-isolation mmcv==1.7.2
    pip install mmdet==2.28.2
    python tests/golden/make_mmdet.py

The compiled operators of mmcv and torchvision, both of which mmcv imports, are replaced by empty
modules: Mask2Former needs neither on a CPU, where deformable attention has a PyTorch form.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
CONFIG = "mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py"

# The published architecture but for these sizes.
EMBED, DEPTHS, HEADS = 8, [2, 1, 2, 1], [1, 2, 2, 4]
WIDTH, ATTENTION_HEADS, FFN, QUERIES = 64, 4, 96, 12
PIXEL_LAYERS, LAYERS = 2, 3
# Of each image its height and width, what its short and long side may become at most (None: as
# published), and whether mmdet gets RGB, although it takes arrays for BGR.  The first keeps its
# size; the second is not padded; of the third the long side rules.
IMAGES = [
    ((90, 120), (90, 120), True),
    ((100, 100), None, False),
    ((150, 60), None, True),
]
# Random class weights are too timid to find anything.
CLASS_SCALE = 6
MIN_SCORE = 0.1
CORNER = 32


class Empty(ModuleType):
    """A module that has every name and nothing behind it."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def shrink(config: Any) -> None:
    """The published configuration with this file's sizes."""
    backbone, head = config.model.backbone, config.model.panoptic_head
    backbone.embed_dims, backbone.depths, backbone.num_heads = EMBED, DEPTHS, HEADS
    head.in_channels = [EMBED * 2**stage for stage in range(4)]
    head.feat_channels = head.out_channels = WIDTH
    head.num_queries = QUERIES
    head.pixel_decoder.encoder.num_layers = PIXEL_LAYERS
    head.transformer_decoder.num_layers = LAYERS
    for part in (head, head.pixel_decoder):
        part.positional_encoding.num_feats = WIDTH // 2
    for part in (head.pixel_decoder.encoder, head.transformer_decoder):
        layers = part.transformerlayers
        layers.attn_cfgs.num_heads = ATTENTION_HEADS
        layers.attn_cfgs.embed_dims = layers.ffn_cfgs.embed_dims = WIDTH
        layers.ffn_cfgs.feedforward_channels = FFN
    head.transformer_decoder.transformerlayers.feedforward_channels = FFN


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights that keep a signal alive and tell queries apart; mmdet leaves many at 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("query_feat.weight", "query_embed.weight", "position_bias_table")):
            parameter.copy_(noise)
        elif parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            # Weights of norms are 1, and the offsets' biases point in the heads' directions.
            kept = name.endswith(("weight", "sampling_offsets.bias"))
            parameter.copy_(0.1 * noise + (parameter if kept else 0))
    model.panoptic_head.cls_embed.weight *= CLASS_SCALE


@torch.no_grad()
def centre_masks(model: nn.Module, find: Any, images: list[np.ndarray]) -> None:
    """Shifts the mask features to mean 0, so that masks end inside the images."""
    features: list[Tensor] = []
    layer = model.panoptic_head.pixel_decoder.mask_feature
    hook = layer.register_forward_hook(lambda _, args, output: features.append(output))
    for image in images:
        find(model, image)
    hook.remove()
    layer.bias -= torch.stack([feature.mean((0, 2, 3)) for feature in features]).mean(0)


def draw(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """``uint8 [height, width, 3]``: a gradient with soft blobs, in another colour each."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    down, across = random.normal(size=(2, 3))
    image = y[..., None] / height * down + x[..., None] / width * across
    for _ in range(4):
        centre, color = random.uniform(size=2) * (height, width), random.normal(size=3)
        radius = random.uniform(0.1, 0.3) * min(height, width)
        distance = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / radius**2
        image += 2 * color * np.exp(-distance)[..., None]
    low, high = image.min((0, 1)), image.max((0, 1))
    return ((image - low) / (high - low) * 255).round().astype(np.uint8)


def main() -> None:
    sys.modules |= {name: Empty(name) for name in ("mmcv._ext", "torchvision")}
    import mmcv
    import mmdet
    from mmdet.apis import inference_detector, init_detector

    config = mmcv.Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / CONFIG)
    shrink(config)
    model = init_detector(config, device="cpu")
    randomise(model)
    random = np.random.default_rng(0)
    images = [draw(*size, random) for size, _, _ in IMAGES]
    centre_masks(model, inference_detector, images)

    tensors = {f"weights/{name}": tensor for name, tensor in model.state_dict().items()}
    inputs: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    found: list[dict] = []
    published = config.data.test.pipeline[1].img_scale
    for i, (image, (_, sides, swapped)) in enumerate(zip(images, IMAGES, strict=True)):
        sides = sides or sorted(published)
        model.cfg.data.test.pipeline[1].img_scale = tuple(sides)
        boxes, masks = inference_detector(model, image if swapped else image[..., ::-1])
        objects = [
            (label, box, mask)
            for label in range(len(boxes))
            for box, mask in zip(boxes[label], masks[label], strict=True)
            if box[4] > MIN_SCORE
        ]
        tensors[f"picture/{i}"] = torch.from_numpy(image)
        tensors[f"masks/{i}"] = torch.from_numpy(
            np.stack([np.packbits(mask) for _, _, mask in objects])
        )
        tensors[f"corner/{i}"] = inputs[-1][:, -CORNER:, -CORNER:].contiguous()
        found.append(
            {
                "channel_order": "swapped" if swapped else "rgb",
                "sides": list(sides),
                "input": list(inputs[-1].shape),
                "labels": [label for label, _, _ in objects],
                "scores": [float(box[4]) for _, box, _ in objects],
                "boxes": [[int(side) for side in box[:4]] for _, box, _ in objects],
            }
        )
    save_file(tensors, HERE / "mmdet.safetensors")
    record = {
        "versions": {module.__name__: module.__version__ for module in (mmdet, mmcv, torch)},
        "config": CONFIG,
        "min_score": MIN_SCORE,
        "images": found,
    }
    (HERE / "mmdet.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
