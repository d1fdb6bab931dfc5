"""GenEval as a reward: detection, colours and verdicts in micro-batches."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from diffusion_nft.images import to_pil
from diffusion_nft.rewards import RewardOutput
from diffusion_nft.rewards.geneval.colors import ColorClassifier, object_crop
from diffusion_nft.rewards.geneval.detector import ChannelOrder, Detector
from diffusion_nft.rewards.geneval.mask2former_weights import PUBLISHED_SHA256
from diffusion_nft.rewards.geneval.mmdet_detector import MmdetDetector
from diffusion_nft.rewards.geneval.verdict import (
    Colors,
    Detection,
    Grading,
    Verdict,
    judge,
    objects_to_color,
    select_objects,
)
from diffusion_nft.rewards.geneval.vocabulary import TAGS, check_metadata
from diffusion_nft.rewards.weights import weight_file

# Images [B, 3, H, W] in [0, 1] -> objects of each.
Detect = Callable[[Tensor], list[list[Detection]]]


class GenEvalScorer:
    """GenEval's graded score with any detector and colour classifier.

    ``classify_colors``: crops and their class names -> colours.  Detector and classifier are called
    at most once per ``batch_size`` images.
    """

    def __init__(
        self,
        detect: Detect,
        classify_colors: Callable[[Sequence[Image.Image], Sequence[str]], list[str]],
        *,
        grading: Grading = "published",
        batch_size: int = 16,
    ):
        self.detect = detect
        self.classify_colors = classify_colors
        self.grading: Grading = grading
        self.batch_size = batch_size

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        """Graded scores: at most 1 and, as published, possibly negative.

        Components, 0 or 1: ``accuracy`` (the benchmark's), ``strict_accuracy``, and per tag
        ``accuracy/<tag>``, NaN for images of other tags.  The benchmark's overall score is the mean
        of the six tags' means.  Raises ValueError for invalid metadata.
        """
        if not len(images) == len(prompts) == len(metadata):
            lengths = (
                f"{len(images)} images, {len(prompts)} prompts, {len(metadata)} metadata lines"
            )
            raise ValueError(f"one prompt and one metadata line per image, not {lengths}")
        for line in metadata:
            check_metadata(line)
        verdicts: list[Verdict] = []
        for start in range(0, len(images), self.batch_size):
            end = start + self.batch_size
            verdicts += self._judge_batch(images[start:end], metadata[start:end])

        accuracy = torch.tensor([v.accuracy for v in verdicts], dtype=torch.float64)
        strict = torch.tensor([v.strict_accuracy for v in verdicts], dtype=torch.float64)
        components = {"accuracy": accuracy, "strict_accuracy": strict}
        for tag in TAGS:
            of_tag = torch.tensor([line["tag"] == tag for line in metadata], dtype=torch.bool)
            components[f"accuracy/{tag}"] = accuracy.masked_fill(~of_tag, torch.nan)
        scores = torch.tensor([v.score for v in verdicts], dtype=torch.float64)
        return RewardOutput(scores, components)

    def _judge_batch(self, images: Tensor, metadata: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        found = [
            select_objects(detections, line["tag"])
            for detections, line in zip(self.detect(images), metadata, strict=True)
        ]
        colors = self._colors(images, found, metadata)
        return [
            judge(objects, colors, line, self.grading)
            for objects, line in zip(found, metadata, strict=True)
        ]

    def _colors(
        self,
        images: Tensor,
        found: Sequence[Mapping[str, Sequence[Detection]]],
        metadata: Sequence[Mapping[str, Any]],
    ) -> Colors:
        """Colours of the ``objects_to_color`` of all images."""
        crops: dict[Detection, Image.Image] = {}
        for image, objects, line in zip(images, found, metadata, strict=True):
            asked = objects_to_color(objects, line)
            if asked:
                pil_image = to_pil(image[None])[0]
                crops |= {detection: object_crop(pil_image, detection) for detection in asked}
        if not crops:
            return {}
        labels = [detection.label for detection in crops]
        colors = self.classify_colors(list(crops.values()), labels)
        return dict(zip(crops, colors, strict=True))


class GenEvalReward(GenEvalScorer):
    """GenEval's graded score with the benchmark's models: Mask2Former Swin-S and CLIP ViT-L/14.

    ``backend``: package that runs the detector.  ``detector_weights``: mmdet's checkpoint (default:
    the file in reward_ckpts), whose sha256 must start with ``detector_sha256`` (None: not checked).
    ``clip_weights``: a name or file for open_clip.  ``channel_order``: "swapped" as in published
    training runs, "rgb" as in the benchmark's script.  ``grading``: "bounded" keeps every term of
    the score in [0, 1].  ``dtype``: of both models; mmdet supports float32 only.  Raises
    FileNotFoundError, ImportError or ValueError for missing or wrong files and packages.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        backend: Literal["transformers", "mmdet"] = "transformers",
        detector_weights: Path | None = None,
        detector_sha256: str | None = PUBLISHED_SHA256,
        clip_weights: str = "openai",
        channel_order: ChannelOrder = "swapped",
        grading: Grading = "published",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ):
        path = detector_weights or weight_file("geneval")
        super().__init__(
            BACKENDS[backend](
                path, device, sha256=detector_sha256, channel_order=channel_order, dtype=dtype
            ),
            ColorClassifier.load(device, clip_weights, dtype=dtype),
            grading=grading,
            batch_size=batch_size,
        )


def _transformers_detector(
    weights: Path,
    device: torch.device,
    *,
    sha256: str | None,
    channel_order: ChannelOrder,
    dtype: torch.dtype,
) -> Detector:
    # Imported here, so that a server without transformers can import this module.
    from diffusion_nft.rewards.geneval.mask2former import load_mask2former

    network = load_mask2former(weights, sha256)
    return Detector(network, device, channel_order=channel_order, dtype=dtype)


# backend -> builder of its detector.
BACKENDS: dict[str, Callable[..., Detect]] = {
    "transformers": _transformers_detector,
    "mmdet": MmdetDetector,
}
