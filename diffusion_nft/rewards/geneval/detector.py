"""Object detector: Mask2Former with the preprocessing and postprocessing of mmdet.

transformers' ``post_process_instance_segmentation`` differs from the benchmark in scores and boxes,
because it merges masks at 384 x 384.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_nft.images import to_uint8
from diffusion_nft.rewards.geneval.verdict import SCORE_THRESHOLD, Detection
from diffusion_nft.rewards.geneval.vocabulary import OBJECT_NAMES

SHORT_SIDE, LONG_SIDE = 800, 1333
SIZE_DIVISOR = 32
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
# Padding value of the published mmdet 2.x configuration, before normalisation.
PADDING = 128
MAX_CANDIDATES = 100

# "swapped": the network receives BGR, as in the published trainers, which pass RGB arrays to mmdet
# where it expects BGR.  "rgb": the order of the network's training and of the benchmark's script,
# which reads files.
ChannelOrder = Literal["swapped", "rgb"]


class Detector:
    """Finds the objects in images, with one pass of the network per call.

    ``network``: normalised pixels ``[B, 3, H, W]`` -> class logits ``[B, Q, classes + 1]`` and mask
    logits ``[B, Q, h, w]``.  ``min_score``: objects must score higher (0.3 is GenEval's lowest
    threshold).  ``dtype``: below float32 the network runs under autocast.  Raises ImportError
    without OpenCV.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        *,
        channel_order: ChannelOrder = "swapped",
        dtype: torch.dtype = torch.float32,
        min_score: float = SCORE_THRESHOLD,
        short_side: int = SHORT_SIDE,
        long_side: int = LONG_SIDE,
    ):
        try:
            import cv2  # noqa: F401  (prepare uses it)
        except ImportError as error:
            raise ImportError('the geneval reward needs: pip install -e ".[geneval]"') from error
        self.network = network.to(device).eval()
        self.device, self.dtype = device, dtype
        self.channel_order: ChannelOrder = channel_order
        self.min_score = min_score
        self.sides = (short_side, long_side)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """Objects in each of ``images: [B, 3, H, W] in [0, 1]``, most probable class first."""
        height, width = images.shape[-2:]
        resized = resized_size(height, width, *self.sides)
        pixels = prepare(images.to(self.device), resized, self.channel_order)
        # Autocast, not a cast: bfloat16 is too coarse for sampling points of wide images.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            class_logits, mask_logits = self.network(pixels)
        return [
            read_detections(
                classes,
                masks,
                padded=(pixels.shape[-2], pixels.shape[-1]),
                resized=resized,
                original=(height, width),
                min_score=self.min_score,
            )
            for classes, masks in zip(class_logits, mask_logits, strict=True)
        ]


def resized_size(
    height: int, width: int, short_side: int = SHORT_SIDE, long_side: int = LONG_SIDE
) -> tuple[int, int]:
    """Input size of the network: short side 800, but long side at most 1333.

    ``int(side * scale + 0.5)`` with one scale for both sides (mmcv's ``rescale_size``).
    """
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def prepare(images: Tensor, resized: tuple[int, int], channel_order: ChannelOrder) -> Tensor:
    """Network input from ``images: [B, 3, H, W] in [0, 1]``, at ``resized`` plus padding.

    8-bit images, resized by OpenCV, padded with grey (128) at the right and bottom to multiples of
    32, then (x - mean) / std in 0..255.  Source: ``test_pipeline`` of mmdet 2.28's
    mask2former_r50_lsj_8x2_50e_coco.py, which the published configuration inherits.  torch's
    bilinear resize rounds about one value in ten differently from OpenCV's integer arithmetic.
    """
    import cv2

    height, width = resized
    arrays = [
        cv2.resize(array, (width, height), interpolation=cv2.INTER_LINEAR)
        for array in to_uint8(images).permute(0, 2, 3, 1).cpu().contiguous().numpy()
    ]
    pixels = torch.from_numpy(np.stack(arrays)).to(images.device).permute(0, 3, 1, 2).float()
    if channel_order == "swapped":
        pixels = pixels.flip(1)
    missing = (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR)
    pixels = F.pad(pixels, missing, value=PADDING)
    mean, std = pixels.new_tensor(MEAN), pixels.new_tensor(STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def read_detections(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
    min_score: float = SCORE_THRESHOLD,
    names: tuple[str, ...] = OBJECT_NAMES,
) -> list[Detection]:
    """Objects of one image.  Source: mmdet's MaskFormerFusionHead.instance_postprocess.

    ``class_logits: [Q, classes + 1]``; ``mask_logits: [Q, h, w]``, resized to the ``padded`` input,
    cropped to the ``resized`` image and resized to the ``original`` size.  The 100 most probable
    (query, class) pairs become objects with mask = logit > 0, score = probability x mean sigmoid in
    the mask, and box (x0, y0, x1 + 1, y1 + 1).  Objects with score > ``min_score`` and a non-empty
    mask are kept, most probable class first, ties in the order of the queries.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1].flatten()
    ranked, pairs = probabilities.sort(descending=True, stable=True)
    # Score <= probability, so that masks of improbable pairs are not needed; 0.999 for rounding.
    number = int((ranked[:MAX_CANDIDATES] > 0.999 * min_score).sum())
    if number == 0:
        return []
    ranked, pairs = ranked[:number], pairs[:number]
    classes = len(names)
    logits = mask_logits[pairs // classes].float()[None]
    logits = F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)
    logits = logits[..., : resized[0], : resized[1]]
    logits = F.interpolate(logits, size=original, mode="bilinear", align_corners=False)[0]

    masks = logits > 0
    areas = masks.sum((1, 2))
    confidence = (logits.sigmoid() * masks).sum((1, 2)) / (areas + 1e-6)
    scores = ranked * confidence
    kept = ((scores > min_score) & (areas > 0)).nonzero()[:, 0]
    labels = (pairs[kept] % classes).tolist()
    boxes = mask_boxes(masks[kept]).tolist()
    pixels = masks[kept].cpu().numpy()
    return [
        Detection(names[label], score, (x0, y0, x1, y1), mask)
        for label, score, (x0, y0, x1, y1), mask in zip(
            labels, scores[kept].tolist(), boxes, pixels, strict=True
        )
    ]


def mask_boxes(masks: Tensor) -> Tensor:
    """Boxes ``[N, 4]`` (x0, y0, x1, y1), ends exclusive, of non-empty ``masks: [N, H, W]``."""
    height, width = masks.shape[-2:]
    columns, rows = masks.any(-2).int(), masks.any(-1).int()
    x1 = width - columns.flip(-1).argmax(-1)
    y1 = height - rows.flip(-1).argmax(-1)
    return torch.stack([columns.argmax(-1), rows.argmax(-1), x1, y1], dim=-1)
