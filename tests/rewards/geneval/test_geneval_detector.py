"""Preparation of images and reading of logits, against mmdet's formulas.

test_geneval_golden.py compares the network's input and what is found in it with mmdet itself.
"""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet_names import TINY_DETECTOR, mmdet_state_dict
from torch import Tensor, nn

from diffusion_nft.rewards.geneval.detector import (
    Detector,
    prepare,
    read_detections,
    resized_size,
)
from diffusion_nft.rewards.geneval.mask2former import Mask2Former
from diffusion_nft.rewards.geneval.mask2former_weights import convert

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (800, 800)),
        ((1024, 1024), (800, 800)),
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        # The long side rules: scale 1333 / 1200, and 666.5 is rounded up.
        ((600, 1200), (667, 1333)),
        ((100, 1000), (133, 1333)),
    ],
)
def test_resized_size(size, expected):
    assert resized_size(*size) == expected


def test_shrinking_has_no_antialiasing():
    """One pixel of 4 x 4 is the mean of the middle 2 x 2, whatever lies around."""
    image = torch.zeros(1, 3, 4, 4)
    image[..., 1:3, 1:3] = 1
    got = prepare(image, (1, 1), "rgb")[0, 0, 0, 0]
    torch.testing.assert_close(got, torch.tensor((255 - 123.675) / 58.395))


def logits_of(probabilities: list[list[float]]) -> Tensor:
    """Class logits whose softmax is ``probabilities`` (the last one: no object)."""
    return torch.tensor(probabilities).log()


def test_score_mask_and_box_by_hand():
    masks = torch.full((2, 8, 10), -3.0)
    masks[0, 2:5, 3:9] = 2.0
    masks[0, 4, 8] = 0.0  # not above 0: outside
    masks[1, 7, 0] = 1.0
    size = (8, 10)
    found = read_detections(
        logits_of([[0.2, 0.7, 0.1], [0.6, 0.3, 0.1]]),
        masks,
        padded=size,
        resized=size,
        original=size,
        names=("cat", "dog"),
    )
    assert [(d.label, d.box) for d in found] == [("dog", (3, 2, 9, 5)), ("cat", (0, 7, 1, 8))]
    sigmoid = [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-1))]
    assert [d.score for d in found] == pytest.approx([0.7 * sigmoid[0], 0.6 * sigmoid[1]], abs=1e-5)
    assert found[0].mask is not None
    assert np.array_equal(found[0].mask, (masks[0] > 0).numpy())


def mmdet_postprocess(
    mask_cls: Tensor, mask_pred: Tensor, padded: tuple, resized: tuple, original: tuple
) -> list[tuple[int, float, tuple]]:
    """mmdet's formula, pair by pair: (class, score, box) of all pairs with a mask."""
    up = F.interpolate(mask_pred[None], padded, mode="bilinear", align_corners=False)[0]
    up = up[:, : resized[0], : resized[1]]
    up = F.interpolate(up[:, None], original, mode="bilinear", align_corners=False)[:, 0]
    result = []
    for query, probabilities in enumerate(F.softmax(mask_cls, dim=-1)[:, :-1].tolist()):
        inside = up[query] > 0
        if not inside.any():
            continue
        confidence = up[query][inside].double().sigmoid().mean().item()
        ys, xs = np.nonzero(inside.numpy())
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        result += [(k, p * confidence, box) for k, p in enumerate(probabilities)]
    return result


@pytest.mark.parametrize("min_score", [0.0, 0.3])
def test_same_as_mmdets_formula_on_random_logits(min_score):
    generator = torch.Generator().manual_seed(3)
    classes = 3 * torch.randn(12, 6, generator=generator)
    masks = 2 * torch.randn(12, 8, 16, generator=generator)
    geometry = {"padded": (32, 64), "resized": (24, 40), "original": (12, 20)}
    names = ("a", "b", "c", "d", "e")
    found = read_detections(classes, masks, **geometry, min_score=min_score, names=names)
    expected = [e for e in mmdet_postprocess(classes, masks, **geometry) if e[1] > min_score]
    assert len(expected) == (60 if min_score == 0 else len(found)) > 3
    got = sorted((names.index(d.label), d.score, d.box) for d in found)
    for ours, theirs in zip(got, sorted(expected), strict=True):
        assert (ours[0], ours[2]) == (theirs[0], theirs[2])
        assert ours[1] == pytest.approx(theirs[1], abs=1e-5)


def test_at_most_100_candidates_and_equal_ones_in_order():
    size = (2, 2)
    found = read_detections(
        torch.zeros(60, 3),
        torch.ones(60, 2, 2),
        padded=size,
        resized=size,
        original=size,
        min_score=0.1,
        names=("cat", "dog"),
    )
    assert len(found) == 100
    assert [d.label for d in found] == ["cat", "dog"] * 50


def test_nothing_found():
    size = (4, 4)
    geometry = {"padded": size, "resized": size, "original": size, "names": ("cat",)}
    assert read_detections(logits_of([[0.3, 0.7]]), torch.ones(1, 4, 4), **geometry) == []
    assert read_detections(logits_of([[0.9, 0.1]]), -torch.ones(1, 4, 4), **geometry) == []


class Constant(nn.Module):
    """Finds object 15 (a cat) in the left half of every image; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.inputs.append(pixels)
        batch, _, height, width = pixels.shape
        classes = torch.zeros(batch, 1, 81)
        classes[:, :, 15] = 20
        masks = torch.full((batch, 1, height // 4, width // 4), -9.0)
        masks[..., : width // 8] = 9.0
        return classes, masks


def test_without_opencv_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[geneval\]"'):
        Detector(Constant(), CPU)


def test_one_pass_a_batch():
    network = Constant()
    found = Detector(network, CPU, short_side=64)(torch.rand(5, 3, 16, 16))
    assert [x.shape for x in network.inputs] == [(5, 3, 64, 64)]
    assert [[(d.label, d.box) for d in one] for one in found] == [[("cat", (0, 0, 8, 16))]] * 5


def test_channel_order_of_the_detector():
    image = torch.rand(1, 3, 32, 32)
    seen = {}
    for order in ("swapped", "rgb"):
        network = Constant()
        Detector(network, CPU, channel_order=order, short_side=32)(image)
        mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
        seen[order] = network.inputs[0] * std[:, None, None] + mean[:, None, None]
    torch.testing.assert_close(seen["rgb"], (image * 255).round(), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen["swapped"], seen["rgb"].flip(1), atol=1e-3, rtol=0)


@pytest.fixture
def tiny_network(tiny_config):
    """The real architecture, tiny and random."""
    source = mmdet_state_dict(version=3, **TINY_DETECTOR)
    source["panoptic_head.cls_embed.weight"] *= 6  # until it is sure enough to find things
    network = Mask2Former(tiny_config)
    network.load_state_dict(convert(source, network.state_dict()))
    return network


def ramps() -> Tensor:
    ramp = torch.linspace(0, 1, 40)
    return torch.stack([ramp.expand(3, 24, 40), 1 - ramp.expand(3, 24, 40)])


def test_float16_finds_the_same(tiny_network):
    options = {"short_side": 64, "long_side": 100, "min_score": 0.27}
    exact = Detector(tiny_network, CPU, **options)(ramps())
    computed = []
    tiny_network.class_predictor.register_forward_hook(lambda *call: computed.append(call[2].dtype))
    close = Detector(tiny_network, CPU, dtype=torch.float16, **options)(ramps())
    assert computed == [torch.float16]
    for found, expected in zip(close, exact, strict=True):
        assert len(found) >= 3
        # By label: objects of nearly the same score may change places.
        got, wanted = (sorted((d.label, d.score) for d in objects) for objects in (found, expected))
        assert [label for label, _ in got] == [label for label, _ in wanted]
        # Measured: at most 0.037.
        assert [score for _, score in got] == pytest.approx([s for _, s in wanted], abs=0.05)


def test_a_batch_is_its_images_one_by_one(tiny_network):
    images = ramps()
    detector = Detector(tiny_network, CPU, short_side=64, long_side=100, min_score=0.1)
    together = detector(images)
    assert min(len(found) for found in together) > 0
    for image, found in zip(images, together, strict=True):
        alone = detector(image[None])[0]
        assert [(d.label, d.box) for d in alone] == [(d.label, d.box) for d in found]
        assert [d.score for d in alone] == pytest.approx([d.score for d in found], abs=1e-5)
