"""metrics.jsonl under kills, NaN and resumes; wandb and tensorboard off, absent or broken."""

import json
import math
import platform
import sys
from pathlib import Path

import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image

from diffusion_nft.images import Images
from diffusion_nft.runs.environment import write_environment
from diffusion_nft.tracking.metrics import Metrics, Timer, read_metrics

FOREIGN, CAPTIONS = Images.from_float(torch.zeros(2, 3, 8, 8)), ["a circle", "一只猫"]
R = torch.tensor([1.0, 0.25, math.nan, 0.5, 0.0, 0.75])
QUARTILES_OF_R = {f"reward/optimality_q{100 * q:.0f}": q for q in (0.25, 0.5, 0.75)}


def config(**log) -> ConfigDict:
    settings = {"wandb": "off", "wandb_project": "p", "tensorboard": False} | log
    return ConfigDict({"run_name": "", "seed": 1, "log": settings})


def lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def test_a_line_is_valid_json_and_written_immediately(tmp_path):
    with Metrics(config(), tmp_path / "run") as metrics:
        values = {
            "reward/mean": 0.1,
            "reward/tag": math.nan,
            "loss/total": -math.inf,
            "optim/skipped": 3,
            "optim/norm": torch.tensor(2.5).item(),
            "reward/optimality": R,
        }
        metrics.log(values, step=4, epoch=2)
        (line,) = lines(tmp_path / "run")

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    assert (
        json.loads(line, parse_constant=refuse)
        == {
            "step": 4,
            "epoch": 2,
            "reward/mean": 0.1,
            "reward/tag": None,
            "loss/total": None,
            "optim/skipped": 3,
            "optim/norm": 2.5,
        }
        | QUARTILES_OF_R
    )


def test_truncate_drops_what_comes_after_the_checkpoint(tmp_path):
    with Metrics(config(), tmp_path) as metrics:
        for epoch in range(1, 6):
            metrics.log({"reward/mean": epoch / 3}, step=2 * epoch, epoch=epoch)
    before = lines(tmp_path)
    with Metrics(config(), tmp_path) as metrics:
        metrics.truncate(6)
        assert lines(tmp_path) == before[:3]
        for epoch in range(4, 6):
            metrics.log({"reward/mean": epoch / 3}, step=2 * epoch, epoch=epoch)
    assert lines(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_run_that_starts_over_keeps_its_metrics_aside(tmp_path):
    for value in (1.0, 2.0):
        with Metrics(config(), tmp_path) as metrics:
            metrics.truncate(-1)
            metrics.log({"a": value}, step=0, epoch=1)
    Metrics(config(), tmp_path).truncate(-1)
    kept = [read_metrics(tmp_path / f"metrics.jsonl.{n}")[0]["a"] for n in (1, 2)]
    assert kept == [1.0, 2.0] and not read_metrics(tmp_path / "metrics.jsonl")


def test_truncate_by_epoch_and_stage_where_the_step_stood_still(tmp_path):
    with Metrics(config(), tmp_path) as metrics:
        for stage, epoch in ((1, 1), (1, 2), (1, 3), (2, 3)):
            metrics.log({"stage": stage}, step=7, epoch=epoch)
        for upto, left in (
            ((7,), 4),
            ((7, 3, 2), 4),
            ((7, 3, 1), 3),
            ((7, 2), 2),
            ((-1,), 0),
        ):
            metrics.truncate(*upto)
            assert len(lines(tmp_path)) == left


def test_a_half_written_last_line_is_left_out_and_not_glued_to_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 1}\n{"step": 2, "epo')
    assert read_metrics(path) == [{"step": 1, "epoch": 1}]
    with Metrics(config(), tmp_path) as metrics:
        metrics.log({}, step=2, epoch=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_kill_during_truncate_leaves_the_old_file(tmp_path, monkeypatch):
    with Metrics(config(), tmp_path) as metrics:
        for epoch in range(3):
            metrics.log({}, step=epoch, epoch=epoch)
        before = lines(tmp_path)

        def killed(*paths):
            raise KeyboardInterrupt

        monkeypatch.setattr("diffusion_nft.tracking.metrics.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            metrics.truncate(0)
    assert lines(tmp_path) == before


def test_read_metrics_names_a_damaged_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1, "epoch": 1}\nrubbish\n{"step": 2, "epoch": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        read_metrics(path)


def test_other_ranks_write_nothing(tmp_path):
    with Metrics(config(wandb="online"), tmp_path / "run", enabled=False) as metrics:
        metrics.log({"a": 1.0}, step=1, epoch=1)
        metrics.log_images("train", FOREIGN, CAPTIONS, [0.0, 1.0], epoch=1)
        metrics.truncate(0)
    assert not (tmp_path / "run").exists()


def test_images_are_saved_whole(tmp_path):
    with Metrics(config(), tmp_path) as metrics:
        metrics.log_images("eval/ocr", FOREIGN, CAPTIONS, [0.0, 1.0], epoch=12)
        metrics.log_images("eval/ocr", Images.concatenate([]), [], [], epoch=13)
    (path,) = (tmp_path / "images").glob("*.png")
    assert path.name == "eval_ocr-000012.png"
    assert Image.open(path).getpixel((100, 100)) == (0, 0, 0)


class FakeRun:
    def __init__(self, **arguments):
        self.arguments, self.logged, self.exit_code = arguments, [], None

    def define_metric(self, *arguments, **options):
        del arguments, options

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """wandb without network or credentials; ``wandb.runs`` lists the started runs."""
    module = pytest.importorskip("wandb")
    runs = []

    def init(**arguments):
        runs.append(FakeRun(**arguments))
        return runs[-1]

    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "init", init)
    monkeypatch.setattr(module, "runs", runs, raising=False)
    return module


def test_wandb_is_offline_without_a_key_in_the_environment_or_netrc(
    wandb, tmp_path, monkeypatch, capsys
):
    Metrics(config(wandb="online"), tmp_path / "run").close()
    assert len(capsys.readouterr().err.splitlines()) == 1
    netrc = tmp_path / "home" / ".netrc"
    netrc.parent.mkdir()
    netrc.write_text("machine api.wandb.ai login user password x\n")
    Metrics(config(wandb="online"), tmp_path / "run").close()
    netrc.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    Metrics(config(wandb="online"), tmp_path / "run").close()
    assert [run.arguments["mode"] for run in wandb.runs] == ["offline", "online", "online"]


def test_wandb_resumes_the_same_run_and_gets_the_values(wandb, tmp_path):
    run_dir = tmp_path / "geneval"
    for failed in (True, False):
        try:
            with Metrics(config(wandb="offline"), run_dir) as metrics:
                values = {"loss/total": 1.0, "reward/tag": math.nan, "reward/optimality": R}
                metrics.log(values, step=3, epoch=1)
                if failed:
                    raise RuntimeError
        except RuntimeError:
            pass
    first, second = wandb.runs
    assert first.arguments["id"] == second.arguments["id"]
    assert first.arguments["resume"] == "allow" and first.arguments["name"] == "geneval"
    (logged,) = first.logged
    assert sum(logged.pop("reward/optimality").histogram) == 5
    assert logged == {"step": 3, "epoch": 1, "loss/total": 1.0} | QUARTILES_OF_R
    assert (first.exit_code, second.exit_code) == (1, 0)


def test_captions_that_a_grid_cannot_show_go_with_it(wandb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Metrics(config(wandb="offline"), Path(".")) as metrics:
        metrics.log_images("train", FOREIGN, CAPTIONS, [0.0, 1.0], epoch=1)
    (run,) = wandb.runs
    assert run.arguments["name"] == tmp_path.name
    assert run.logged[0]["images/train"]._caption == "1: a circle\n2: 一只猫"
    assert (tmp_path / "images" / "train-000001.txt").read_text("utf-8").endswith("2: 一只猫\n")


def test_a_wandb_that_cannot_start_does_not_stop_the_run(wandb, tmp_path, capsys, monkeypatch):
    def broken(**arguments):
        raise wandb.Error("no route to host")

    monkeypatch.setattr(wandb, "init", broken)
    with Metrics(config(wandb="offline"), tmp_path / "run") as metrics:
        metrics.log({}, step=1, epoch=1)
    assert "no route to host" in capsys.readouterr().err
    assert len(lines(tmp_path / "run")) == 1


def test_missing_packages(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    Metrics(config(wandb="offline"), tmp_path).close()
    assert "pip install wandb" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        Metrics(config(tensorboard=True), tmp_path)


def test_tensorboard_gets_finite_scalars_and_images(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Metrics(config(tensorboard=True), tmp_path) as metrics:
        for step in (1, 2, 3):
            values = {"reward/mean": step / 2, "reward/tag": math.nan, "reward/optimality": R}
            metrics.log(values, step=step, epoch=step)
        metrics.log_images("train", FOREIGN, CAPTIONS, [0.0, 1.0], epoch=1)
    with Metrics(config(tensorboard=True), tmp_path) as metrics:
        metrics.truncate(2)
        metrics.log({"reward/mean": 9.0}, step=3, epoch=3)
    guidance = {"histograms": 0}  # all of them
    events = EventAccumulator(str(tmp_path / "tensorboard"), guidance).Reload()
    assert set(events.Tags()["scalars"]) == {"reward/mean", *QUARTILES_OF_R}
    assert events.Tags()["images"] == ["train"]
    assert events.Histograms("reward/optimality")[0].histogram_value.num == 5
    assert events.Tags()["tensors"] == ["train/captions/text_summary"]
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.5), (2, 1), (3, 9)]


def test_environment_tells_what_ran_and_not_where(tmp_path, monkeypatch):
    write_environment(tmp_path / "run")
    write_environment(tmp_path / "run")
    text = (tmp_path / "run" / "environments.jsonl").read_text()
    first, environment = (json.loads(line) for line in text.splitlines())
    assert first | {"time": environment["time"]} == environment
    assert environment["torch"] == torch.__version__
    assert environment["python"] == platform.python_version()
    assert {"diffusers", "transformers", "peft", "git_revision", "git_dirty"} <= environment.keys()
    assert "command" in environment and "hostname" not in text
    # Without git.
    monkeypatch.setenv("PATH", str(tmp_path))
    write_environment(tmp_path)
    environment = json.loads((tmp_path / "environments.jsonl").read_text())
    assert environment["git_revision"] is None and environment["git_dirty"] is None


def test_timer_adds_up_phases_and_starts_again(monkeypatch):
    clock = iter((0.0, 1.0, 5.0, 7.0, 8.0, 8.5))
    monkeypatch.setattr("diffusion_nft.tracking.metrics.time.perf_counter", lambda: next(clock))
    timer = Timer()
    for name in ("sample", "sample", "train"):
        with timer.phase(name):
            pass
    assert timer.pop() == {"time/sample": 3.0, "time/train": 0.5}
    assert timer.pop() == {}
