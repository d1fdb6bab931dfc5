"""Several rewards as one: the sum by hand, and options (bad scores: tests/reliability)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_nft.images import Images
from diffusion_nft.rewards import REWARDS, RewardOutput, build_reward
from diffusion_nft.rewards.combine import RewardError, RewardSet, Scores, build_rewards

CPU = torch.device("cpu")


class Brightness:
    """Red value of the first pixel."""

    built = 0

    def __init__(self, device):
        self.device = device
        self.seen = []
        Brightness.built += 1

    def __call__(self, images, prompts, metadata):
        self.seen.append(images)
        scores = images[:, 0, 0, 0]
        partly = torch.tensor([1.0, math.nan, 3.0])[: len(prompts)]
        return RewardOutput(scores, {"partly": partly})


class Length:
    def __init__(self, device):
        del device

    def __call__(self, images, prompts, metadata):
        return RewardOutput(
            torch.tensor([len(p) + m["extra"] for p, m in zip(prompts, metadata, strict=True)])
        )


class Infinite(Length):
    def __call__(self, images, prompts, metadata):
        return RewardOutput(torch.tensor([0.0, math.inf, 1.0]))


class Takes(Length):
    """Takes options of every kind."""

    def __init__(
        self,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        weights: Path | None = None,
        model: str = "m",
        batch_size: int = 1,
    ):
        self.options = (device, dtype, weights, model, batch_size)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    for cls in (Brightness, Length, Takes, Infinite):
        monkeypatch.setitem(REWARDS, cls.__name__, f"{__name__}:{cls.__name__}")


def score(**weights: float) -> Scores:
    images = torch.tensor([0.0, 0.2, 1.0]).reshape(3, 1, 1, 1).expand(3, 3, 4, 4)
    images = Images.from_float(images)
    metadata = [{"extra": 10}, {"extra": 20}, {"extra": 30}]
    return RewardSet.build(weights, CPU)(images, ["a", "bb", "ccc"], metadata)


# 51 / 255, exactly.
FIFTH = float(np.float32(0.2))


def test_the_total_is_the_weighted_sum_in_float64():
    scores = score(Brightness=2.0, Length=-0.5)
    assert scores.total.tolist() == [-5.5, 2 * FIFTH - 11.0, 2.0 - 16.5]
    assert scores.parts["Length"].tolist() == [11, 22, 33]
    assert scores.parts["Brightness"].tolist() == [0.0, FIFTH, 1.0]
    assert {v.dtype for v in (scores.total, *scores.parts.values())} == {torch.float64}
    partly = scores.parts["Brightness/partly"].tolist()
    assert partly[0] == 1 and math.isnan(partly[1]) and partly[2] == 3


def test_a_weight_of_zero_scores_without_counting():
    both, alone = score(Brightness=0.0, Length=2.0), score(Length=2.0)
    assert torch.equal(both.total, alone.total)
    assert both.parts["Brightness"].tolist() == [0.0, FIFTH, 1.0]
    with pytest.raises(RewardError, match="Infinite"):
        score(Infinite=0.0, Length=1.0)


def test_sets_of_different_weights_share_rewards_that_are_built_once(monkeypatch):
    monkeypatch.setattr(Brightness, "built", 0)
    rewards = build_rewards(["Length", "Brightness", "Length"], CPU)
    assert list(rewards) == ["Length", "Brightness"]
    image, line = Images.from_float(torch.ones(1, 3, 2, 2)), [{"extra": 0}]
    trained = RewardSet({"Length": 1.0}, rewards)(image, ["four"], line)
    assert trained.parts.keys() == {"Length"}
    judged = RewardSet({"Length": 1.0, "Brightness": 0.0}, rewards)(image, ["four"], line)
    assert judged.parts.keys() == {"Length", "Brightness", "Brightness/partly"}
    assert trained.total.tolist() == judged.total.tolist() == [4.0]
    assert Brightness.built == 1
    with pytest.raises(KeyError):
        RewardSet({"Takes": 1.0}, rewards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_rewards_see_the_images_that_a_png_holds(dtype, tmp_path):
    rewards = build_rewards(["Brightness"], CPU)
    images = (torch.rand(2, 3, 33, 65, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.1).to(
        dtype
    )
    images[0, 0, 0, :3] = torch.tensor([-1.0, 2.0, -1e4])
    RewardSet({"Brightness": 1.0}, rewards)(Images.from_float(images), ["", ""], [{}, {}])
    (seen,) = rewards["Brightness"].seen
    assert seen.dtype == torch.float32
    for image, ours in zip(images.double().numpy(), seen, strict=True):
        levels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
        Image.fromarray(levels.transpose(1, 2, 0)).save(tmp_path / "image.png")
        with Image.open(tmp_path / "image.png") as file:
            read = np.array(file).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        assert np.array_equal(ours.numpy(), read)


def test_options_are_plain_values():
    options = {"device": "meta", "dtype": "bf16", "weights": "w.pt", "batch_size": 8}
    reward = build_reward("Takes", CPU, options)
    assert reward.options == (torch.device("meta"), torch.bfloat16, Path("w.pt"), "m", 8)
    assert options["dtype"] == "bf16", "the caller's mapping stays as it is"
    assert build_reward("Takes", CPU).options == (CPU, torch.float32, None, "m", 1)
    built = build_rewards(["Takes", "Length"], CPU, options={"Takes": {"model": "n"}})
    assert built["Takes"].options[3] == "n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bath_size": 8}, "no option 'bath_size'; choose from device, dtype, weights, model"),
        ({"dtype": "float16"}, "must be one of fp32, fp16, bf16"),
        ({"dtype": ["fp16"]}, "must be one of fp32, fp16, bf16"),
        ({"device": "gpu"}, "such as 'cpu' or 'cuda:1'"),
        ({"device": None}, "such as 'cpu' or 'cuda:1'"),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(ValueError, match="Takes") as caught:
        build_reward("Takes", CPU, options)
    assert words in str(caught.value)


def test_a_served_reward_takes_no_options():
    with pytest.raises(ValueError, match="'Takes' is served"):
        build_reward("Takes", CPU, {"batch_size": 1}, ("http://127.0.0.1:9",))


def test_concatenation_keeps_the_order():
    one, two = score(Brightness=1.0), score(Brightness=3.0)
    both = Scores.concatenate([one, two])
    assert both.total.tolist() == [0.0, FIFTH, 1.0, 0.0, 3 * FIFTH, 3.0]
    assert both.parts["Brightness"].tolist() == [0.0, FIFTH, 1.0] * 2
    assert Scores.concatenate([]).total.shape == (0,)


def test_an_unknown_reward_names_the_choices():
    with pytest.raises(ValueError, match=r"'pikscore' is unknown; choose from .*shapes"):
        build_reward("pikscore", CPU)
