import shutil

import pytest
import torch
from PIL import Image
from rewards.conftest import CPU, PROMPTS, eight_bit, normalized, smooth_images
from safetensors.torch import load_file, save_file

from diffusion_nft.rewards.pickscore import PickScoreReward


@pytest.fixture(scope="module")
def reward(tiny_clip):
    return PickScoreReward(device=CPU, model=tiny_clip, processor=tiny_clip)


def resized_and_cropped(image: Image.Image) -> Image.Image:
    """Short side to 224 (bicubic), then the middle 224 x 224, by Pillow alone."""
    width, height = image.size
    short = min(width, height)
    width, height = int(224 * width / short), int(224 * height / short)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - 224) // 2, (height - 224) // 2
    return image.crop((left, top, left + 224, top + 224))


@pytest.mark.parametrize("size", [(512, 512), (240, 360), (303, 200)])
def test_the_score_is_the_diagonal_of_transformers_logits_over_26(reward, reference_logits, size):
    images = smooth_images(4, *size)
    pixels = torch.cat([normalized(resized_and_cropped(eight_bit(x))) for x in images])
    expected = reference_logits(PROMPTS, pixels).diagonal() / 26

    scores = reward(images, PROMPTS, [{}] * 4).scores

    assert expected.std() > 0.01  # a random model that tells pairs apart
    assert torch.allclose(scores, expected, atol=1e-5)


def test_a_prompt_counts_up_to_77_tokens(reward):
    images = smooth_images(1, 64, 64)

    def score(prompt):
        return reward(images, [prompt], [{}]).scores.item()

    # Start and end take 2 tokens of the 77, each letter of "x x x ..." one.
    full = " ".join("x" * 75)
    assert score(full + " cat and dog") == score(full) != score(" ".join("x" * 74))


def test_bfloat16_keeps_the_scale(reward, tiny_clip):
    half = PickScoreReward(device=CPU, dtype=torch.bfloat16, model=tiny_clip, processor=tiny_clip)
    assert half.clip.logit_scale == reward.clip.logit_scale


def test_images_and_prompts_must_fit_one_another(reward):
    for shape in ((3, 64, 64), (2, 1, 64, 64), (2, 64, 64, 3)):
        with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
            reward(torch.zeros(shape), ["a"] * shape[0], [{}] * shape[0])
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        reward(smooth_images(2, 64, 64), ["a cat"], [{}])
    assert reward(torch.zeros(0, 3, 64, 64), [], []).scores.shape == (0,)


def test_no_gradient_and_nothing_to_train(reward):
    assert not any(p.requires_grad for p in reward.clip.model.parameters())
    images = smooth_images(1, 64, 64).requires_grad_()
    assert not reward(images, PROMPTS[:1], [{}]).scores.requires_grad


@pytest.fixture
def altered(tiny_clip, tmp_path):
    """Saves the tiny CLIP with its state dict changed; returns the new folder."""

    def alter(change):
        folder = shutil.copytree(tiny_clip, tmp_path / "altered")
        file = folder / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})
        return str(folder)

    return alter


def test_missing_and_unexpected_weights_are_refused(altered, tiny_clip):
    def change(weights):
        del weights["text_projection.weight"]
        weights["head"] = torch.zeros(1)

    with pytest.raises(ValueError, match=r"missing: text_projection\.weight.*unexpected: head"):
        PickScoreReward(device=CPU, model=altered(change), processor=tiny_clip)


def test_position_ids_of_older_checkpoints_are_no_weights(altered, tiny_clip):
    ids = torch.arange(77)[None]
    folder = altered(lambda weights: weights.update({"text_model.embeddings.position_ids": ids}))
    PickScoreReward(device=CPU, model=folder, processor=tiny_clip)


def test_a_tokenizer_of_another_vocabulary_is_refused(tiny_clip, tmp_path):
    from transformers import CLIPTokenizer

    folder = shutil.copytree(tiny_clip, tmp_path / "other")
    CLIPTokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"has 2 tokens, but the model .* 518"):
        PickScoreReward(device=CPU, model=tiny_clip, processor=str(folder))


def test_a_model_out_of_reach_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    absent = str(tmp_path / "PickScore_v1")
    with pytest.raises(OSError, match=r"PickScore_v1' is not a local folder with a CLIPModel"):
        PickScoreReward(device=CPU, model=absent)
