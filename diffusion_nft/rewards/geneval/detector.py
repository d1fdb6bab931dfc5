"""The object detector around Mask2Former: mmdet's preparation of images and reading of logits.

Not transformers' ``post_process_instance_segmentation``, which merges masks at 384 x 384 and so
gives other scores and other boxes than the benchmark's.
"""

from typing import Literal, get_args

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
# What the published configuration of mmdet 2.x pads with, before it normalises.
PADDING = 128
MAX_CANDIDATES = 100

# "swapped": the network sees blue, green, red, as it does in the published trainers' reward, which
# hand RGB arrays to mmdet, where arrays count as BGR.  "rgb": what the network was trained on, and
# what the benchmark's own script does, which reads files.
ChannelOrder = Literal["swapped", "rgb"]
CHANNEL_ORDERS: tuple[str, ...] = get_args(ChannelOrder)


class Detector:
    """Images -> objects, one pass of the network a call.

    ``network``: normalised pixels ``[B, 3, H, W]`` -> class logits ``[B, Q, classes + 1]`` and mask
    logits ``[B, Q, h, w]``.  Objects scoring at most ``min_score`` are left out (0.3, the lowest
    threshold of GenEval).  ``dtype`` below float32: the network runs under autocast.  Raises
    ImportError without OpenCV.
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
        check_channel_order(channel_order)
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
        """The objects in each of ``images: [B, 3, H, W] in [0, 1]``, most probable class first."""
        height, width = images.shape[-2:]
        resized = resized_size(height, width, *self.sides)
        pixels = prepare(images.to(self.device), resized, self.channel_order)
        # Not a cast: bfloat16 cannot tell neighbouring sampling points of wide images apart.
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


def check_channel_order(order: str) -> None:
    """Raises ValueError, naming the choices, if ``order`` is no ChannelOrder."""
    if order not in CHANNEL_ORDERS:
        known = ", ".join(CHANNEL_ORDERS)
        raise ValueError(f"channel order {order!r} is unknown; choose from {known}")


def resized_size(
    height: int, width: int, short_side: int = SHORT_SIDE, long_side: int = LONG_SIDE
) -> tuple[int, int]:
    """The size at which the network sees an image: short side 800, but long side at most 1333.

    ``int(side * scale + 0.5)`` with one scale for both sides (mmcv's ``rescale_size``).
    """
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def prepare(images: Tensor, resized: tuple[int, int], channel_order: ChannelOrder) -> Tensor:
    """``images: [B, 3, H, W] in [0, 1]`` -> the network's input, at ``resized`` plus padding.

    8 bits, resized by OpenCV, grey of 128 to the right and at the bottom up to multiples of 32,
    then (x - mean) / std in 0..255.  Source: ``test_pipeline`` of mmdet 2.28's
    mask2former_r50_lsj_8x2_50e_coco.py, which the published configuration inherits.  Not torch's
    bilinear resize: OpenCV's, in integers, rounds about one value in ten to the other neighbour.
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
    """One image's objects, as mmdet's MaskFormerFusionHead.instance_postprocess has them.

    ``class_logits: [Q, classes + 1]``; ``mask_logits: [Q, h, w]``, brought to the ``padded``
    input's size, cut to the ``resized`` image and brought to the ``original`` size.  The 100 most
    probable (query, class) pairs become objects: mask = logit > 0, score = probability x mean
    sigmoid in the mask, box (x0, y0, x1 + 1, y1 + 1) around it.  Kept if score > ``min_score`` and
    the mask is not empty; most probable class first, equal ones in the order of the queries.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1].flatten()
    ranked, pairs = probabilities.sort(descending=True, stable=True)
    # The mask only lowers the probability, so that most pairs need no mask at all; the margin is
    # for rounding.
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
    """``[N, 4]``: (x0, y0, x1, y1), ends exclusive, around non-empty ``masks: [N, H, W]``."""
    height, width = masks.shape[-2:]
    columns, rows = masks.any(-2).int(), masks.any(-1).int()
    x1 = width - columns.flip(-1).argmax(-1)
    y1 = height - rows.flip(-1).argmax(-1)
    return torch.stack([columns.argmax(-1), rows.argmax(-1), x1, y1], dim=-1)
