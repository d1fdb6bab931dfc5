"""Invalid outputs of rewards and invalid images are reported at the first score."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.images import Images
from diffusion_nft.rewards import REWARDS, RewardOutput
from diffusion_nft.rewards.combine import (
    RewardError,
    RewardSet,
    Scores,
    UnscoredError,
    build_rewards,
)
from diffusion_nft.runs.checkpoint import Checkpointer
from tests.launch import TINY, make_trainer, one_thread, smoke
from tests.reliability.bad_inputs import CPU

LINE = {"prompt": "a circle", "include": [{"class": "circle", "count": 1}], "tag": "single_object"}
ZEROS = torch.zeros(3)
NAMES = ("shapes", "jpeg_compressibility")
LOCAL = dict.fromkeys(NAMES, 1.0), build_rewards(NAMES, CPU)
Answer = Callable[[Tensor, list[str], list[dict]], object]


def fail(*arguments: object) -> object:
    raise ZeroDivisionError("line one\nline two")


RETURNED: dict[str, tuple[Answer, str]] = {
    "nothing": (lambda *a: None, "returned NoneType, not a RewardOutput"),
    "a tensor": (lambda *a: ZEROS, "returned Tensor, not a RewardOutput"),
    "a tuple": (lambda *a: (ZEROS, {}), "returned tuple, not a RewardOutput"),
    "a mapping": (lambda *a: {"scores": ZEROS}, "returned dict, not a RewardOutput"),
    "its class": (lambda *a: RewardOutput, "returned type, not a RewardOutput"),
    "a list of scores": (lambda *a: RewardOutput([0.0] * 3), "returned list, not a tensor"),
    "an array": (lambda *a: RewardOutput(np.zeros(3)), "returned ndarray, not a tensor"),
    "no scores": (lambda *a: RewardOutput(None), "returned NoneType, not a tensor"),
    "text": (lambda *a: RewardOutput("0.5"), "returned str, not a tensor"),
    "one number": (lambda *a: RewardOutput(0.5), "returned float, not a tensor"),
    "complex numbers": (lambda *a: RewardOutput(ZEROS + 1j), "returned torch.complex64"),
    "a scalar": (lambda *a: RewardOutput(torch.tensor(0.5)), "shape () for 3 images"),
    "none for three": (lambda *a: RewardOutput(torch.zeros(0)), "shape (0,) for 3 images"),
    "two for three": (lambda *a: RewardOutput(torch.zeros(2)), "shape (2,) for 3 images"),
    "four for three": (lambda *a: RewardOutput(torch.zeros(4)), "shape (4,) for 3 images"),
    "a column": (lambda *a: RewardOutput(torch.zeros(3, 1)), "shape (3, 1) for 3 images"),
    "an image": (lambda i, *a: RewardOutput(i), "shape (3, 3, 48, 48) for 3 images"),
    "NaN": (
        lambda *a: RewardOutput(torch.tensor([0, math.nan, 0])),
        "1 of 3 images have no score, more than max_unscored = 0: image 1",
    ),
    "inf": (lambda *a: RewardOutput(torch.tensor([0, 0, math.inf])), "inf for image 2"),
    "-inf": (lambda *a: RewardOutput(torch.tensor([-math.inf, 0, 0])), "-inf for image 0"),
    "fp16 overflow": (
        lambda *a: RewardOutput(torch.full((3,), 6e4, dtype=torch.float16) * 2),
        "inf for image 0",
    ),
    "all NaN": (lambda *a: RewardOutput(ZEROS * math.nan), "3 of 3 images have no score"),
    "reasons of None": (lambda *a: RewardOutput(ZEROS, reasons=None), "reasons as NoneType"),
    "reasons of a list": (lambda *a: RewardOutput(ZEROS, reasons=["x"]), "reasons as list"),
    "components of a list": (lambda *a: RewardOutput(ZEROS, [ZEROS]), "components as list"),
    "no components": (lambda *a: RewardOutput(ZEROS, None), "components as NoneType"),
    "a component of text": (lambda *a: RewardOutput(ZEROS, {"x": "y"}), "'bad/x' returned str"),
    "a short component": (lambda *a: RewardOutput(ZEROS, {"x": ZEROS[:1]}), "'bad/x' returned sh"),
    "an infinite component": (
        lambda *a: RewardOutput(ZEROS, {"x": ZEROS - math.inf}),
        "'bad/x' returned -inf for image 0",
    ),
    "an exception": (fail, "failed: ZeroDivisionError: line one"),
}


def score(answer: Answer, weight: float = 1.0, count: int = 3):
    prompts, metadata = ["x"] * count, [LINE] * count
    return RewardSet({"bad": weight}, {"bad": answer})(
        Images.from_float(torch.rand(count, 3, 48, 48)), prompts, metadata
    )


@pytest.mark.parametrize("name", RETURNED)
def test_what_is_no_score_is_named_with_its_reward(name):
    answer, words = RETURNED[name]
    with pytest.raises(RewardError, match="reward 'bad") as caught:
        score(answer)
    assert words in str(caught.value)
    if name == "an exception":
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int64", "uint8", "bool", "float64"])
def test_any_kind_of_real_numbers_is_a_score(kind):
    values = torch.tensor([0, 1, 1]).to(getattr(torch, kind))
    found = score(lambda *a: RewardOutput(values, {"part": values}))
    assert found.total.tolist() == [0, 1, 1] and found.parts["bad/part"].dtype == torch.float64
    assert score(lambda *a: RewardOutput(values[:0]), count=0).total.shape == (0,)


def test_a_score_may_carry_a_graph_and_a_component_nan():
    tracked = torch.ones(3, requires_grad=True) * 2
    found = score(lambda *a: RewardOutput(tracked, {"part": ZEROS * math.nan}))
    assert not found.total.requires_grad and found.parts["bad/part"].isnan().all()


def test_a_sum_beyond_all_numbers_is_named_with_the_weights():
    with pytest.raises(RewardError, match=r"weighted sum of the .*1e\+308.* is inf for image"):
        score(lambda *a: RewardOutput(torch.full((3,), 1e9)), weight=1e308)


@pytest.mark.parametrize("shape", [(64, 64), (48, 96)])
def test_images_of_a_size_that_a_reward_cannot_take_are_named(shape):
    images = Images.from_float(torch.rand(3, 3, *shape))
    with pytest.raises(RewardError, match="reward 'shapes' ") as caught:
        RewardSet({"shapes": 1.0}, build_rewards(["shapes"], CPU))(images, ["x"] * 3, [LINE] * 3)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("value", [-1e30, 1e30])
def test_pixels_that_are_no_colours_are_clamped(value):
    found = RewardSet(*LOCAL)(Images.from_float(torch.full((1, 3, 48, 48), value)), ["x"], [LINE])
    assert found.total.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_image_of_no_numbers_is_named_or_left_out_and_never_scored(value):
    images = torch.rand(3, 3, 48, 48)
    images[1, 0, 5, 7] = value
    images = Images.from_float(images)
    given = (images, ["a", "b", "c"], [LINE] * 3, ["line 1", "line 2", "line 3"])
    with pytest.raises(UnscoredError, match=r"1 of 3 .* line 2 \('b'\): it has NaN or infinite"):
        RewardSet(*LOCAL)(*given)
    found = RewardSet(*LOCAL, max_unscored=1)(*given)
    sound = RewardSet(*LOCAL)(images[::2], ["a", "c"], [LINE] * 2)
    for name in found.parts:
        assert found.parts[name].isnan().tolist() == [False, True, False]
        assert found.parts[name][::2].tolist() == sound.parts[name].tolist()
    assert found.total[::2].tolist() == sound.total.tolist() and found.total.isnan()[1]
    assert [*found.reasons] == [1]


def test_a_reward_may_fail_on_as_many_images_as_are_allowed():
    calls = []

    def fails(images, prompts, metadata):
        calls.append(len(prompts))
        if "bad" in prompts:
            raise ZeroDivisionError("no objects")
        return RewardOutput(torch.arange(1.0, 1 + len(prompts)), {"x": torch.ones(len(prompts))})

    def ask(*prompts, allowed):
        images = torch.rand(len(prompts), 3, 8, 8)
        rewards = RewardSet({"fails": 2.0}, {"fails": fails}, max_unscored=allowed)
        return rewards(Images.from_float(images), list(prompts), [LINE] * len(prompts))

    found = ask("a", "bad", "c", allowed=1)
    assert found.total.nan_to_num(-1).tolist() == [2, -1, 2] and calls == [3, 1, 1, 1]
    assert found.parts["fails/x"].nan_to_num(-1).tolist() == [1, -1, 1]
    assert found.reasons == {
        1: "image 1 ('bad'): reward 'fails' failed: ZeroDivisionError: no objects"
    }
    both = Scores.concatenate([ask("bad", allowed=1), found])
    assert both.parts["fails/x"].nan_to_num(-1).tolist() == [-1, 1, -1, 1]
    with pytest.raises(UnscoredError, match=r"4 of 4 .*'fails' failed: ZeroDivisionError"):
        ask("bad", "bad", "bad", "bad", allowed=1)
    with pytest.raises(RewardError, match="'fails' failed: ZeroDivisionError"):
        ask("a", "bad", allowed=0)


def test_an_image_that_one_reward_cannot_score_is_out_of_the_others_too():
    scores = {"a": torch.tensor([1.0, 2.0, 100.0]), "b": torch.tensor([1.0, 3.0, math.nan])}
    rewards = {k: (lambda *_, v=v: RewardOutput(v, {"x": v + 1})) for k, v in scores.items()}
    whole = RewardSet({"a": 1.0, "b": 1.0}, rewards, max_unscored=1)
    found = whole(Images.from_float(torch.rand(3, 3, 8, 8)), ["x"] * 3, [LINE] * 3)
    for name in ("a", "a/x", "b", "b/x"):
        assert found.parts[name].isnan().tolist() == [False, False, True], name
    assert found.total[:2].tolist() == [2.0, 5.0]


def test_an_outage_is_no_fault_of_an_image():
    calls = []

    def offline(images, prompts, metadata):
        calls.append(len(prompts))
        raise ConnectionError("gone")

    rewards = RewardSet({"x": 1.0}, {"x": offline}, max_unscored=9)
    with pytest.raises(RewardError, match="gone"):
        rewards(Images.from_float(torch.rand(3, 3, 8, 8)), ["x"] * 3, [LINE] * 3)
    assert calls == [3]


def test_a_bad_score_ends_a_run_with_its_state_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "listing", f"{__name__}:Listing")
    monkeypatch.setattr(Listing, "sound", True)
    config = smoke(tmp_path, TINY)
    with config.unlocked():
        config.reward_fn = {"listing": 1.0}
    trainer = make_trainer(config, Distributed(0, 1, 0, CPU))
    real = trainer._sample

    def sample():
        Listing.sound = trainer.state.epoch < 1
        return real()

    monkeypatch.setattr(trainer, "_sample", sample)
    with one_thread(), pytest.raises(RewardError, match="'listing' returned list, not a tensor"):
        trainer.run()
    saved = Checkpointer(tmp_path).load_latest()
    assert saved is not None and saved.state["epoch"] == 1


class Listing:
    """Scores as a tensor while ``sound``, then as a list."""

    sound = True

    def __init__(self, device: torch.device):
        del device

    def __call__(self, images, prompts, metadata):
        scores = images.mean((1, 2, 3))
        return RewardOutput(scores if Listing.sound else scores.tolist())
