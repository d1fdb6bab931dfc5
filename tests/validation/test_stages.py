"""Runs in stages: their configurations, refusals, and the same weights after an interruption."""

import json
import re
import shutil
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict

from diffusion_nft import run as run_module
from diffusion_nft.build import build_trainer
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.rewards import REWARDS
from diffusion_nft.rewards.combine import RewardError
from diffusion_nft.run import StartError, run
from diffusion_nft.runs.checkpoint import Checkpointer, load_checkpoint
from diffusion_nft.runs.run_dir import RunDirError, check_run_dir, write_config
from diffusion_nft.tracking.evaluator import Evaluator
from diffusion_nft.tracking.metrics import read_metrics
from diffusion_nft.tracking.plan import outline
from diffusion_nft.trainer import Trainer
from diffusion_nft.validation.flat import flatten
from diffusion_nft.validation.schema import ConfigError, validate
from diffusion_nft.validation.stages import stages_of
from tests.launch import make_trainer, one_thread, smoke
from tests.runs.test_resume import assert_same_log, assert_same_state

CPU = Distributed(0, 1, 0, torch.device("cpu"))
STAGES = (
    {"num_epochs": 2},
    {
        "num_epochs": 1,
        "reward_fn": {"jpeg_compressibility": 2.0, "shapes": 1.0},
        "nft.beta": 0.5,
        "train.learning_rate": 0.002,
        "eval.num_prompts": 3,
    },
    {"num_epochs": 1, "nft.old_policy_decay": "constant_09"},
)
# Trained here: a boundary between stages, and one within the first.
TWO = STAGES[:2]
# As small as an epoch can be.
TINY = {
    "num_epochs": 100,
    "sample.num_groups": 1,
    "sample.num_image_per_prompt": 2,
    "sample.num_steps": 2,
    "train.gradient_step_per_epoch": 1,
    "train.lr_half_life": 0.0,
    "eval.num_prompts": 2,
    "eval.num_steps": 2,
    "checkpoint.keep": 0,
    "log.image_freq": 0,
    "log.num_images": 1,
}


def staged(run_dir: Path, overrides: dict | None = None) -> ConfigDict:
    return smoke(run_dir, TINY | {"stages": STAGES} | (overrides or {}))


def train(config: ConfigDict) -> None:
    with one_thread():
        run(config, CPU)


def rows_of(run_dir: Path) -> list[dict]:
    return read_metrics(run_dir / "metrics.jsonl")


def config_of(run_dir: Path, step: int) -> dict:
    return load_checkpoint(run_dir / "checkpoints" / f"checkpoint-{step}").state["config"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An uninterrupted run with stages of epochs 1 and 2, and 3."""
    folder = tmp_path_factory.mktemp("stages") / "run"
    models: list[weakref.ref] = []

    def build(*args):
        assert all(model() is None for model in models), "two models would not fit a GPU"
        trainer = build_trainer(*args)
        models.append(weakref.ref(trainer.model.pipe.transformer))
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion_nft.run.build_trainer", build)
        train(staged(folder, {"stages": TWO}))
    assert len(models) == 2
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_stage_is_the_config_with_what_it_sets(tmp_path):
    config = staged(tmp_path)
    before = flatten(config)
    stages = stages_of(config)
    assert flatten(config) == before
    assert [(s.number, s.count, s.first_epoch, s.config.num_epochs) for s in stages] == [
        (1, 3, 0, 2),
        (2, 3, 2, 3),
        (3, 3, 3, 4),
    ]
    plain = flatten(smoke(tmp_path, TINY))
    changed = [
        {key: value for key, value in flatten(stage.config).items() if plain.get(key) != value}
        for stage in stages
    ]
    assert changed == [
        {"num_epochs": 2},
        {
            "num_epochs": 3,
            "reward_fn.jpeg_compressibility": 2.0,
            "nft.beta": 0.5,
            "train.learning_rate": 0.002,
            "eval.num_prompts": 3,
        },
        {"num_epochs": 4, "nft.old_policy_decay": "constant_09"},
    ]
    for stage in stages:
        assert stage.config.is_locked and not stage.config.stages
        validate(stage.config)


def test_rewards_of_a_stage_replace_those_of_the_config(tmp_path):
    one = {"num_epochs": 1, "reward_fn": {"jpeg_compressibility": 1.0}}
    (stage,) = stages_of(staged(tmp_path, {"stages": (one,)}))
    assert stage.config.reward_fn.to_dict() == {"jpeg_compressibility": 1.0}


def test_num_epochs_caps_the_stages(tmp_path):
    ends = {
        cap: [s.config.num_epochs for s in stages_of(staged(tmp_path, {"num_epochs": cap}))]
        for cap in (1, 2, 3, 100)
    }
    assert ends == {1: [1], 2: [2], 3: [2, 3], 100: [2, 3, 4]}
    (whole,) = stages_of(smoke(tmp_path, {"num_epochs": 7}))
    assert (whole.number, whole.first_epoch, whole.config.num_epochs) == (0, 0, 7)


def test_servers_and_options_go_to_the_stages_whose_rewards_need_them(tmp_path):
    config = staged(tmp_path)
    with config.reward_servers.unlocked(), config.reward_options.unlocked():
        config.reward_servers.jpeg_compressibility = ("http://gpu7:8000",)
        config.reward_options.shapes = {"device": "cpu"}
    validate(config)
    first, second, _ = (stage.config for stage in stages_of(config))
    assert first.reward_servers.to_dict() == {}
    assert second.reward_servers.to_dict() == {"jpeg_compressibility": ("http://gpu7:8000",)}
    assert "shapes" in first.reward_options and "shapes" in second.reward_options
    with config.reward_servers.unlocked():
        config.reward_servers.ocr = ("http://gpu7:8000",)
    with pytest.raises(ConfigError, match="'ocr' is neither in reward_fn nor") as caught:
        validate(config)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (3, "stages = 3: must be a tuple of mappings, such as"),
        (({"num_epochs": 1}, "x"), "must be a tuple of mappings"),
        (({"dataset": "ocr"},), "stage 1: num_epochs = None: must be an integer >= 1"),
        (({"num_epochs": True},), "stage 1: num_epochs = True: must be an integer >= 1"),
        (({"num_epochs": 1, "train.lora_rank": 3},), "train.lora_rank = 3: must be the same"),
        (({"num_epochs": 1, "train.adam_beta1": 0.5},), "a stage may set num_epochs, dataset"),
        (({"num_epochs": 1, "nft": {}},), "nft = {}: must be the same in all stages"),
        (({"num_epochs": 1, 7: 7},), "7 = 7: must be the same in all stages"),
    ],
)
def test_the_form_of_stages(tmp_path, stages, words):
    config = smoke(tmp_path)
    with config.ignore_type():
        config.stages = stages
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert words in str(caught.value) and len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"nft.betta": 1.0}, "nft.betta = 1.0: is an unknown key; did you mean nft.beta?"),
        ({"reward_fn": {"shape": 1.0}}, "'shape' is unknown (did you mean 'shapes'?)"),
        ({"reward_fn": 3}, "reward_fn = 3: must map reward names to weights"),
        (
            {"eval.held_out_rewards": ("shapes",)},
            "'shapes' is in reward_fn, and so evaluated anyway",
        ),
        ({"train.gradient_step_per_epoch": 9}, "at most 4 steps"),
    ],
)
def test_each_stage_is_checked_as_a_whole(tmp_path, change, problem):
    config = smoke(tmp_path, {"stages": ({"num_epochs": 1}, {"num_epochs": 1} | change)})
    with pytest.raises(ConfigError) as caught:
        validate(config)
    (line,) = caught.value.problems
    assert line.startswith("stage 2: ") and problem in line


def test_problems_of_the_run_and_of_its_stages_are_told_together(tmp_path):
    config = staged(tmp_path, {"save_dir": "", "num_epochs": 0})
    config.stages = (*STAGES, {"num_epochs": 1, "nft.kl_weight": -1.0})
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert [problem.split(" = ")[0] for problem in caught.value.problems] == [
        "num_epochs",
        "save_dir",
        "stage 4: nft.kl_weight",
    ]


def test_other_stages_are_refused_by_name_but_for_what_may_change(tmp_path):
    def change(**second: object) -> None:
        stages = (STAGES[0], STAGES[1] | second, STAGES[2])
        check_run_dir(staged(tmp_path, {"stages": stages}))

    write_config(staged(tmp_path))
    for second, line in (
        ({"nft.beta": 0.25}, "stages.2.nft.beta: 0.5 -> 0.25"),
        ({"num_epochs": 2}, "stages.2.num_epochs: 1 -> 2"),
        ({"dataset": "ocr"}, "stages.2.dataset: '(absent)' -> 'ocr'"),
    ):
        with pytest.raises(RunDirError, match=re.escape(line)):
            change(**second)
    change(**{"eval.num_prompts": 5, "sample.batch_size": 1})
    check_run_dir(staged(tmp_path, {"num_epochs": 3}))
    # Without stages there are no such keys.
    assert not [key for key in flatten(smoke(tmp_path)) if key.startswith("stages")]


def test_the_plan_names_the_stage(tmp_path):
    _, second, _ = stages_of(staged(tmp_path))
    assert outline(second) == (
        "stage 2 of 3: epochs 3 to 3 (1) on the prompts of shapes, "
        "reward 2 jpeg_compressibility + 1 shapes"
    )
    (whole,) = stages_of(smoke(tmp_path))
    assert outline(whole).startswith("the run: epochs 1 to 2 (2) on")


def test_every_row_and_result_names_its_stage(finished):
    rows = [
        (row["stage"], row["step"], row["epoch"], "eval" if "eval/total" in row else "train")
        for row in rows_of(finished)
    ]
    assert rows == [
        (1, 0, 0, "eval"),
        (1, 1, 1, "train"),
        (1, 1, 1, "eval"),
        (1, 2, 2, "train"),
        (1, 2, 2, "eval"),
        (2, 2, 2, "eval"),
        (2, 3, 3, "train"),
        (2, 3, 3, "eval"),
    ]
    written = finished.glob("eval/*/*/average_scores.json")
    folders = sorted(str(path.parent.relative_to(finished)) for path in written)
    assert folders == [
        f"eval/stage-{stage}/epoch-{epoch:06d}"
        for stage, epoch in ((1, 0), (1, 1), (1, 2), (2, 2), (2, 3))
    ]
    grids = sorted(path.stem for path in finished.glob("images/eval*.png"))
    assert grids == [folder.replace("/epoch", "").replace("/", "_") for folder in folders]
    scores = finished / "eval/stage-2/epoch-000002/average_scores.json"
    assert json.loads(scores.read_text())["settings"] == {"epoch": 2, "stage": 2}
    for number in (1, 2):
        assert (finished / f"before_after_stage{number}.png").stat().st_size > 0


def test_each_stage_trains_and_evaluates_as_it_says_and_counts_go_on(finished):
    trained = [row for row in rows_of(finished) if "loss/total" in row]
    assert [row["optim/learning_rate"] for row in trained] == [0.001, 0.001, 0.002]
    # min(0.001 s, 0.5) of the run's optimizer steps, not of the stage's.
    decays = [row["optim/old_policy_decay"] for row in trained]
    assert decays == pytest.approx([0.001, 0.002, 0.003])
    assert ["reward/jpeg_compressibility" in row for row in trained] == [False, False, True]
    evaluated = [row for row in rows_of(finished) if "eval/total" in row]
    assert [row["eval/num_samples"] for row in evaluated] == [2, 2, 2, 3, 3]
    assert [config_of(finished, step)["num_epochs"] for step in (1, 2, 3)] == [2, 2, 3]
    assert config_of(finished, 3)["reward_fn.jpeg_compressibility"] == 2.0
    assert "reward_fn.jpeg_compressibility" not in config_of(finished, 2)


def test_the_best_is_of_the_last_stage(finished):
    latest = Checkpointer(finished).load_latest()
    assert latest is not None
    evaluated = [row["eval/total"] for row in rows_of(finished) if "eval/total" in row]
    # Not of its start, which is the checkpoint of the previous stage.
    assert latest.state["best_score"] == evaluated[-1]
    assert Checkpointer(finished).best() == latest.path


def test_stages_are_one_run_continued_under_other_configs(finished, tmp_path):
    for stage in stages_of(staged(tmp_path, {"stages": TWO})):
        alone = stage.config.copy_and_resolve_references()
        alone.eval.at_start = False
        (tmp_path / "config.json").unlink(missing_ok=True)
        with one_thread():
            make_trainer(alone, CPU).run()
    ours, theirs = (Checkpointer(folder).load_latest() for folder in (finished, tmp_path))
    assert ours is not None and theirs is not None and ours.path.name == theirs.path.name
    for group, tensors in theirs.tensors.items():
        for key, value in tensors.items():
            assert torch.equal(ours.tensors[group][key], value), (group, key)


class Kill(BaseException):
    """A kill, which nothing may catch."""


def kill(*args, **kwargs):
    raise Kill


def when(condition, method, error=Kill):
    """``method``, preceded by an ``error`` while ``condition`` of its first argument holds."""

    def wrapped(first, *args, **kwargs):
        if condition(first):
            raise error
        return method(first, *args, **kwargs)

    return wrapped


def test_a_run_killed_anywhere_ends_as_the_uninterrupted_one(finished, tmp_path, monkeypatch):
    config = staged(tmp_path / "run", {"stages": TWO})
    drawn = tmp_path / "run" / "before_after_stage1.png"
    moments = (
        (Trainer, "_run_epoch", lambda t: t.state.epoch == 1),  # within a stage
        (Evaluator, "finish", lambda e: e.stage.number == 1),  # its end is saved, no images drawn
        (run_module, "build_trainer", lambda _: drawn.exists()),  # between the stages
        (Evaluator, "evaluate", lambda e: e.stage.number == 2),  # the next one's first evaluation
        (Trainer, "_run_epoch", lambda t: t.stage.number == 2),  # after it
    )
    for owner, name, condition in moments:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, when(condition, getattr(owner, name)))
            with pytest.raises(Kill):
                train(config)
    # After a reward's failure there, the first evaluation is saved, as one of the second stage.
    with monkeypatch.context() as patch:
        fails = when(lambda t: t.stage.number == 2, Trainer._run_epoch, RewardError("failed"))
        patch.setattr(Trainer, "_run_epoch", fails)
        with pytest.raises(RewardError):
            train(config)
    saved = Checkpointer(tmp_path / "run").load_latest()
    assert saved is not None and saved.path.name == "checkpoint-2"
    assert (saved.state["stage"], saved.state["evaluated"]) == (2, True)
    train(config)
    assert_same_state(tmp_path / "run", finished)
    assert_same_log(tmp_path / "run", finished)
    for path in finished.glob("before_after*.png"):
        assert (tmp_path / "run" / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_end_of_a_stage_takes_the_run_back_into_it(finished, copy):
    config = staged(copy, {"stages": TWO})
    shutil.rmtree(copy / "checkpoints" / "checkpoint-3")
    (copy / "checkpoints" / "checkpoint-2" / "current.safetensors").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(OSError, match="is of epoch 1; stage 2 of 2 begins after epoch 2"):
            make_trainer(config, CPU, stages_of(config)[1])
        train(config)
    assert_same_state(copy, finished)
    assert_same_log(copy, finished)


def test_a_finished_run_tells_the_gain_of_each_stage_and_loads_no_model(
    finished, monkeypatch, capsys
):
    monkeypatch.setattr("diffusion_nft.run.build_trainer", kill)
    before = (finished / "metrics.jsonl").read_bytes()
    train(staged(finished, {"stages": TWO}))
    told = capsys.readouterr().out
    heads = [line.split() for line in told.splitlines() if line.startswith("stage")]
    assert heads == [
        ["stage", "1", "epoch", "0", "epoch", "2", "gain"],
        ["stage", "2", "epoch", "2", "epoch", "3", "gain"],
    ]
    assert told.count("before_after_stage") == 2
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_what_a_later_stage_lacks_stops_the_run_at_its_start(tmp_path, monkeypatch):
    monkeypatch.setitem(REWARDS, "missing", f"{__name__}:Missing")
    stages = ({"num_epochs": 1}, {"num_epochs": 1, "reward_fn": {"missing": 1.0}})
    config = staged(tmp_path, {"stages": stages})
    with pytest.raises(StartError, match="ImportError: pip install missing"):
        train(config)
    assert not list(tmp_path.iterdir())


class Missing:
    """A reward whose package is not there."""

    def __init__(self, device):
        del device
        raise ImportError("pip install missing")
