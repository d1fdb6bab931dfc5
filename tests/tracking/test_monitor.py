"""Alarms and their actions."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion_nft.algorithms import Algorithm, build_algorithm
from diffusion_nft.data.prompts import Prompt
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.evaluation.results import Evaluation
from diffusion_nft.images import Images
from diffusion_nft.rewards import build_reward
from diffusion_nft.tracking.monitor import Alarm, Monitor
from tests.launch import make_trainer, one_thread, smoke

CPU = torch.device("cpu")


def weighted(kl_weight: float) -> Algorithm:
    return build_algorithm(smoke(Path(), {"nft.kl_weight": kl_weight}))


def evaluation(
    shift: float = 0.0, diversity: float = 0.2, brightness: float = 0.5, part: float = 0.5
) -> Evaluation:
    """Ten prompts with rewards 0 to 9, shifted by ``shift``, and the same ``part``."""
    prompts = [Prompt(f"prompt {i}", {}) for i in range(10)]
    scores = {
        "total": [0.5] * 10,
        "clipscore": [i + shift for i in range(10)],
        "clipscore/part": [part] * 10,
        "image_statistics": [brightness] * 10,
    }
    return Evaluation(prompts, scores, diversity, Images.concatenate([]), [], [])


def flags(values: dict[str, float]) -> dict[str, float]:
    """The flags of ``monitor/alarm/*`` by name."""
    start = "monitor/alarm/"
    return {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}


def make_monitor(tmp_path, **limits) -> tuple[Monitor, list[str]]:
    settings = {f"monitor.{key}": value for key, value in limits.items()}
    config = smoke(tmp_path, settings)
    said: list[str] = []
    return Monitor(config, weighted(0.1), lambda text, level: said.append(text)), said  # pyright: ignore


# The error of the held-out mean is sqrt(10/9 * 82.5) / 10 = 0.957, that of a difference 1.354.
@pytest.mark.parametrize(
    ("change", "alarm"),
    [
        ({"shift": 3.0}, ""),
        ({"shift": -4.0}, ""),  # 2.95 errors
        ({"shift": -4.2}, "eval/clipscore fell from 4.5 to 0.3, 3.1 SE"),
        ({"part": 0.3}, "eval/clipscore/part fell from 0.5 to 0.3"),
        ({"diversity": 0.15}, ""),
        ({"diversity": 0.13}, "eval/diversity fell from 0.2 to 0.13"),
        ({"diversity": math.nan}, ""),
        ({"brightness": 0.7}, "eval/image_statistics went from 0.5 to 0.7"),
    ],
)
def test_an_evaluation_is_compared_with_a_former_one(tmp_path, change, alarm):
    monitor, said = make_monitor(tmp_path)
    values = monitor.evaluation(evaluation())
    assert values["monitor/alarms"] == 0 and values["monitor/kl_factor"] == 1.0
    assert set(flags(values)) == {
        "eval/total",
        "eval/clipscore",
        "eval/clipscore/part",
        "eval/diversity",
        "eval/image_statistics",
    }
    assert not any(flags(values).values())
    values = monitor.evaluation(evaluation(**change))
    assert values["monitor/alarms"] == bool(alarm)
    measured = "eval/diversity" in flags(values)
    assert measured == (not math.isnan(change.get("diversity", 0.0)))
    named = {name: int(alarm.startswith(f"{name} ")) for name in flags(values)}
    assert flags(values) == named and sum(named.values()) == bool(alarm)
    assert said == ([f"alarm: {alarm}"] if alarm else [])
    assert monitor.progress() == ({"alarms": 1} if alarm else {})
    monitor.stop_if_alarmed()  # only if the action is "stop"


def test_a_score_is_compared_with_the_best_that_it_was(tmp_path):
    monitor, said = make_monitor(tmp_path)
    for shift in (0.0, 4.0, 2.0):
        assert not any(flags(monitor.evaluation(evaluation(shift))).values())
    # A resumed run remembers the best.
    resumed, said = make_monitor(tmp_path)
    resumed.load_state_dict(json.loads(json.dumps(monitor.state)))
    values = resumed.evaluation(evaluation(-1.5))
    assert [name for name, on in flags(values).items() if on] == ["eval/clipscore"]
    assert said == ["alarm: eval/clipscore fell from 8.5 to 3, 4.1 SE"]
    # Brightness is compared with the first.
    for brightness in (0.64, 0.36):
        values = monitor.evaluation(evaluation(brightness=brightness))
        assert not flags(values)["eval/image_statistics"]


def test_scores_are_compared_by_tag(tmp_path):
    monitor, said = make_monitor(tmp_path)
    of_tag = {"counting": 20, "colors": 20, "position": 19}
    tags = [tag for tag, count in of_tag.items() for _ in range(count)]
    prompts = [Prompt(f"prompt {i}", {"tag": tag}) for i, tag in enumerate(tags)]

    def tagged(counting: float = 0.0, position: float = 0.0) -> Evaluation:
        low = {"counting": counting, "colors": 0.0, "position": position}
        score = [float(i % 2) + low[tag] for i, tag in enumerate(tags)]
        scores = {"total": score, "clipscore": score, "clipscore/part": score}
        scores |= {"image_statistics": [0.5] * len(tags)}
        return replace(evaluation(), prompts=prompts, scores=scores)

    values = monitor.evaluation(tagged())
    names = {"total", "clipscore", "image_statistics", "diversity"}
    names |= {"clipscore/part", "tag/counting", "tag/colors"}
    assert set(flags(values)) == {f"eval/{name}" for name in names}
    # Of 20 with a deviation of 0.5 the error is 0.5 / sqrt(19), that of a difference 0.162; over
    # all 59 lines the fall is a third as large, against 0.093.
    values = monitor.evaluation(tagged(counting=-0.7))
    assert [name for name, on in flags(values).items() if on] == ["eval/tag/counting"]
    # 19 lines per tag are too few.
    values = monitor.evaluation(tagged(position=-0.7))
    assert not any(flags(values).values())
    assert said == ["alarm: eval/tag/counting/clipscore fell from 0.5 to -0.2, 4.3 SE"]


def test_a_line_names_a_few_alarms(tmp_path):
    monitor, said = make_monitor(tmp_path)
    monitor.evaluation(evaluation())
    values = monitor.evaluation(evaluation(-9.0, 0.01, 0.9, 0.1))
    assert sum(flags(values).values()) == 4 and "more" not in said[0]
    monitor, said = make_monitor(tmp_path, max_kl=0.5)
    monitor.evaluation(evaluation())
    for _ in range(2):
        monitor.epoch({"reward/x0_rms": 1.0, "loss/kl": 1.0})
    monitor.evaluation(evaluation(-9.0, 0.01, 0.9, 0.1))
    assert said[1].endswith("; 1 more") and said[1].count(";") == 4


def test_a_single_prompt_has_no_error_to_compare_by(tmp_path):
    monitor, said = make_monitor(tmp_path)
    for shift in (0.0, -9.0):
        one = evaluation(shift)
        scores = {name: values[:1] for name, values in one.scores.items()}
        values = monitor.evaluation(replace(one, prompts=one.prompts[:1], scores=scores))
        assert set(flags(values)) == {"eval/diversity", "eval/image_statistics"}
    assert not said


def test_an_epoch_is_compared_with_the_first(tmp_path):
    monitor, said = make_monitor(tmp_path, max_kl=0.05)
    values = monitor.epoch({"reward/x0_rms": 1.0, "loss/kl": 0.01})
    assert flags(values) == {"loss/kl": 0, "reward/x0_rms": 0}
    monitor.epoch({"reward/x0_rms": 1.2, "loss/kl": 0.05})
    assert not said
    values = monitor.epoch({"reward/x0_rms": 1.4, "loss/kl": 0.06})
    assert flags(values) == {"loss/kl": 1, "reward/x0_rms": 1}
    assert said == [
        "alarm: loss/kl, the distance to the reference, is 0.06 (max_kl 0.05); reward/x0_rms went "
        "from 1 to 1.4"
    ]


def test_actions(tmp_path):
    kl = {"reward/x0_rms": 1.0, "loss/kl": 1.0}
    off, said = make_monitor(tmp_path, action="off", max_kl=0.5)
    assert off.epoch(kl) == {} and not said
    # A lasting excess is one alarm, and another at each evaluation.
    raising, said = make_monitor(tmp_path, action="raise_kl", max_kl=0.5)
    values = [raising.epoch(kl) for _ in range(3)][-1]
    assert flags(values) == {"loss/kl": 1, "reward/x0_rms": 0}
    assert (values["monitor/alarms"], values["monitor/kl_factor"]) == (1, 2.0)
    values = raising.evaluation(evaluation())
    assert (values["monitor/alarms"], values["monitor/kl_factor"]) == (2, 4.0)
    assert raising.algorithm.kl_weight == pytest.approx(0.4)
    assert said[-1].endswith("the weight of the KL term is now 0.4")
    # A resumed run continues with the raised weight and the first evaluation.
    resumed, said = make_monitor(tmp_path, action="raise_kl")
    resumed.load_state_dict(json.loads(json.dumps(raising.state)))
    assert resumed.algorithm.kl_weight == pytest.approx(0.4)
    resumed.epoch(kl)  # without max_kl no alarm
    resumed.evaluation(evaluation(diversity=0.01))
    assert "eval/diversity fell from 0.2 to 0.01" in said[0]
    # Under other evaluation settings the next one is the first; a new name is watched from then.
    resumed.forget("evaluation")
    resumed.evaluation(evaluation(diversity=0.01))
    assert len(said) == 1
    for _ in range(20):
        resumed.evaluation(evaluation(shift=-9.0, diversity=0.01))
    assert resumed.state["kl_factor"] == 64.0
    stopping, _ = make_monitor(tmp_path, action="stop", max_kl=0.5)
    stopping.stop_if_alarmed()
    stopping.epoch(kl)
    # A lasting excess is not a new alarm of the resumed run.
    resumed, said = make_monitor(tmp_path, action="stop", max_kl=0.5)
    resumed.load_state_dict(json.loads(json.dumps(stopping.state)))
    assert resumed.epoch(kl)["monitor/alarms"] == 1 and not said
    resumed.stop_if_alarmed()
    resumed.evaluation(evaluation())
    assert len(said) == 1
    with pytest.raises(Alarm, match=r"loss/kl.*monitor\.action = 'stop'"):
        stopping.stop_if_alarmed()


def test_a_run_stops_after_saving_and_its_log_tells_why(tmp_path, capsys):
    settings = {
        "num_epochs": 3,
        "monitor.max_kl": 1e-12,
        "monitor.image_statistics": True,
        "sample.num_groups": 1,
        "eval.num_prompts": 2,
        "eval.num_steps": 2,
    }
    with one_thread(), pytest.raises(Alarm):
        config = smoke(tmp_path, settings | {"monitor.action": "stop"})
        make_trainer(config, Distributed(0, 1, 0, CPU)).run()
    out = capsys.readouterr().err
    assert "alarm: loss/kl" in out and "an alarm; the state of epoch 1 is being saved" in out
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["monitor/alarms"] for row in rows if "monitor/alarms" in row] == [0, 1, 1]
    assert "eval/image_statistics/edges" in rows[0]
    # The same run continues under another action.
    with one_thread():
        config = smoke(tmp_path, settings | {"monitor.action": "warn"})
        trainer = make_trainer(config, Distributed(0, 1, 0, CPU))
        assert trainer.state.epoch == 1 and trainer.monitor.state["alarms"] == 1
        trainer.run()
    assert trainer.monitor.state["alarms"] == 3


def test_image_statistics():
    score = build_reward("image_statistics", CPU)
    images = torch.zeros(3, 3, 4, 4)
    images[1, 0] = 1.0  # pure red
    images[2, :, :, ::2] = 1.0  # white and black columns
    output = score(images, [""] * 3, [{}] * 3)
    torch.testing.assert_close(output.scores, torch.tensor([0.0, 1 / 3, 0.5]))
    torch.testing.assert_close(output.components["saturation"], torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(output.components["edges"], torch.tensor([0.0, 0.0, 0.5]))
