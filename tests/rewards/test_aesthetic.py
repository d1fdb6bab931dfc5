from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rewards.conftest import CPU, PROMPTS, eight_bit, normalized, smooth_images
from torch import nn

from diffusion_nft.rewards.aesthetic import AestheticReward
from diffusion_nft.rewards.weights import weights_root

WIDTHS = (768, 1024, 128, 64, 16, 1)
NUMBERS = (0, 2, 4, 6, 7)  # of the linear layers in the published state dict


@pytest.fixture(scope="module")
def linears():
    torch.manual_seed(0)
    return [nn.Linear(a, b) for a, b in pairwise(WIDTHS)]


@pytest.fixture
def weights(linears):
    return {
        f"layers.{number}.{name}": tensor.detach()
        for number, linear in zip(NUMBERS, linears, strict=True)
        for name, tensor in linear.named_parameters()
    }


@pytest.fixture
def ckpts(tmp_path, monkeypatch):
    """The folder that stands in for reward_ckpts."""
    monkeypatch.setenv("DIFFUSION_NFT_REWARD_CKPTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def reward(ckpts, weights, tiny_clip):
    torch.save(weights, ckpts / "sac+logos+ava1-l14-linearMSE.pth")
    return AestheticReward(device=CPU, model=tiny_clip)


@torch.no_grad()
def test_the_score_is_the_mlp_of_the_unit_image_feature(reward, linears, tiny_clip):
    from transformers import CLIPVisionModelWithProjection

    images = smooth_images(3, 224, 224)
    tower = CLIPVisionModelWithProjection.from_pretrained(tiny_clip).eval()
    pixels = torch.cat([normalized(eight_bit(image)) for image in images])
    embeds = tower(pixel_values=pixels).image_embeds
    expected = nn.Sequential(*linears)(embeds / embeds.norm(dim=-1, keepdim=True))[:, 0]

    scores = reward(images, PROMPTS[:3], [{}] * 3).scores

    assert expected.std() > 1e-4
    assert torch.allclose(scores, expected, atol=1e-6)
    assert torch.equal(reward(images, [""] * 3, [{}] * 3).scores, scores)


def test_the_default_folder_is_the_repositorys(monkeypatch):
    monkeypatch.delenv("DIFFUSION_NFT_REWARD_CKPTS", raising=False)
    assert weights_root() == Path(__file__).resolve().parents[2] / "reward_ckpts"


def saved(content, folder):
    path = folder / "mlp.pth"
    torch.save(content, path)
    return path


def test_weights_that_were_saved_on_a_gpu_load_without_one(
    weights, tiny_clip, tmp_path, monkeypatch
):
    """As the published file was, whose tensors say so."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = saved(weights, tmp_path)
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="deserialize object on a CUDA device"):
            torch.load(path, weights_only=True)
    loaded = AestheticReward(device=CPU, model=tiny_clip, weights=path).mlp.state_dict()
    assert all(torch.equal(loaded[key], weights[key]) for key in weights)


def test_missing_unexpected_and_misshapen_weights_are_refused(weights, tmp_path):
    missing = {k: v for k, v in weights.items() if k != "layers.4.bias"}
    with pytest.raises(ValueError, match=r"(?s)mlp\.pth does not fit.*Missing.*layers\.4\.bias"):
        AestheticReward(device=CPU, weights=saved(missing, tmp_path))
    unexpected = {**weights, "layers.9.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"(?s)does not fit.*Unexpected.*layers\.9\.bias"):
        AestheticReward(device=CPU, weights=saved(unexpected, tmp_path))
    misshapen = {**weights, "layers.7.weight": torch.zeros(1, 15)}
    with pytest.raises(ValueError, match=r"(?s)does not fit.*size mismatch for layers\.7\.weight"):
        AestheticReward(device=CPU, weights=saved(misshapen, tmp_path))
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        AestheticReward(device=CPU, weights=saved([1], tmp_path))
