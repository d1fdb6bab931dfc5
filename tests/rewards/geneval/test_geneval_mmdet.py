"""The mmdet backend with a fake mmdet of each generation: its input, and the reading of results.

The formats are those of mmdet 2.28.2 and 3.3.0, with which the backend itself has been run.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffusion_nft.rewards.geneval import GenEvalReward
from diffusion_nft.rewards.geneval.colors import ColorClassifier
from diffusion_nft.rewards.geneval.mmdet_detector import MmdetDetector

CPU = torch.device("cpu")
HEIGHT, WIDTH = 6, 8
# Class index, score and box of the objects that the fake finds, in the order of the queries.
OBJECTS = [
    (15, 0.9, (1, 2, 5, 6)),
    (0, 0.8, (0, 0, 8, 6)),
    (15, 0.95, (3, 0, 4, 1)),
    (66, 0.25, (0, 0, 1, 1)),
]


def mask_of(box: tuple[int, int, int, int]) -> np.ndarray:
    x0, y0, x1, y1 = box
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def result_2() -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Per class an array of boxes with scores, and a list of masks."""
    boxes, masks = [np.zeros((0, 5), np.float32) for _ in range(80)], [[] for _ in range(80)]
    for label, score, box in OBJECTS:
        boxes[label] = np.append(boxes[label], np.float32([[*box, score]]), axis=0)
        masks[label].append(mask_of(box))
    return boxes, masks


def result_3() -> SimpleNamespace:
    """A data sample."""
    labels, scores, boxes = zip(*OBJECTS, strict=True)
    instances = SimpleNamespace(
        labels=torch.tensor(labels),
        scores=torch.tensor(scores),
        bboxes=torch.tensor(boxes, dtype=torch.float32),
        masks=torch.from_numpy(np.stack([mask_of(box) for box in boxes])),
    )
    return SimpleNamespace(pred_instances=instances)


class FakeMmdet:
    """Stands in for mmdet in ``sys.modules``; remembers what it was called with.

    Its network has one parameter, ``parameter``.
    """

    def __init__(self, version: str, root: Path, result: Callable[[], object], parameter: str):
        self.result, self.parameter = result, parameter
        self.arrays: list[np.ndarray] = []
        self.package, self.apis = ModuleType("mmdet"), ModuleType("mmdet.apis")
        vars(self.package).update(__version__=version, __path__=[str(root / "mmdet")])
        vars(self.apis).update(
            init_detector=self.init_detector, inference_detector=self.inference_detector
        )

    def init_detector(self, config: Path, *, device: str) -> nn.Module:
        self.config, self.device = config, device
        self.network = module = nn.Module()
        *path, last = self.parameter.split(".")
        for part in path:
            module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(torch.zeros(3)))
        return self.network

    def inference_detector(self, network: nn.Module, arrays: list[np.ndarray]) -> list[object]:
        assert network is self.network
        self.arrays = arrays
        return [self.result() for _ in arrays]


NAME_2 = "panoptic_head.transformer_decoder.layers.0.attentions.0.attn.in_proj_bias"
NAME_3 = "panoptic_head.transformer_decoder.layers.0.cross_attn.attn.in_proj_bias"


@pytest.fixture(params=["2.28.2", "3.3.0"])
def fake(request, tmp_path, monkeypatch):
    formats = {"2.28.2": (result_2, NAME_2), "3.3.0": (result_3, NAME_3)}
    fake = FakeMmdet(request.param, tmp_path, *formats[request.param])
    monkeypatch.setitem(sys.modules, "mmdet", fake.package)
    monkeypatch.setitem(sys.modules, "mmdet.apis", fake.apis)
    return fake


@pytest.fixture
def weights(tmp_path):
    """A checkpoint with the names of mmdet 2, as published."""
    path = tmp_path / "detector.pth"
    torch.save({"meta": {}, "state_dict": {NAME_2: torch.tensor([1.0, 2.0, 3.0])}}, path)
    return path


def test_published_weights_fill_either_network(fake, weights):
    MmdetDetector(weights, torch.device("cuda", 1), sha256=None)
    assert fake.network.get_parameter(fake.parameter).tolist() == [1, 2, 3]
    assert fake.device == "cuda:1"
    folder = Path(fake.package.__path__[0]) / ".mim" / "configs" / "mask2former"
    name = {
        NAME_2: "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py",
        NAME_3: "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py",
    }[fake.parameter]
    assert fake.config == folder / name


def test_results_become_detections(fake, weights):
    detect = MmdetDetector(weights, CPU, sha256=None)
    both = detect(torch.zeros(2, 3, HEIGHT, WIDTH))
    assert len(both) == 2
    for found in both:
        found.sort(key=lambda detection: detection.score)
        # The keyboard of score 0.25 is below GenEval's lowest threshold.
        assert [d.label for d in found] == ["person", "cat", "cat"]
        assert [d.score for d in found] == pytest.approx([0.8, 0.9, 0.95])
        boxes = [(0, 0, 8, 6), (1, 2, 5, 6), (3, 0, 4, 1)]
        assert [d.box for d in found] == boxes
        for detection, box in zip(found, boxes, strict=True):
            assert np.array_equal(detection.mask, mask_of(box))
            assert detection.mask.dtype == bool


@pytest.mark.parametrize(("order", "seen"), [("swapped", [10, 20, 30]), ("rgb", [30, 20, 10])])
def test_channel_order(fake, weights, order, seen):
    """mmdet takes arrays for BGR; published rewards hand it RGB."""
    image = torch.tensor([10.0, 20.0, 30.0])[None, :, None, None].expand(1, 3, HEIGHT, WIDTH) / 255
    MmdetDetector(weights, CPU, sha256=None, channel_order=order)(image)
    (array,) = fake.arrays
    assert array.shape == (HEIGHT, WIDTH, 3)
    assert array.dtype == np.uint8
    assert (array == np.array(seen)).all()


def test_the_reward_with_this_backend(fake, weights, monkeypatch):
    """Colours and verdict are those of any backend."""
    seen = []

    def classify(crops: Sequence[Image.Image], labels: Sequence[str]) -> list[str]:
        seen.extend((crop.size, label) for crop, label in zip(crops, labels, strict=True))
        return ["red"] * len(crops)

    monkeypatch.setattr(ColorClassifier, "load", lambda *args, **options: classify)
    reward = GenEvalReward(CPU, backend="mmdet", detector_weights=weights, detector_sha256=None)
    cats = {"class": "cat", "count": 2, "color": "red"}
    line = {"tag": "colors", "prompt": "two red cats", "include": [cats]}
    output = reward(torch.rand(1, 3, HEIGHT, WIDTH), ["two red cats"], [line])
    assert output.scores.tolist() == output.components["accuracy"].tolist() == [1]
    assert seen == [((1, 1), "cat"), ((4, 4), "cat")]


def test_what_does_not_fit_is_refused(fake, weights):
    with pytest.raises(ValueError, match="not 743b7d99"):
        MmdetDetector(weights, CPU)
    with pytest.raises(ValueError, match=r"computes in float32, not torch\.float16"):
        MmdetDetector(weights, CPU, sha256=None, dtype=torch.float16)
    torch.save({"state_dict": {f"{NAME_2}x": torch.ones(3)}}, weights)
    with pytest.raises(ValueError, match=r"(?s)does not fit: .*in_proj_biasx"):
        MmdetDetector(weights, CPU, sha256=None)


INSTALL = r"pip install --no-build-isolation mmcv-full==1\.7\.2 mmdet==2\.28\.2 .*mmdet==3\.3\.0"


def test_without_mmdet(weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "mmdet", None)
    with pytest.raises(ImportError, match=INSTALL):
        GenEvalReward(CPU, backend="mmdet", detector_weights=weights, detector_sha256=None)


def test_another_mmdet(fake, weights):
    vars(fake.package)["__version__"] = "1.2.0"
    with pytest.raises(ImportError, match=rf"{INSTALL}\), not mmdet 1\.2\.0"):
        MmdetDetector(weights, CPU, sha256=None)
