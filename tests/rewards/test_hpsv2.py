import json
import sys

import pytest
import torch
from PIL import Image
from rewards.conftest import CPU, PROMPTS, eight_bit, normalized, smooth_pictures

from diffusion_nft.rewards.hpsv2 import HPSv2Reward

TINY = "tiny-hpsv2"
CHECKPOINT = "HPS_v2.1_compressed.pt"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """An open_clip model like ViT-H-14, tiny and random, registered under the name TINY."""
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.get_model_config("ViT-H-14")
    config["embed_dim"] = 16
    config["vision_cfg"] |= {"layers": 2, "width": 32, "head_width": 16, "patch_size": 32}
    config["text_cfg"] |= {"layers": 2, "width": 32, "heads": 2}
    file = tmp_path_factory.mktemp("open_clip") / f"{TINY}.json"
    file.write_text(json.dumps(config))
    open_clip.add_model_config(file)
    torch.manual_seed(0)
    model = open_clip.create_model(TINY).eval()
    for parameter in model.parameters():
        # Larger than usual, so that a random model tells pictures and prompts apart.
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture
def ckpts(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_NFT_REWARD_CKPTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def reward(ckpts, tiny_model):
    torch.save({"epoch": 0, "state_dict": tiny_model.state_dict()}, ckpts / CHECKPOINT)
    return HPSv2Reward(device=CPU, model_name=TINY)


def long_side_224(picture: Image.Image) -> Image.Image:
    """The long side resized to 224 (bicubic), in the middle of a black square, by Pillow alone."""
    scale = 224 / max(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    square = Image.new("RGB", (224, 224))
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((224 - width) // 2, (224 - height) // 2))
    return square


@pytest.mark.parametrize("size", [(512, 512), (224, 224), (240, 361), (300, 201), (64, 32)])
@torch.no_grad()
def test_the_score_is_the_cosine_of_open_clips_features(reward, tiny_model, size):
    import open_clip

    images = smooth_pictures(4, *size)
    pixels = torch.cat([normalized(long_side_224(eight_bit(image))) for image in images])
    image = tiny_model.encode_image(pixels)
    text = tiny_model.encode_text(open_clip.tokenize(PROMPTS))
    expected = torch.cosine_similarity(image, text)

    scores = reward(images, PROMPTS, [{}] * 4).scores

    assert expected.std() > 0.01
    assert torch.allclose(scores, expected, atol=1e-5)


def test_the_default_architecture_is_vit_h_14_at_224_pixels():
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.get_model_config("ViT-H-14")
    assert config["vision_cfg"] == {
        "image_size": 224,
        "layers": 32,
        "width": 1280,
        "head_width": 80,
        "patch_size": 14,
    }
    assert config["embed_dim"] == 1024
    assert "quick_gelu" not in config


def test_scores_do_not_depend_on_the_batch(reward):
    images = smooth_pictures(4, 64, 64)
    together = reward(images, PROMPTS, [{}] * 4).scores
    reward.batch_size = 3
    assert torch.allclose(reward(images, PROMPTS, [{}] * 4).scores, together, atol=1e-6)
    for i in range(4):
        alone = reward(images[i : i + 1], PROMPTS[i : i + 1], [{}]).scores
        assert torch.allclose(alone, together[i : i + 1], atol=1e-6)


def test_a_prompt_counts_up_to_77_tokens(reward):
    images = smooth_pictures(1, 64, 64)

    def score(prompt):
        return reward(images, [prompt], [{}]).scores.item()

    full = " ".join("x" * 75)
    assert score(full + " cat and dog") == score(full) != score(" ".join("x" * 74))


def test_bfloat16_scores_are_near(reward, tiny_model):
    half = HPSv2Reward(device=CPU, dtype=torch.bfloat16, model_name=TINY)
    images = smooth_pictures(4, 64, 64)
    exact, rough = (r(images, PROMPTS, [{}] * 4).scores for r in (reward, half))
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, atol=0.03)


def test_a_missing_file_says_what_to_fetch_and_where_to_put_it(ckpts):
    pytest.importorskip("open_clip")
    with pytest.raises(FileNotFoundError) as caught:
        HPSv2Reward(device=CPU)
    address = "https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt"
    for part in (CHECKPOINT, address, "reward_ckpts/", str(ckpts)):
        assert part in str(caught.value)


def test_wrong_weights_are_refused(tiny_model, tmp_path):
    path = tmp_path / "hps.pt"
    weights = tiny_model.state_dict()
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r'hps\.pt has no "state_dict"'):
        HPSv2Reward(device=CPU, model_name=TINY, weights=path)
    torch.save({"state_dict": {k: v for k, v in weights.items() if k != "logit_scale"}}, path)
    with pytest.raises(ValueError, match=r"(?s)does not fit.*Missing.*logit_scale"):
        HPSv2Reward(device=CPU, model_name=TINY, weights=path)
    torch.save({"state_dict": {**weights, "score_head": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"(?s)does not fit.*Unexpected.*score_head"):
        HPSv2Reward(device=CPU, model_name=TINY, weights=path)


def test_without_open_clip_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[hpsv2\]"'):
        HPSv2Reward(device=CPU)
