"""The same command continues an interrupted run to the same weights."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from diffusion_nft.data.prompts import SPLITS, split_file
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.run import StartError, run
from diffusion_nft.runs import state as run_state
from diffusion_nft.runs.checkpoint import Checkpointer, CheckpointError
from diffusion_nft.runs.run_dir import RunDirError
from diffusion_nft.runs.state import is_finished
from diffusion_nft.tracking.metrics import read_metrics
from diffusion_nft.validation.stages import stages_of
from tests.launch import ROOT, environment, make_trainer, smoke, train, train_command, train_here

# Three epochs of two optimizer steps.
SETTINGS = {
    "num_epochs": 3,
    "train.learning_rate": 0.0005,
    "nft.kl_weight": 0.01,
    "log.num_images": 2,
    "eval.at_start": False,
    "eval.num_prompts": 4,
    "eval.num_steps": 2,
}
OVERRIDES = tuple(f"{key}={value}" for key, value in SETTINGS.items())
START_S = 120
CPU = Distributed(0, 1, 0, torch.device("cpu"))


def assert_same_state(run_dir: Path, other: Path) -> None:
    ours, theirs = (Checkpointer(folder).load_latest() for folder in (run_dir, other))
    assert ours is not None and theirs is not None
    assert ours.path.name == theirs.path.name
    states = [{k: v for k, v in c.state.items() if k != "config"} for c in (ours, theirs)]
    assert states[0] == states[1]
    assert ours.tensors.keys() == theirs.tensors.keys()
    for group, expected in theirs.tensors.items():
        assert ours.tensors[group].keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(ours.tensors[group][key], value), (group, key)


def assert_same_log(run_dir: Path, other: Path) -> None:
    ours, theirs = (
        [
            {key: value for key, value in row.items() if not key.startswith("time/")}
            for row in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (run_dir, other)
    )
    assert ours == theirs


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train_here(folder, SETTINGS)
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def kill_within_an_epoch(command: list[str], run_dir: Path) -> None:
    """Starts ``command`` and kills it in the epoch after its first checkpoint."""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        until = time.monotonic() + START_S
        while not (run_dir / "checkpoints" / "checkpoint-2").exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.1)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    assert not (run_dir / "checkpoints" / "checkpoint-6").exists()


@pytest.mark.multiproc
def test_a_killed_run_ends_bitwise_equal_to_an_uninterrupted_one(finished, tmp_path):
    run_dir = tmp_path / "run"
    kill_within_an_epoch(train_command(run_dir, *OVERRIDES), run_dir)
    done = train(run_dir, *OVERRIDES)
    assert "continuing from" in done.stderr
    assert_same_state(run_dir, finished)
    assert_same_log(run_dir, finished)
    epochs = [r["epoch"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss/total" in r]
    assert epochs == [1, 2, 3]


def snapshot(run_dir: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "before_after.png", "checkpoints/checkpoint-6/manifest.json")
    return {name: (run_dir / name).read_bytes() for name in names}


def test_ranks_with_different_weights_are_named_and_nothing_is_saved(tmp_path, monkeypatch):
    trainer = make_trainer(smoke(tmp_path, SETTINGS), CPU)
    monkeypatch.setattr(Distributed, "gather_objects", lambda self, own: [own, "x", own, "x"])
    with pytest.raises(CheckpointError, match="weights of rank 1, 3 differ from those of rank 0"):
        trainer.state.save()
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_finished_run_prints_its_result_and_changes_nothing(copy, capsys):
    before = snapshot(copy)
    # The copy's path differs from that in config.json.
    run(smoke(copy, SETTINGS), CPU)
    printed = capsys.readouterr().out
    assert "best eval/total" in printed and "before_after.png" in printed
    assert snapshot(copy) == before


def test_a_config_that_changes_the_numbers_is_refused_with_a_diff(copy):
    before = snapshot(copy)
    changes = {"train.learning_rate": 0.001, "nft.kl_weight": 0.02}
    with pytest.raises(StartError) as caught:
        run(smoke(copy, SETTINGS | changes), CPU)
    assert "train.learning_rate: 0.0005 -> 0.001" in str(caught.value)
    assert "nft.kl_weight: 0.01 -> 0.02" in str(caught.value)
    assert snapshot(copy) == before


def test_more_epochs_and_other_memory_knobs_continue_a_run(copy, tmp_path):
    rows = read_metrics(copy / "metrics.jsonl")
    images = (copy / "before_after.png").read_bytes()
    knobs = {"sample.batch_size": 5, "perf.embed_cache_gb": 0.0, "checkpoint.keep": 1}
    train_here(copy, SETTINGS | knobs | {"num_epochs": 4})
    assert read_metrics(copy / "metrics.jsonl")[: len(rows)] == rows
    assert (copy / "before_after.png").read_bytes() != images
    # The same weights as four epochs in one run.
    train_here(tmp_path / "four", SETTINGS | {"num_epochs": 4})
    assert_same_state(copy, tmp_path / "four")


def test_a_damaged_last_checkpoint_is_passed_over_although_the_run_was_finished(finished, copy):
    file = copy / "checkpoints" / "checkpoint-6" / "current.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.warns(UserWarning, match="checkpoint-6"):
        (whole,) = stages_of(smoke(copy, SETTINGS))
        assert not is_finished(whole, Checkpointer(copy).load_latest())
    with pytest.warns(UserWarning, match="checkpoint-6"):
        trainer = train_here(copy, SETTINGS)
    assert trainer.state.epoch == 3
    assert_same_state(copy, finished)
    assert_same_log(copy, finished)


def test_another_run_begins_with_the_policies_that_resume_from_names(finished, tmp_path):
    changes = {"train.learning_rate": 0.002, "num_epochs": 1, "resume_from": str(finished)}
    theirs = Checkpointer(finished).load_latest()
    config = smoke(tmp_path / "run", SETTINGS | changes)
    trainer = make_trainer(config, CPU)
    assert theirs is not None
    for adapter in ("current", "old", "ema"):
        for key, value in trainer.policy.state(adapter).items():
            assert torch.equal(value, theirs.tensors[adapter][key])
    assert (trainer.state.epoch, trainer.learner.step) == (0, 0)
    assert not trainer.learner.optimizer.state
    assert trainer.learner.optimizer.param_groups[0]["lr"] == 0.002
    # Once it has a checkpoint of its own, the run continues from that.
    trained = train_here(tmp_path / "run", SETTINGS | changes)
    again = train_here(tmp_path / "run", SETTINGS | changes)
    assert (again.state.epoch, again.learner.step) == (1, 2)
    for key, value in again.policy.state("current").items():
        assert torch.equal(value, trained.policy.state("current")[key])


def test_a_run_is_finished_where_fewer_epochs_are_wanted_than_it_has(tmp_path):
    settings = SETTINGS | {"eval_freq": 0, "sample.num_groups": 1}
    train_here(tmp_path, settings)
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-6")
    newest = Checkpointer(tmp_path).load_latest()
    assert newest is not None and newest.state["epoch"] == 2 and not newest.state["evaluated"]
    fewer = settings | {"num_epochs": 1}
    trainer = train_here(tmp_path, fewer)
    assert trainer.state.epoch == 2 and trainer.state.evaluated
    (whole,) = stages_of(smoke(tmp_path, fewer))
    assert is_finished(whole, Checkpointer(tmp_path).load_latest())


def write_prompts(folder: Path, lines: slice) -> None:
    folder.mkdir(exist_ok=True)
    for split in SPLITS:
        text = split_file("shapes", split).read_text().splitlines(keepends=True)
        (folder / f"{split}_metadata.jsonl").write_text("".join(text[lines]))


def test_a_run_on_changed_prompts_compares_nothing_with_the_former_ones(tmp_path):
    prompts, run_dir = tmp_path / "prompts", tmp_path / "run"
    write_prompts(prompts, slice(-4, None))
    settings = SETTINGS | {"dataset": str(prompts), "log.num_images": 0, "eval.num_steps": 10}
    settings |= {"monitor.max_image_change": 0.001, "monitor.max_diversity_drop": 0.001}
    train_here(run_dir, settings | {"num_epochs": 1})
    (first,) = [row for row in read_metrics(run_dir / "metrics.jsonl") if "eval/total" in row]
    write_prompts(prompts, slice(0, 4))
    settings["num_epochs"] = 2
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(RunDirError, match=r"train_metadata(?s:.*)test_metadata.jsonl: SHA-256"):
        make_trainer(smoke(run_dir, settings), CPU)
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    allowed = train_here(run_dir, settings | {"allow_changed_prompts": True})
    rows = read_metrics(run_dir / "metrics.jsonl")
    last = rows[-1]
    assert "test_set" not in first and last["test_set"] == 1
    # The best is of the new prompts, whose scores are not compared with the former ones.
    on_new = [row["eval/total"] for row in rows if row.get("test_set")]
    assert allowed.state.best_score == max(on_new) < first["eval/total"]
    assert last["monitor/alarms"] == 0
    assert allowed.monitor.state["x0_rms"] == rows[-2]["reward/x0_rms"]
    # From now on, the run's files are the new ones.
    again = make_trainer(smoke(run_dir, settings), CPU)
    assert again.state.test_set == 1 and again.state.best_score == allowed.state.best_score


def test_a_checkpoint_of_an_earlier_version_is_continued(tmp_path, monkeypatch):
    trainer = train_here(tmp_path / "run", SETTINGS | {"num_epochs": 1})
    real = run_state.load_checkpoint

    def earlier(path: Path):
        checkpoint = real(path)
        for key in ("prompts", "test_set"):
            del checkpoint.state[key]
        for key in ("eval.guidance_scale", "eval.batch_size", "pretrained.revision"):
            del checkpoint.state["config"][key]
        return checkpoint

    newest = Checkpointer(tmp_path / "run").latest()
    assert newest is not None and trainer.state.best_score is not None
    again = smoke(tmp_path / "run", SETTINGS)
    best, trainer.state.best_score = trainer.state.best_score, None
    trainer.state.start(earlier(newest))
    assert trainer.state.best_score == best and "evaluation" in trainer.monitor.state
    # The same as the source of another run's policies.
    monkeypatch.setattr(run_state, "load_checkpoint", earlier)
    again.resume_from, again.save_dir = again.save_dir, str(tmp_path / "other")
    assert run_state.starting_modules(again, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train.lora_alpha": 32}, "train.lora_alpha = 32, there 64"),
        ({"train.lora_rank": 8}, "train.lora_rank = 8, there 32"),
    ],
)
def test_policies_that_would_mean_something_else_are_refused(finished, tmp_path, change, words):
    config = smoke(tmp_path / "run", SETTINGS | change | {"resume_from": str(finished)})
    with pytest.raises(ValueError, match=words):
        make_trainer(config, CPU)
