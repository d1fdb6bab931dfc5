"""The object detector run by mmdet 2.x or 3.x, in an environment with mmcv."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_nft.images import to_uint8
from diffusion_nft.rewards.geneval.detector import ChannelOrder
from diffusion_nft.rewards.geneval.mask2former_weights import (
    PUBLISHED_SHA256,
    load_mmdet_state_dict,
    mmdet3_name,
)
from diffusion_nft.rewards.geneval.verdict import SCORE_THRESHOLD, Detection
from diffusion_nft.rewards.geneval.vocabulary import OBJECT_NAMES
from diffusion_nft.rewards.weights import load_weights

INSTALL = (
    "the mmdet backend of the geneval reward needs mmdet with mmcv's operators, in a separate "
    'environment: pip install "setuptools<81" wheel, then pip install --no-build-isolation '
    "mmcv-full==1.7.2 mmdet==2.28.2 (or mmcv==2.1.0 mmdet==3.3.0)"
)

# Class index, score, box (x0, y0, x1, y1) and mask of one object.
Found = Iterable[tuple[int, float, list[float], Any]]


class MmdetDetector:
    """Finds the objects in images with mmdet's ``inference_detector``; see ``Detector``.

    Published rewards ran mmdet 2.x.  3.x does not round resized values, pads with the mean instead
    of grey, and processes images one by one.

    ``weights``: the published checkpoint, with the names of mmdet 2.x or 3.x, for the configuration
    that mmdet ships.  Raises ImportError without mmdet 2.x or 3.x, FileNotFoundError, and
    ValueError if the weights are damaged or do not fit, or for another ``dtype`` than float32.
    """

    def __init__(
        self,
        weights: Path,
        device: torch.device,
        *,
        sha256: str | None = PUBLISHED_SHA256,
        channel_order: ChannelOrder = "swapped",
        dtype: torch.dtype = torch.float32,
    ):
        if dtype != torch.float32:
            raise ValueError(f"the mmdet backend computes in float32, not {dtype}")
        try:
            import mmdet  # pyright: ignore[reportMissingImports]
            from mmdet.apis import (  # pyright: ignore[reportMissingImports]
                inference_detector,
                init_detector,
            )
        except ImportError as error:
            raise ImportError(f"{INSTALL}: {error}") from error
        generation = mmdet.__version__.split(".")[0]
        if generation not in GENERATIONS:
            raise ImportError(f"{INSTALL}, not mmdet {mmdet.__version__}")
        shipped, self._read = GENERATIONS[generation]
        state = load_mmdet_state_dict(weights, sha256)
        if generation == "3":
            state = {mmdet3_name(name): tensor for name, tensor in state.items()}
        folder = Path(mmdet.__path__[0]) / ".mim" / "configs" / "mask2former"
        # Without the checkpoint: mmdet would unpickle it and accept names that do not fit.
        self.model = init_detector(folder / shipped, device=str(device))
        load_weights(self.model, state, weights)
        self._infer = inference_detector
        self.channel_order: ChannelOrder = channel_order

    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """Objects in each of ``images: [B, 3, H, W] in [0, 1]``, in mmdet's order."""
        pixels = to_uint8(images)
        # mmdet expects BGR arrays.
        if self.channel_order == "rgb":
            pixels = pixels.flip(1)
        arrays = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return [
            [
                Detection(OBJECT_NAMES[label], score, (x0, y0, x1, y1), mask)
                for label, score, (x0, y0, x1, y1), mask in self._read(result)
                if score > SCORE_THRESHOLD
            ]
            for result in self._infer(self.model, list(arrays))
        ]


def _read_2(result: Any) -> Found:
    """Reads, per class, boxes ``[n, 5]`` with the score last, and a list of n masks."""
    boxes, masks = result
    return [
        (label, score, box, mask)
        for label in range(len(boxes))
        for (*box, score), mask in zip(boxes[label].tolist(), masks[label], strict=True)
    ]


def _read_3(result: Any) -> Found:
    """Reads the ``pred_instances`` of a DetDataSample."""
    found = result.pred_instances
    masks = found.masks.cpu().numpy()
    return zip(
        found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist(), masks, strict=True
    )


# Major version of mmdet -> file of the published configuration, and reader of results.
GENERATIONS: dict[str, tuple[str, Callable[[Any], Found]]] = {
    "2": ("mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py", _read_2),
    "3": ("mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py", _read_3),
}
