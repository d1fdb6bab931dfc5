"""HPSv2.1 against hpsv2x's tokens and scores, which golden/make_hpsv2x.py recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rewards.conftest import CPU
from safetensors.torch import load_file

from diffusion_nft.rewards.hpsv2 import HPSv2Reward

CHECKPOINT = "HPS_v2.1_compressed.pt"
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RECORD = json.loads((GOLDEN / "hpsv2x.json").read_text())
TENSORS = load_file(GOLDEN / "hpsv2x.safetensors")
IMAGES = range(len(RECORD["scores"]))


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


def test_the_package_scores_as_recorded(recorded):
    pytest.importorskip("hpsv2", reason="runs where make_hpsv2x.py does")
    from hpsv2.src.open_clip import add_model_config

    add_model_config(recorded / "small-hpsv2x.json")
    path = recorded / CHECKPOINT
    reward = HPSv2Reward(CPU, backend="hpsv2x", model_name="small-hpsv2x", weights=path)
    for index in IMAGES:
        check_recorded(reward, index)


def test_wrong_weights_are_refused(recorded_reward, recorded, tmp_path):
    path = tmp_path / "hps.pt"
    weights = torch.load(recorded / CHECKPOINT, weights_only=True)["state_dict"]
    for content, words in (
        (weights, r'hps\.pt has no "state_dict"'),
        ({"state_dict": {**weights, "score_head": torch.zeros(1)}}, r"(?s)Unexpected.*score_head"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=words):
            HPSv2Reward(CPU, model_name="small-hpsv2x", weights=path)
