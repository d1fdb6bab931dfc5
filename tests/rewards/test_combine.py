"""Several rewards as one: the sum by hand, and what a bad reward leads to."""

import math

import pytest
import torch

from diffusion_nft.rewards import REWARDS, RewardOutput, build_reward
from diffusion_nft.rewards.combine import RewardError, RewardSet, Scores

CPU = torch.device("cpu")


class Brightness:
    def __init__(self, device):
        self.device = device

    def __call__(self, images, prompts, metadata):
        scores = images.mean((1, 2, 3))
        partly = torch.tensor([1.0, math.nan, 3.0])[: len(prompts)]
        return RewardOutput(scores, {"partly": partly})


class Length:
    def __init__(self, device):
        del device

    def __call__(self, images, prompts, metadata):
        return RewardOutput(
            torch.tensor([len(p) + m["extra"] for p, m in zip(prompts, metadata, strict=True)])
        )


class Raises(Length):
    def __call__(self, images, prompts, metadata):
        raise KeyError("no such colour")


class WrongLength(Length):
    def __call__(self, images, prompts, metadata):
        return RewardOutput(torch.zeros(len(prompts) + 1))


class WrongShape(Length):
    def __call__(self, images, prompts, metadata):
        return RewardOutput(torch.zeros(len(prompts), 1))


class WrongComponent(Length):
    def __call__(self, images, prompts, metadata):
        return RewardOutput(torch.zeros(len(prompts)), {"part": torch.zeros(1, 1)})


class NotANumber(Length):
    def __call__(self, images, prompts, metadata):
        return RewardOutput(torch.tensor([0.0, math.nan, 1.0]))


class Infinite(Length):
    def __call__(self, images, prompts, metadata):
        return RewardOutput(torch.tensor([0.0, math.inf, 1.0]))


FAILURES = (Raises, WrongLength, WrongShape, WrongComponent, NotANumber, Infinite)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    for cls in (Brightness, Length, *FAILURES):
        monkeypatch.setitem(REWARDS, cls.__name__, f"{__name__}:{cls.__name__}")


def score(**weights: float) -> Scores:
    images = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1).expand(3, 3, 4, 4)
    metadata = [{"extra": 10}, {"extra": 20}, {"extra": 30}]
    return RewardSet(weights, CPU)(images, ["a", "bb", "ccc"], metadata)


def test_the_total_is_the_weighted_sum_in_float64():
    scores = score(Brightness=2.0, Length=-0.5)
    assert scores.total.tolist() == [-5.5, 1.0 - 11.0, 2.0 - 16.5]
    assert scores.parts["Length"].tolist() == [11, 22, 33]
    assert scores.parts["Brightness"].tolist() == [0.0, 0.5, 1.0]
    assert {v.dtype for v in (scores.total, *scores.parts.values())} == {torch.float64}
    partly = scores.parts["Brightness/partly"].tolist()
    assert partly[0] == 1 and math.isnan(partly[1]) and partly[2] == 3


@pytest.mark.parametrize("cls", FAILURES)
def test_a_bad_reward_is_an_error_that_names_it(cls):
    with pytest.raises(RewardError, match=cls.__name__) as caught:
        score(Brightness=1.0, **{cls.__name__: 1.0})
    if cls is Raises:
        assert "no such colour" in str(caught.value)
        assert isinstance(caught.value.__cause__, KeyError)


def test_concatenation_keeps_the_order():
    one, two = score(Brightness=1.0), score(Brightness=3.0)
    both = Scores.concatenate([one, two])
    assert both.total.tolist() == [0.0, 0.5, 1.0, 0.0, 1.5, 3.0]
    assert both.parts["Brightness"].tolist() == [0.0, 0.5, 1.0] * 2
    assert Scores.concatenate([]).total.shape == (0,)


def test_an_unknown_reward_names_the_choices():
    with pytest.raises(ValueError, match=r"'pikscore' is unknown; choose from .*shapes"):
        build_reward("pikscore", CPU)
