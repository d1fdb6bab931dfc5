"""Colours: crops pixel by pixel, and the classifier against CLIP called prompt by prompt."""

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from PIL import Image
from torch import Tensor, nn

from diffusion_nft.rewards.geneval.colors import ARCHITECTURE, ColorClassifier, object_crop
from diffusion_nft.rewards.geneval.verdict import Detection
from diffusion_nft.rewards.geneval.vocabulary import COLORS

CPU = torch.device("cpu")


def random_crops(number: int) -> list[Image.Image]:
    """Of many sizes and colours, with some noise."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(5, 60, (number, 2))
    return [
        Image.fromarray(
            generator.integers(0, 206, 3, dtype=np.uint8)
            + generator.integers(0, 50, (height, width, 3), dtype=np.uint8)
        )
        for height, width in sizes
    ]


def test_crop_shows_the_object_on_grey():
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    mask = np.zeros((6, 8), dtype=bool)
    mask[2:4, 3:7] = True
    mask[2, 3] = False
    crop = object_crop(Image.fromarray(pixels), Detection("cat", 0.9, (3, 2, 7, 4), mask))
    expected = pixels[2:4, 3:7].copy()
    expected[0, 0] = 0x99
    assert np.array_equal(np.array(crop), expected)


def test_crop_without_mask_and_with_fractions():
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    crop = object_crop(Image.fromarray(pixels), Detection("cat", 0.9, (2.6, 1.4, 6.7, 4.2)))
    assert np.array_equal(np.array(crop), pixels[1:4, 3:7])


def test_same_as_clip_prompt_by_prompt(tiny_colors):
    crops, labels = random_crops(24), ["cat", "traffic light", "cup"] * 8
    got = tiny_colors(crops, labels)

    clip, tokenize = tiny_colors.clip, open_clip.get_tokenizer("geneval-tiny-quickgelu")
    expected = []
    with torch.no_grad():
        for crop, label in zip(crops, labels, strict=True):
            image = clip.encode_image(tiny_colors.preprocess(crop)[None])[0]
            scores = []
            for color in COLORS:
                prompts = [
                    f"a photo of a {color} {label}",
                    f"a photo of a {color}-colored {label}",
                    f"a photo of a {color} object",
                ]
                texts = [clip.encode_text(tokenize([prompt]))[0] for prompt in prompts]
                mean = sum(text / text.norm() for text in texts) / 3
                scores.append((image / image.norm() @ mean / mean.norm()).item())
            expected.append(COLORS[int(np.argmax(scores))])
    assert got == expected
    assert len(set(got)) > 1


def test_lower_precision(tiny_clip, tiny_colors):
    name, weights = tiny_clip
    half = ColorClassifier.load(CPU, weights, name, torch.bfloat16)
    assert {p.dtype for p in half.clip.parameters()} == {torch.bfloat16}
    crops, labels = random_crops(24), ["cat", "traffic light", "cup"] * 8
    same = [a == b for a, b in zip(half(crops, labels), tiny_colors(crops, labels), strict=True)]
    # Measured: all 24.
    assert sum(same) >= 22


def test_preparation_is_clips(tiny_colors):
    """Short side bicubic, centre crop, OpenAI's mean and deviation."""
    crop = Image.new("RGB", (64, 32), (255, 0, 51))
    got = tiny_colors.preprocess(crop)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    expected = (torch.tensor([1.0, 0.0, 0.2]) - mean) / std
    torch.testing.assert_close(got, expected[:, None, None].expand(3, 32, 32))


def test_text_features_are_computed_once(tiny_colors, monkeypatch):
    texts, images = [], []
    encode_text, encode_image = tiny_colors.clip.encode_text, tiny_colors.clip.encode_image

    def count_text(tokens: Tensor) -> Tensor:
        texts.append(len(tokens))
        return encode_text(tokens)

    def count_image(pixels: Tensor) -> Tensor:
        images.append(len(pixels))
        return encode_image(pixels)

    monkeypatch.setattr(tiny_colors.clip, "encode_text", count_text)
    monkeypatch.setattr(tiny_colors.clip, "encode_image", count_image)
    crops = random_crops(5)
    first = tiny_colors(crops, ["cat", "dog", "cat", "cat", "dog"])
    assert tiny_colors(crops[:1], ["cat"]) == first[:1]
    tiny_colors(crops[:2], ["dog", "cup"])
    assert tiny_colors([], []) == []
    assert (texts, images) == ([2 * 30, 30], [5, 1, 2])


def test_published_model_has_quick_gelu():
    """OpenAI's weights need it; plain ViT-L-14 would build GELU and merely warn."""

    def activations(name: str) -> set[type]:
        with torch.device("meta"):
            model = open_clip.create_model(name, device="meta")
        return {type(m) for m in model.modules() if isinstance(m, QuickGELU | nn.GELU)}

    assert activations(ARCHITECTURE) == {QuickGELU}


def test_a_model_without_quick_gelu_is_refused(tiny_clip):
    for name in ("geneval-tiny", "ViT-L-14", "no-such-model"):
        with pytest.raises(ValueError, match=f"QuickGELU model.*not {name}"):
            ColorClassifier.load(CPU, tiny_clip[1], name)


def test_loaded_weights_are_those_of_the_file(tiny_colors, tiny_clip):
    state = torch.load(tiny_clip[1], weights_only=True)
    loaded = tiny_colors.clip.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert not tiny_colors.clip.training
