"""Evaluation: statistics, independence of ranks and chunks, saved images, resuming."""

import contextlib
import json
import math
import shutil
import time
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusion_nft.data.prompts import Prompt, draw_lines, load_prompts
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.evaluation.evaluate import Task, complete, evaluate, rescore
from diffusion_nft.evaluation.results import (
    Evaluation,
    image_path,
    mean_and_error,
    merge_settings,
    read_images,
    reserve_folder,
    save_images,
    write_results,
)
from diffusion_nft.images import Images
from diffusion_nft.rewards.combine import RewardError, RewardSet
from diffusion_nft.validation.flat import unflatten

CPU = torch.device("cpu")
ONE = Distributed(0, 1, 0, CPU)
SETTINGS = unflatten(
    {
        "eval.seed": 1,
        "resolution": 48,
        "eval.resolution": 0,
        "sample.negative_prompt": "",
        "eval.solver": "flow",
        "eval.num_steps": 3,
        "eval.guidance_scale": 1.0,
        "eval.batch_size": 2,
    }
)


def test_standard_errors_are_clustered_by_prompt():
    values = [1.0, 3.0, 2.0, 2.0, 7.0, math.nan]
    clusters = ["a", "a", "b", "b", "c", "c"]
    # Mean 3; residuals a: -2 + 0, b: -1 - 1, c: 4; G = 3, n = 5.
    expected = math.sqrt(3 / 2 * (4 + 4 + 16)) / 5
    assert mean_and_error(values, clusters) == pytest.approx(
        {"mean": 3.0, "stderr": expected, "count": 5}
    )
    # Exact repeats add no information: 20 prompts x 3 have the error of 20.
    values = np.random.default_rng(0).random(20)
    for count in (1, 3):
        clusters = [str(i) for i in range(20) for _ in range(count)]
        error = mean_and_error(values.repeat(count).tolist(), clusters)["stderr"]
        assert error == pytest.approx(values.std(ddof=1) / math.sqrt(20))
    assert math.isnan(mean_and_error([1.0, 2.0], ["a", "a"])["stderr"])
    assert mean_and_error([math.nan], ["a"])["count"] == 0


def test_averages_per_tag_and_over_tags():
    prompts = [Prompt(text, {"tag": tag}) for text, tag in ("ax", "bx", "cy", "dy", "ey")]
    scores = {"total": [1.0, 3.0, 0.0, 3.0, 6.0], "part": [math.nan] * 2 + [1.0, 2.0, 3.0]}
    scores["unused"] = [math.nan] * 5
    result = Evaluation(prompts, scores, 0.5, torch.zeros(0), [], []).averages()
    assert result["num_samples"] == result["num_prompts"] == 5
    assert result["mean"]["total"]["mean"] == pytest.approx(13 / 5)
    assert result["mean"]["part"]["count"] == 3
    assert result["tags"]["x"]["total"]["mean"] == 2 and "part" not in result["tags"]["x"]
    assert result["tags"]["y"]["total"]["mean"] == 3
    over = result["mean_over_tags"]
    errors = [result["tags"][tag]["total"]["stderr"] for tag in "xy"]
    assert over["total"] == pytest.approx({"mean": 2.5, "stderr": math.hypot(*errors) / 2})
    assert over["part"]["mean"] == 2
    assert "unused" not in result["mean"] and "unused" not in over
    json.dumps(result)
    untagged = Evaluation([Prompt("a")], {"total": [1.0]}, math.nan, torch.zeros(0), [], [])
    assert "tags" not in untagged.averages() and untagged.averages()["diversity"] is None


@dataclass(frozen=True)
class Rank(Distributed):
    """A rank whose ``gather_objects`` returns ``parts`` for the other ranks."""

    parts: tuple = ()

    def gather_objects(self, value):
        return [*self.parts[: self.rank], value, *self.parts[self.rank + 1 :]]


def rewards() -> RewardSet:
    return RewardSet.build({"jpeg_compressibility": 1.0, "shapes": 2.0}, CPU)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Seven lines, two of which repeat a prompt."""
    lines = load_prompts("shapes", "test")
    return [lines[0], lines[1], lines[0], lines[2], lines[1], lines[3], lines[4]]


@pytest.fixture(scope="module")
def whole(shapes_model, prompts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return evaluate(
        shapes_model, prompts, rewards(), SETTINGS, dist=ONE, num_images=3, folder=folder
    ), folder


def counting(calls: list, fails=lambda texts: False) -> type[RewardSet]:
    """Rewards that append (names, number of images) to ``calls`` and fail if ``fails(texts)``."""

    class Counting(RewardSet):
        def __call__(self, images, texts, metadata, names):
            if fails(texts):
                raise RewardError("the server is gone")
            calls.append((sorted(self.weights), len(texts)))
            return super().__call__(images, texts, metadata, names)

    return Counting


def test_some_lines_are_the_samples_that_they_are_among_all(whole, prompts, shapes_model, tmp_path):
    chosen = [3, 5]
    some = [prompts[line] for line in chosen]
    result = evaluate(
        shapes_model, some, rewards(), SETTINGS, dist=ONE, lines=chosen, folder=tmp_path
    )
    difference = read_images(tmp_path, chosen).to_float() - read_images(whole[1], chosen).to_float()
    assert float(difference.abs().max()) <= 1 / 255 + 1e-6
    assert result.scores["shapes"] == [whole[0].scores["shapes"][line] for line in chosen]
    write_results(result, tmp_path, settings={})
    text = (tmp_path / "evaluation_results.jsonl").read_text()
    rows = [json.loads(row) for row in text.splitlines()]
    assert [row["sample_id"] for row in rows] == chosen
    assert [row["image_path"] for row in rows] == ["images/000003.png", "images/000005.png"]


def test_every_line_is_a_sample_with_its_own_noise(whole, prompts):
    result, folder = whole
    assert all(len(values) == 7 for values in result.scores.values())
    images = read_images(folder, range(7))
    assert len(list((folder / "images").iterdir())) == 7
    # Lines 0 and 2 have the same prompt and different noise.
    assert float((images.to_float()[0] - images.to_float()[2]).abs().max()) > 0.05
    assert result.image_lines == draw_lines(prompts, 3) != [0, 1, 2]
    assert torch.equal(result.images.pixels, images[result.image_lines].pixels)
    for line, prompt in enumerate(prompts):
        alone = rewards()(images[[line]], [prompt.text], [prompt.metadata])
        ours = {name: values[line] for name, values in result.scores.items()}
        # The scored image is the saved one, with 8 bits per channel.
        assert ours["jpeg_compressibility"] == float(alone.parts["jpeg_compressibility"])
        assert ours["total"] == ours["jpeg_compressibility"] + 2 * ours["shapes"]


@pytest.mark.parametrize("world_size", [2, 5])
def test_any_number_of_ranks_gives_the_same_numbers(whole, shapes_model, prompts, world_size):
    sent = []

    class Listening(Rank):
        def gather_objects(self, value):
            sent.append(value)
            return [value]

    def on(dist):
        return evaluate(shapes_model, prompts, rewards(), SETTINGS, dist=dist)

    # First run each rank alone to record its part (restoring the order may fail), then rank 0 with
    # the parts of the others.
    for rank in range(world_size):
        with contextlib.suppress(IndexError, RuntimeError):
            on(Listening(rank, world_size, rank, CPU))
    assert len(sent) == world_size
    result = on(Rank(0, world_size, 0, CPU, parts=tuple(sent)))
    assert result.scores == whole[0].scores
    # As text, for NaN.
    assert json.dumps(result.averages()) == json.dumps(whole[0].averages())


def test_rescoring_saved_images_needs_no_model(whole, prompts):
    result, folder = whole
    again = rescore(prompts, range(7), rewards(), folder, batch_size=3, dist=ONE)
    assert json.dumps(again.scores) == json.dumps(result.scores)
    assert again.diversity == result.diversity
    with pytest.raises(FileNotFoundError):
        rescore([*prompts, prompts[0]], range(8), rewards(), folder, batch_size=3, dist=ONE)


def test_results_on_disk(whole, prompts, tmp_path):
    result, _ = whole
    save_images(Images.from_float(torch.rand(7, 3, 4, 4)), range(7), tmp_path)
    write_results(result, tmp_path, settings={"seed": 1})
    lines = (tmp_path / "evaluation_results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["sample_id"] for row in rows] == list(range(7))
    assert [row["prompt"] for row in rows] == [p.text for p in prompts]
    assert rows[3]["metadata"] == prompts[3].metadata
    assert rows[3]["scores"]["shapes"] == result.scores["shapes"][3]
    assert (tmp_path / rows[6]["image_path"]).is_file()
    averages = json.loads((tmp_path / "average_scores.json").read_text())
    assert averages["num_samples"] == 7 and averages["num_prompts"] == 5
    mean = math.fsum(result.scores["total"]) / 7
    assert averages["mean"]["total"]["mean"] == mean


def test_saved_images_return_as_they_were(tmp_path):
    values = torch.rand(3, 3, 5, 6)
    values[1, 0, 2, 2] = math.nan
    images = Images.from_float(values)
    save_images(images, [3, 4, 9], tmp_path)
    back = read_images(tmp_path, [3, 4, 9])
    assert torch.equal(back.pixels, images.pixels)
    assert back.finite.tolist() == images.finite.tolist() == [True, False, True]


def test_an_interrupted_evaluation_repeats_no_finished_image(
    whole, shapes_model, prompts, tmp_path
):
    """The results are the same, and only missing images and scores are made."""
    drawn, scored = [], []

    class Counting:
        """The model; counts decoded images."""

        def __getattr__(self, name):
            return getattr(shapes_model, name)

        def decode(self, x0):
            drawn.append(len(x0))
            return shapes_model.decode(x0)

    def num_scored() -> int:
        return sum(count for _, count in scored)

    counted = counting(scored, lambda texts: texts[0] == fails_at).build(rewards().weights, CPU)

    def again():
        drawn.clear()
        scored.clear()
        return evaluate(Counting(), prompts, counted, SETTINGS, dist=ONE, folder=tmp_path)

    # A reward that fails at the third chunk of two lines.
    fails_at = prompts[4].text
    with pytest.raises(RewardError):
        again()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    made, judged, fails_at = len(before), num_scored(), None
    assert made == sum(drawn) >= 6 and 4 <= judged <= 5
    # An image of the second chunk is lost: the whole chunk is sampled again.
    image_path(tmp_path, 3).unlink()
    (tmp_path / "images" / ".tmp-000006.png").write_bytes(b"half an image")
    result = again()
    assert sum(drawn) == 7 - made + 2 and num_scored() == 7 - judged
    assert json.dumps(result.scores) == json.dumps(whole[0].scores)
    assert result.diversity == whole[0].diversity
    for path, stamp in before.items():
        assert path.stat().st_mtime_ns == stamp or path in (
            image_path(tmp_path, 2),
            image_path(tmp_path, 3),
        )
    again()
    assert not drawn and not scored


def test_images_do_not_wait_for_their_scores(shapes_model, prompts, tmp_path):
    """All images are saved before the first score."""
    found = []

    class Slow(RewardSet):
        def __call__(self, images, texts, metadata, names):
            deadline = time.monotonic() + 60
            while len(list(tmp_path.glob("images/0*.png"))) < 7 and time.monotonic() < deadline:
                time.sleep(0.01)
            found.append(len(list(tmp_path.glob("images/0*.png"))))
            return super().__call__(images, texts, metadata, names)

    slow = Slow.build({"shapes": 1.0}, CPU)
    evaluate(shapes_model, prompts, slow, SETTINGS, dist=ONE, folder=tmp_path)
    assert found == [7] * 4


def test_rewards_that_are_added_score_each_image_once(shapes_model, prompts, tmp_path):
    calls = []
    reward = counting(calls, lambda texts: broken and len(calls) == 5)

    options = SimpleNamespace(
        config=SETTINGS, rewards=lambda weights, dist: reward.build(weights, dist.device)
    )

    def names() -> list[list[str]]:
        return [names for names, _ in calls]

    def ask(*names: str) -> dict:
        weights = dict.fromkeys(names, 1.0)
        task = Task("shapes", prompts, list(range(len(prompts))), weights, tmp_path)
        record = {"seed": 1, "rewards": weights, "reward_options": {}, "reward_servers": {}}
        complete(task, options, record, ONE, model=models.pop, keep_images=True)
        return json.loads((tmp_path / "average_scores.json").read_text())

    models, broken = [shapes_model], False
    first = ask("shapes")
    assert names() == [["shapes"]] * 4
    # The added reward fails after one of four chunks; the second call continues with the second.
    broken = True
    with pytest.raises(RewardError):
        ask("shapes", "jpeg_compressibility")
    broken = False
    both = ask("shapes", "jpeg_compressibility")
    assert names()[4:] == [["jpeg_compressibility"]] * 4
    assert both["mean"]["shapes"] == first["mean"]["shapes"]
    assert both["settings"]["rewards"] == {"shapes": 1.0, "jpeg_compressibility": 1.0}
    assert json.loads((tmp_path / "settings.json").read_text()) == both["settings"]
    assert ask("jpeg_compressibility") == both and len(calls) == 8
    # Without results, the images are scored again, without a model.
    (tmp_path / "average_scores.json").unlink()
    assert ask("shapes")["mean"]["shapes"] == first["mean"]["shapes"]


def test_a_folder_has_one_evaluation(tmp_path):
    # Without images, other settings replace the first ones.
    reserve_folder(tmp_path, {"seed": 3}, ONE)
    reserve_folder(tmp_path, {"seed": 1, "lora": "here", "lora_sha256": "a"}, ONE)
    (tmp_path / "images").mkdir()
    reserve_folder(tmp_path, {"seed": 1, "lora": "there", "lora_sha256": "a"}, ONE)
    with pytest.raises(ValueError, match="seed: 1 -> 2"):
        reserve_folder(tmp_path, {"seed": 2, "lora": "here", "lora_sha256": "a"}, ONE)
    with pytest.raises(ValueError, match="lora_sha256: 'a' -> 'b'"):
        reserve_folder(tmp_path, {"seed": 1, "lora": "here", "lora_sha256": "b"}, ONE)
    # A setting that an evaluation of an earlier version does not have was at its default.
    same = {"seed": 1, "lora": "here", "lora_sha256": "a"}
    reserve_folder(tmp_path, same | {"resolution": 512}, ONE)
    with pytest.raises(ValueError, match="resolution: 512 -> 256"):
        reserve_folder(tmp_path, same | {"resolution": 256}, ONE)


def test_a_folder_has_one_set_of_reward_options(tmp_path):
    def record(*names: str, reward_servers=(), **options: object) -> dict:
        served = dict.fromkeys(reward_servers, ("http://gpu7:8000",))
        weights = dict.fromkeys(names, 1.0)
        return {"rewards": weights, "reward_options": {"a": options}, "reward_servers": served}

    reserve_folder(tmp_path, record("a", dtype="fp16"), ONE)
    (tmp_path / "progress").mkdir()
    reserve_folder(tmp_path, record("a", dtype="fp16", batch_size=2, device="cuda:1"), ONE)
    reserve_folder(tmp_path, record("b", dtype="bf16"), ONE)
    reserve_folder(tmp_path, record("a", reward_servers=("a",)), ONE)
    with pytest.raises(ValueError, match=r"reward_options.a: \{'dtype': 'fp16'\} -> \{\}"):
        reserve_folder(tmp_path, record("a"), ONE)


def test_ranks_that_resolve_latest_differently_are_refused(tmp_path):
    theirs = {"seed": 1, "lora": "run/checkpoint-6"}
    for rank in (0, 1):
        dist = Rank(rank, 2, rank, CPU, parts=(theirs,) * 2)
        with pytest.raises(ValueError, match=r"ranks differ in lora: .*give a checkpoint"):
            reserve_folder(tmp_path, {"seed": 1, "lora": "run/checkpoint-4"}, dist)
    assert not list(tmp_path.iterdir())


def test_scores_of_other_options_are_not_taken_for_these(whole, prompts, tmp_path):
    calls = []
    reward = counting(calls, lambda texts: len(calls) == 2)
    shutil.copytree(whole[1] / "images", tmp_path / "images")

    def again(**options: object) -> int:
        """Number of scored images."""
        calls.clear()
        scorer = reward.build({"jpeg_compressibility": 1.0}, CPU)
        scorer.options = {"jpeg_compressibility": options} if options else {}
        with contextlib.suppress(RewardError):
            rescore(prompts, range(7), scorer, tmp_path, batch_size=2, dist=ONE)
        return sum(count for _, count in calls)

    assert again(quality=1) == again() == 4
    # Options that only affect speed are ignored.
    assert again(batch_size=1) == 3


def test_merged_settings_are_those_of_the_last_scores():
    before = {
        "rewards": {"a": 1.0, "b": 1.0},
        "reward_options": {"a": {"x": 1}, "b": {"x": 1}},
        "reward_servers": {"b": ("http://gpu7:8000",)},
    }
    new = {"rewards": {"b": 2.0, "c": 3.0}, "reward_options": {"a": {"x": 2}}, "reward_servers": {}}
    assert merge_settings(before, new) == {
        "rewards": {"a": 1.0, "b": 2.0, "c": 3.0},
        "reward_options": {"a": {"x": 1}},
        "reward_servers": {},
    }
