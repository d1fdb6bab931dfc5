"""HPSv2.1 against open_clip's features and hpsv2x's scores (recorded by golden/make_hpsv2x.py)."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rewards.conftest import (
    CPU,
    OPENAI_MEAN,
    OPENAI_STD,
    PROMPTS,
    eight_bit,
    smooth_images,
)
from safetensors.torch import load_file
from torch import Tensor

from diffusion_nft.rewards.hpsv2 import HPSv2Reward

TINY = "tiny-hpsv2"
CHECKPOINT = "HPS_v2.1_compressed.pt"
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RECORD = json.loads((GOLDEN / "hpsv2x.json").read_text())
TENSORS = load_file(GOLDEN / "hpsv2x.safetensors")
IMAGES = range(len(RECORD["scores"]))


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
        # Larger than usual, so that a random model tells images and prompts apart.
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


def network_input(image: Tensor) -> Tensor:
    """An image as the package prepares it, by torchvision: ``[1, 3, 224, 224]``."""
    from torchvision.transforms import InterpolationMode, functional

    pixels = functional.to_tensor(eight_bit(image))
    scale = 224 / max(pixels.shape[1:])
    height, width = (round(side * scale) for side in pixels.shape[1:])
    pixels = functional.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
    square = torch.zeros(3, 224, 224)
    top, left = (224 - height) // 2, (224 - width) // 2
    square[:, top : top + height, left : left + width] = pixels
    return functional.normalize(square, OPENAI_MEAN.tolist(), OPENAI_STD.tolist())[None]


@pytest.mark.parametrize("size", [(512, 512), (224, 224), (240, 361), (300, 201), (64, 32)])
@torch.no_grad()
def test_the_score_is_the_cosine_of_open_clips_features(reward, tiny_model, size):
    import open_clip

    images = smooth_images(4, *size)
    image = tiny_model.encode_image(torch.cat([network_input(image) for image in images]))
    text = tiny_model.encode_text(open_clip.tokenize(PROMPTS))
    expected = torch.cosine_similarity(image, text)

    scores = reward(images, PROMPTS, [{}] * 4).scores

    assert expected.std() > 0.01
    assert torch.allclose(scores, expected, atol=1e-5)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The recorded model's architecture, in a file named like it, and its published checkpoint."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "small-hpsv2x.json").write_text(json.dumps(RECORD["config"]))
    weights = {
        name.removeprefix("weights/"): tensor.float()
        for name, tensor in TENSORS.items()
        if name.startswith("weights/")
    }
    text = RECORD["config"]["text_cfg"]
    embedding = torch.zeros(text["vocab_size"], text["width"])
    embedding[TENSORS["token_ids"]] = TENSORS["token_rows"].float()
    weights["token_embedding.weight"] = embedding
    torch.save({"state_dict": weights}, folder / CHECKPOINT)
    return folder


def check_recorded(reward: HPSv2Reward, index: int) -> None:
    image = TENSORS[f"pictures/{index}"].permute(2, 0, 1)[None] / 255
    prompts = RECORD["prompts"]
    images = image.expand(len(prompts), -1, -1, -1)
    scores = reward(images, prompts, [{}] * len(prompts)).scores
    assert torch.allclose(scores, torch.tensor(RECORD["scores"][index]), rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def recorded_reward(recorded):
    open_clip = pytest.importorskip("open_clip")
    open_clip.add_model_config(recorded / "small-hpsv2x.json")
    return HPSv2Reward(CPU, model_name="small-hpsv2x", weights=recorded / CHECKPOINT)


@pytest.mark.parametrize("index", IMAGES)
def test_the_scores_are_hpsv2xs(recorded_reward, index):
    check_recorded(recorded_reward, index)


def test_the_recorded_scores_tell_images_and_prompts_apart():
    scores = np.array(RECORD["scores"])
    assert min(scores.std(0).min(), scores.std(1).min()) > 0.05


def test_the_tokens_are_hpsv2xs():
    open_clip = pytest.importorskip("open_clip")
    tokens = open_clip.get_tokenizer("ViT-H-14")(RECORD["prompts"])
    assert tokens.tolist() == RECORD["tokens"]


def test_the_published_architecture_has_hpsv2xs_names_and_shapes():
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == RECORD["published_shapes"]


@pytest.mark.parametrize("index", IMAGES)
def test_the_package_scores_as_recorded(recorded, index):
    pytest.importorskip("hpsv2", reason="runs where make_hpsv2x.py does")
    from hpsv2.src.open_clip import add_model_config

    add_model_config(recorded / "small-hpsv2x.json")
    path = recorded / CHECKPOINT
    check_recorded(
        HPSv2Reward(CPU, backend="hpsv2x", model_name="small-hpsv2x", weights=path), index
    )


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
    images = smooth_images(4, 64, 64)
    together = reward(images, PROMPTS, [{}] * 4).scores
    reward.batch_size = 3
    assert torch.allclose(reward(images, PROMPTS, [{}] * 4).scores, together, atol=1e-6)
    for i in range(4):
        alone = reward(images[i : i + 1], PROMPTS[i : i + 1], [{}]).scores
        assert torch.allclose(alone, together[i : i + 1], atol=1e-6)


def test_a_prompt_counts_up_to_77_tokens(reward):
    images = smooth_images(1, 64, 64)

    def score(prompt):
        return reward(images, [prompt], [{}]).scores.item()

    full = " ".join("x" * 75)
    assert score(full + " cat and dog") == score(full) != score(" ".join("x" * 74))


def test_bfloat16_scores_are_near(reward, tiny_model):
    half = HPSv2Reward(device=CPU, dtype=torch.bfloat16, model_name=TINY)
    images = smooth_images(4, 64, 64)
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
        HPSv2Reward(device=CPU, weights=Path(CHECKPOINT))


def test_without_hpsv2x_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "hpsv2.src", None)
    with pytest.raises(ImportError, match=r"environment of its own.*pip install hpsv2x==1\.2\.0"):
        HPSv2Reward(device=CPU, backend="hpsv2x", weights=Path(CHECKPOINT))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'clip' is unknown; choose from open_clip, hpsv2x"):
        HPSv2Reward(device=CPU, backend="clip")
