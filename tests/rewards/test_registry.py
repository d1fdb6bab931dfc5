"""Every registered reward through its configuration: plain options, tiny random weights on disk.

Scores are compared with what the reward's own tests compare with: another library, another
package's recorded scores, or a closed form.
"""

import hashlib
import io
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rewards import test_aesthetic as aesthetic_tests
from rewards import test_hpsv2 as hpsv2_tests
from rewards import test_imagereward as imagereward_tests
from rewards import test_ocr as ocr_tests
from rewards import test_unifiedreward as unifiedreward_tests
from rewards.conftest import CPU, PROMPTS, eight_bit, normalized, smooth_images
from rewards.geneval import conftest as geneval_conftest
from rewards.geneval.mmdet_names import TINY_DETECTOR, mmdet_state_dict
from torch import Tensor, nn

from diffusion_nft.images import Images
from diffusion_nft.rewards import REWARDS, build_reward, check_options, reward_class
from diffusion_nft.rewards.combine import RewardSet
from diffusion_nft.rewards.geneval import mask2former, scorer
from diffusion_nft.shapes.scene import Object, Scene, render_batch

# Fixtures of the rewards' own tests.
linears = aesthetic_tests.linears
recorded = hpsv2_tests.recorded
folder, weights = imagereward_tests.folder, imagereward_tests.weights
server = unifiedreward_tests.server
tiny_config, tiny_open_clip = geneval_conftest.tiny_config, geneval_conftest.tiny_clip


@dataclass
class Case:
    """``expected: [B]`` scores of ``images: [B, 3, H, W]`` and ``prompts`` with ``options``."""

    images: Tensor
    prompts: list[str]
    expected: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    metadata: list[dict] | None = None
    atol: float = 1e-6
    near: float | None = None  # tolerance in bfloat16; None: float32 only


@pytest.fixture
@torch.no_grad()
def geneval(tiny_config, tiny_open_clip, tmp_path, monkeypatch) -> Case:
    """A detector that finds six cats in every image, each of the size of the image."""
    state = mmdet_state_dict(version=2, **TINY_DETECTOR)
    state["panoptic_head.cls_embed.bias"][15] = 50
    for name in ("panoptic_head.mask_embed.4", "panoptic_head.pixel_decoder.mask_feature"):
        state[f"{name}.weight"].zero_()
        state[f"{name}.bias"].fill_(1)
    detector = tmp_path / "detector.pth"
    torch.save({"meta": {"epoch": 50}, "state_dict": state}, detector)
    # The reward has no options for its architectures.
    architecture, clip_weights = tiny_open_clip
    monkeypatch.setattr(mask2former, "swin_small_config", lambda: tiny_config)
    load = partial(scorer.ColorClassifier.load, architecture=architecture)
    monkeypatch.setattr(scorer.ColorClassifier, "load", load)

    # Black, cyan, white, black.
    images = torch.tensor([[0.0, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]])
    images = images[:, :, None, None].expand(-1, -1, 32, 32)
    colors = load(CPU, clip_weights)([eight_bit(image) for image in images], ["cat"] * 4)
    assert colors[1] != colors[2]
    clauses = [
        {"class": "cat", "count": 2},
        {"class": "cat", "count": 6, "color": colors[1]},
        {"class": "cat", "count": 6, "color": colors[1]},
        {"class": "dog", "count": 1},
    ]
    return Case(
        images,
        [""] * 4,
        # 1 - |2 - 6| / 2; number and colour; number alone; nothing.
        torch.tensor([-1, (1 + 1) / 2, (1 + 0) / 2, 0]),
        {
            "detector_weights": str(detector),
            "detector_sha256": hashlib.sha256(detector.read_bytes()).hexdigest(),
            "clip_weights": clip_weights,
            "channel_order": "rgb",
            "grading": "published",
            "dtype": "fp32",
            "batch_size": 2,
        },
        [{"tag": "colors", "prompt": "", "include": [clause]} for clause in clauses],
    )


@pytest.fixture
def ocr() -> Case:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    return Case(
        torch.cat([ocr_tests.image_of(text) for text in ("OPEN 24 HOURS", "Hello World")]),
        ['a sign "Open 25 Hours"', 'a mug "hello world"'],
        torch.tensor([1 - 1 / 11, 1]),
        {"backend": "rapidocr", "threads": 1},
    )


@pytest.fixture
def random_images() -> Tensor:
    """At CLIP's resolution, so that nothing is resized."""
    return smooth_images(4, 224, 224)


@pytest.fixture
def pixels(random_images) -> Tensor:
    return torch.cat([normalized(eight_bit(image)) for image in random_images])


@pytest.fixture
def pickscore(tiny_clip, reference_logits, random_images, pixels) -> Case:
    expected = reference_logits(PROMPTS, pixels).diagonal() / 26
    options = {"model": tiny_clip, "processor": tiny_clip, "dtype": "fp32", "batch_size": 3}
    return Case(random_images, PROMPTS, expected, options, atol=1e-5, near=0.1)


@pytest.fixture
def clipscore(tiny_clip, reference_logits, random_images, pixels) -> Case:
    expected = reference_logits(PROMPTS, pixels).diagonal() / 100
    options = {"model": tiny_clip, "dtype": "fp32", "batch_size": 3}
    return Case(random_images, PROMPTS, expected, options, near=0.03)


@pytest.fixture
@torch.no_grad()
def aesthetic(tiny_clip, linears, random_images, pixels, tmp_path) -> Case:
    from transformers import CLIPVisionModelWithProjection

    numbers = map(str, aesthetic_tests.NUMBERS)
    mlp = nn.Sequential(OrderedDict(zip(numbers, linears, strict=True)))
    file = tmp_path / "mlp.pth"
    torch.save({f"layers.{name}": value for name, value in mlp.state_dict().items()}, file)
    tower = CLIPVisionModelWithProjection.from_pretrained(tiny_clip).eval()
    embeds = tower(pixel_values=pixels).image_embeds
    expected = mlp(embeds / embeds.norm(dim=-1, keepdim=True))[:, 0]
    options = {"model": tiny_clip, "weights": str(file), "dtype": "fp32", "batch_size": 3}
    return Case(random_images, PROMPTS, expected, options, near=0.01)


@pytest.fixture
def hpsv2(recorded) -> Case:
    open_clip = pytest.importorskip("open_clip")
    open_clip.add_model_config(recorded / "small-hpsv2x.json")
    prompts = hpsv2_tests.RECORD["prompts"]
    image = hpsv2_tests.TENSORS["pictures/4"].permute(2, 0, 1) / 255
    return Case(
        image.expand(len(prompts), -1, -1, -1),
        prompts,
        torch.tensor(hpsv2_tests.RECORD["scores"][4]),
        {
            "backend": "open_clip",
            "model_name": "small-hpsv2x",
            "weights": str(recorded / hpsv2_tests.CHECKPOINT),
            "dtype": "fp32",
            "batch_size": 3,
        },
        atol=2e-6,
        near=0.03,
    )


@pytest.fixture
def imagereward(folder) -> Case:
    prompts = imagereward_tests.PROMPTS
    # Two images of one size, alternating.
    rows = [(6 + i % 2, i) for i in range(len(prompts))]
    return Case(
        torch.stack([imagereward_tests.IMAGES[image] for image, _ in rows]),
        prompts,
        torch.tensor([imagereward_tests.RECORD["scores"][image][i] for image, i in rows]),
        {
            "backend": "transformers",
            "weights": str(folder / "ImageReward.pt"),
            "tokenizer": str(folder / "bert"),
            # The only option that is not plain text.
            "config": imagereward_tests.golden_config(),
            "dtype": "fp32",
            "batch_size": 4,
        },
        atol=5e-6,
        near=0.1,
    )


@pytest.fixture
def unifiedreward(server) -> Case:
    marks = dict(zip(PROMPTS, (2, 5, 1.5, 3), strict=True))
    server.reply = lambda prompt, attempt: unifiedreward_tests.marked(marks[prompt])
    return Case(
        smooth_images(4, 8, 8),
        PROMPTS,
        torch.tensor([marks[prompt] / 5 for prompt in PROMPTS]),
        {
            "base_url": server.url,
            "api_key": unifiedreward_tests.KEY,
            "model": unifiedreward_tests.MODEL,
            "concurrency": 2,
            "timeout": 30,
            "max_retries": 0,
        },
    )


@pytest.fixture
def shapes() -> Case:
    """2, 3, 0 and 1 of three requested circles."""
    numbers = (2, 3, 0, 1)
    scenes = [Scene(tuple(Object("circle", "red", cell) for cell in range(n))) for n in numbers]
    caption = {"include": [{"class": "circle", "count": 3}]}
    expected = torch.tensor(numbers) / 3
    return Case(torch.from_numpy(render_batch(scenes)), [""] * 4, expected, metadata=[caption] * 4)


@pytest.fixture
def jpeg_compressibility() -> Case:
    """Noise of several strengths; scores by Pillow."""
    g = np.random.default_rng(0)
    pixels = [g.integers(0, top, (40, 56, 3), dtype=np.uint8) for top in (64, 255, 1)]
    sizes = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    return Case(images, [""] * 3, -torch.tensor(sizes) / 500_000)


@pytest.fixture
def jpeg_incompressibility(jpeg_compressibility) -> Case:
    jpeg_compressibility.expected *= -1
    return jpeg_compressibility


@pytest.fixture
def image_statistics() -> Case:
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    images = (images * 255).round() / 255  # as rewards see them
    expected = torch.from_numpy(images.numpy().mean(axis=(1, 2, 3)))
    return Case(images, [""] * 3, expected)


# The rewards, each with a fixture of its name.
CASES = (
    "geneval",
    "ocr",
    "pickscore",
    "clipscore",
    "hpsv2",
    "aesthetic",
    "imagereward",
    "unifiedreward",
    "shapes",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "image_statistics",
)


def test_every_registered_reward_has_a_case():
    assert set(CASES) == REWARDS.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_configured_reward_scores_every_image_in_order(name, request):
    case: Case = request.getfixturevalue(name)
    count = len(case.prompts)
    metadata = case.metadata or [{} for _ in range(count)]
    expected = case.expected.double()
    # Rows in another order would show.
    assert torch.pdist(expected[:, None]).min() > 10 * case.atol

    reward = RewardSet.build({name: 1.0}, CPU, options={name: case.options})
    images = Images.from_float(case.images)
    scores = reward(images, case.prompts, metadata)

    assert scores.total.shape == (count,) and bool(scores.total.isfinite().all())
    torch.testing.assert_close(scores.total, expected, rtol=0, atol=case.atol)
    assert torch.equal(scores.parts[name], scores.total)
    for i in range(count):
        alone = reward(images[i : i + 1], case.prompts[i : i + 1], metadata[i : i + 1])
        torch.testing.assert_close(alone.total, expected[i : i + 1], rtol=0, atol=case.atol)
    if case.near is not None:
        rough = build_reward(name, CPU, case.options | {"dtype": "bf16"})
        found = rough(case.images, case.prompts, metadata).scores
        assert found.dtype == torch.float32 and not torch.equal(found.double(), scores.total)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=case.near)
    # An unknown option is refused by naming the known ones.
    with pytest.raises(ValueError, match=f"^{name} has no option 'bath_size'; choose") as caught:
        build_reward(name, CPU, {**case.options, "bath_size": 8})
    known = str(caught.value).partition("choose from ")[2].split(", ")
    assert {"device", *case.options} <= set(known)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("hpsv2", {"backend": "clip"}, "must be one of open_clip, hpsv2x, not 'clip'"),
        ("imagereward", {"backend": "blip"}, "must be one of transformers, image-reward, not"),
        ("imagereward", {"backend": "image-reward", "dtype": "bf16"}, "in float32, not torch.bfl"),
        ("ocr", {"backend": "tesseract"}, "must be one of rapidocr, paddleocr, not 'tesseract'"),
        ("geneval", {"backend": "jax"}, "must be one of transformers, mmdet, not 'jax'"),
        ("geneval", {"channel_order": "bgr"}, "must be one of swapped, rgb, not 'bgr'"),
        ("geneval", {"grading": "kind"}, "must be one of published, bounded, not 'kind'"),
        ("geneval", {"batch_size": 0}, "must be a positive integer, not 0"),
    ],
)
def test_what_a_reward_cannot_do_is_told_before_anything_is_loaded(name, options, words):
    with pytest.raises(ValueError, match=words):
        build_reward(name, CPU, options)


def test_one_gpu_holds_the_rewards_of_several_ranks_only_if_it_is_said_to(monkeypatch):
    check_options("clipscore", {"device": "cuda:1"})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for device in ("cuda", "cpu", "shared:cuda:1"):
        check_options("clipscore", {"device": device})
    with pytest.raises(ValueError, match=r"each of the 8 processes.*'cuda'.*'shared:cuda:1'"):
        check_options("clipscore", {"device": "cuda:1"})
    assert build_reward("jpeg_compressibility", CPU, {"device": "shared:cpu"})


@pytest.mark.parametrize(
    ("name", "backend", "module", "command"),
    [
        ("ocr", "rapidocr", "rapidocr", r'pip install -e "\.\[ocr\]"'),
        ("ocr", "rapidocr", "onnxruntime", r'pip install -e "\.\[ocr\]"'),
        ("ocr", "paddleocr", "paddleocr", r"pip install paddlepaddle==2\.6\.2 paddleocr==2\.9\.1"),
        ("hpsv2", "open_clip", "open_clip", r'pip install -e "\.\[hpsv2\]"'),
        ("hpsv2", "hpsv2x", "hpsv2.src", r"separate environment.*pip install hpsv2x==1\.2\.0"),
        ("imagereward", "image-reward", "ImageReward", r"image-reward==1\.5 transformers==4\."),
    ],
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, name, backend, module, command):
    monkeypatch.setitem(sys.modules, module, None)
    weights = {} if name == "ocr" else {"weights": Path("absent")}
    with pytest.raises(ImportError, match=command):
        reward_class(name)(device=CPU, backend=backend, **weights)
