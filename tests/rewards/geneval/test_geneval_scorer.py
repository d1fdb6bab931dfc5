"""The reward as a whole: batches, components, errors, and the real loading of tiny weights."""

import hashlib
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
from mmdet_names import TINY_DETECTOR, mmdet_state_dict
from PIL import Image
from torch import Tensor, nn

from diffusion_nft.rewards.geneval import GenEvalReward, GenEvalScorer, mask2former, scorer
from diffusion_nft.rewards.geneval.colors import ColorClassifier
from diffusion_nft.rewards.geneval.detector import Detector
from diffusion_nft.rewards.geneval.verdict import Detection
from diffusion_nft.rewards.geneval.vocabulary import COLORS
from diffusion_nft.rewards.weights import ROOT_VARIABLE, WEIGHT_FILES

CPU = torch.device("cpu")
SIDE = 16
TAGS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]


def brightness_detector(images: Tensor) -> list[list[Detection]]:
    """A cat with the image's mean as its score."""
    box = (0, 0, SIDE, SIDE)
    mask = np.ones((SIDE, SIDE), dtype=bool)
    return [[Detection("cat", image.mean().item(), box, mask)] for image in images]


def mean_color(crops: Sequence[Image.Image], labels: Sequence[str]) -> list[str]:
    """Red or green, whichever the crop has more of."""
    assert set(labels) <= {"cat"}
    means = [np.array(crop).mean((0, 1)) for crop in crops]
    return ["red" if red > green else "green" for red, green, _ in means]


def images_of(*colors: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colors)[:, :, None, None].expand(-1, 3, SIDE, SIDE)


def line(tag: str, **clause: object) -> dict:
    return {"tag": tag, "include": [{"class": "cat", "count": 1, **clause}], "prompt": "a cat"}


def test_scores_and_components():
    bright_red, dull = (1.0, 0.9, 0.9), (0.6, 0.5, 0.5)
    metadata = [
        line("single_object"),
        line("colors", color="red"),
        line("colors", color="green"),
        line("counting"),
        line("counting"),
    ]
    images = images_of(bright_red, bright_red, bright_red, bright_red, dull)
    output = GenEvalScorer(brightness_detector, mean_color)(images, ["a cat"] * 5, metadata)
    # A cat of score 0.53 is a cat, but not one to be counted.
    assert output.scores.tolist() == [1, 1, 0.5, 1, 0]
    assert output.components["accuracy"].tolist() == [1, 1, 0, 1, 0]
    assert output.components["strict_accuracy"].tolist() == [1, 1, 0, 1, 0]
    assert list(output.components) == [
        "accuracy",
        "strict_accuracy",
        *(f"accuracy/{t}" for t in TAGS),
    ]
    by_tag = {tag: output.components[f"accuracy/{tag}"] for tag in TAGS}
    assert by_tag["colors"].nan_to_num(-1).tolist() == [-1, 1, 0, -1, -1]
    assert by_tag["counting"].nan_to_num(-1).tolist() == [-1, -1, -1, 1, 0]
    assert by_tag["position"].isnan().all()
    assert all(value.dtype == torch.float64 for value in (output.scores, *by_tag.values()))


def test_batch_size_does_not_change_scores():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(7, 3, 1, 1, generator=generator).expand(-1, -1, SIDE, SIDE)
    metadata = [line("colors", color="red")] * 7
    outputs = [
        GenEvalScorer(brightness_detector, mean_color, batch_size=size)(images, [""] * 7, metadata)
        for size in (1, 3, 7, 100)
    ]
    assert len(set(outputs[0].scores.tolist())) > 1
    assert all(torch.equal(output.scores, outputs[0].scores) for output in outputs)


class CatEverywhere(nn.Module):
    """Finds one cat that fills the image; counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.batches.append(len(pixels))
        classes = torch.zeros(len(pixels), 1, 81)
        classes[:, :, 15] = 20
        return classes, torch.full((len(pixels), 1, 8, 8), 9.0)


def test_one_pass_of_each_model_a_micro_batch(tiny_colors, monkeypatch):
    crops, texts = [], []
    clip = tiny_colors.clip
    encode_image, encode_text = clip.encode_image, clip.encode_text
    monkeypatch.setattr(clip, "encode_image", lambda x: crops.append(len(x)) or encode_image(x))
    monkeypatch.setattr(clip, "encode_text", lambda x: texts.append(len(x)) or encode_text(x))
    network = CatEverywhere()
    score = GenEvalScorer(Detector(network, CPU, short_side=32), tiny_colors, batch_size=16)
    # Two of three lines ask for a colour: 42 of 64.
    lines = [line("colors", color=COLORS[i % 10]) if i % 3 else line("counting") for i in range(64)]
    output = score(torch.rand(64, 3, 1, 1).expand(-1, -1, 512, 512), [""] * 64, lines)
    assert network.batches == [16] * 4
    assert len(crops) == 4
    assert sum(crops) == sum(i % 3 > 0 for i in range(64)) == 42
    assert texts == [30]
    assert output.scores.shape == (64,)

    score(torch.rand(20, 3, SIDE, SIDE), [""] * 20, [line("counting")] * 20)
    assert network.batches[4:] == [16, 4]
    assert len(crops) == 4


def test_grading_is_passed_on():
    def four_cats(images: Tensor) -> list[list[Detection]]:
        cat = brightness_detector(images)
        return [[found[0]] * 4 for found in cat]

    images, metadata = images_of((1.0, 1.0, 1.0)), [line("single_object")]
    published = GenEvalScorer(four_cats, mean_color)
    bounded = GenEvalScorer(four_cats, mean_color, grading="bounded")
    assert published(images, [""], metadata).scores.tolist() == [-2]
    assert bounded(images, [""], metadata).scores.tolist() == [0]


def test_no_images_and_errors():
    score = GenEvalScorer(brightness_detector, mean_color)
    output = score(torch.zeros(0, 3, 8, 8), [], [])
    assert output.scores.shape == output.components["accuracy/colors"].shape == (0,)
    images = images_of((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="2 images, 2 prompts, 1 metadata lines"):
        score(images, ["", ""], [line("colors")])
    with pytest.raises(ValueError, match="class 'unicorn' is unknown"):
        score(
            images, ["", ""], [line("colors"), line("colors") | {"include": [{"class": "unicorn"}]}]
        )


@pytest.fixture
def tiny_weights(tmp_path, tiny_config, tiny_clip, monkeypatch):
    """A tiny detector in place of the published checkpoint, its sha256, and a tiny CLIP."""
    source = mmdet_state_dict(version=2, **TINY_DETECTOR)
    source["panoptic_head.cls_embed.bias"][15] = 50.0
    path = tmp_path / WEIGHT_FILES["geneval"].file_name
    torch.save({"meta": {"epoch": 50}, "state_dict": source}, path)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(mask2former, "swin_small_config", lambda: tiny_config)
    load = partial(ColorClassifier.load, architecture=tiny_clip[0])
    monkeypatch.setattr(scorer.ColorClassifier, "load", load)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_reward_from_its_weights(tiny_weights, tiny_clip):
    options = {"detector_sha256": tiny_weights[1][:8], "clip_weights": tiny_clip[1]}
    reward = GenEvalReward(CPU, **options)
    ramp = torch.linspace(0, 1, 24).expand(2, 3, 24, 24)
    output = reward(ramp, ["", ""], [line("single_object"), line("colors", color="red")])
    assert all(math.isfinite(score) for score in output.scores.tolist())
    assert reward.detect.sides == (800, 1333)
    assert reward.detect.channel_order == "swapped"
    assert reward.detect.dtype == reward.classify_colors.dtype == torch.float32
    explicit = GenEvalReward(
        CPU,
        detector_weights=tiny_weights[0],
        channel_order="rgb",
        dtype=torch.bfloat16,
        batch_size=3,
        **options,
    )
    assert explicit.detect.channel_order == "rgb"
    assert explicit.detect.dtype == explicit.classify_colors.dtype == torch.bfloat16
    assert explicit.batch_size == 3


def test_wrong_or_absent_detector(tiny_weights):
    with pytest.raises(ValueError, match=r"sha256 starts with .*not 743b7d99"):
        GenEvalReward(CPU)
    tiny_weights[0].unlink()
    with pytest.raises(FileNotFoundError, match="743b7d99"):
        GenEvalReward(CPU)
