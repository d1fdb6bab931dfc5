"""The experiments script: planned runs, repetition of runs, and result files."""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from absl import flags
from ml_collections import config_flags

from diffusion_nft.experiments import grid, results
from diffusion_nft.solvers import solve
from diffusion_nft.tracking.metrics import read_metrics
from diffusion_nft.validation.config_files import load_file
from diffusion_nft.validation.flat import flatten
from tests.launch import ROOT, train_here
from tests.scripts.in_process import call, script

# Replacement of the training script: two epochs, resumable.  FAKE="MODE DIRECTORY" in the
# environment makes a run fail, or wait for a stop in the middle.
FAKE_TRAIN = """
import ast, json, os, pathlib, signal, sys, time

def value(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

config = dict(flag.removeprefix("--config.").split("=", 1) for flag in sys.argv[2:])
config = {key: value(text) for key, text in config.items()}
folder = pathlib.Path(config["save_dir"])
mode, _, chosen = os.environ.get("FAKE", "").partition(" ")
mode = mode if chosen == folder.name else ""
(folder / "config.json").write_text(json.dumps(config))
about = {"time": "2026-01-02T03:04:05Z", "torch": "2", "device": "cpu", "command": "as typed"}
with (folder / "environments.jsonl").open("a") as file:
    file.write(json.dumps(about | {"git_revision": "abc", "git_dirty": False}) + chr(10))
print("threads:", os.environ["OMP_NUM_THREADS"], "\\r 50%", flush=True)
if mode == "fail":
    sys.exit("the reward is out of order")
metrics = (folder / "metrics.jsonl").open("a")

def log(step, epoch, **values):
    print(json.dumps({"step": step, "epoch": epoch} | values), file=metrics, flush=True)

cost = {} if mode == "free" else {"cost/forwards": 100, "cost/backwards": 10}
if not metrics.tell():
    log(0, 0, **{"eval/total": 0.5, "eval/shapes/strict": 0.25})
    log(2, 1, **{"time/epoch": 1.23456789, "loss/kl": 1e-3, "optim/grad_norm": 1.0}, **cost)
if mode == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (folder / "waiting").touch()
    time.sleep(60)
log(4, 2, **{"time/epoch": 2.0, "reward/mean": 0.75, "loss/kl": None}, **cost)
log(4, 2, **{"eval/total": 0.625, "eval/shapes/strict": 0.5, "eval/diversity": None})
"""


@pytest.fixture(scope="module")
def runner():
    return script("experiments")


@pytest.fixture
def tiny(runner, tmp_path, monkeypatch):
    """The script on an experiment of two variants and two seeds, with a fake training script;
    ``tiny.steps`` is the change of the second variant.
    """
    real = load_file(ROOT / "config" / "experiments.py")
    train = tmp_path / "train.py"
    train.write_text(FAKE_TRAIN)
    monkeypatch.setattr(grid, "TRAIN", train)
    monkeypatch.setattr("diffusion_nft.experiments.runner.POLL_SECONDS", 0.01)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    world = SimpleNamespace(steps=2, results=tmp_path / "results", runs=tmp_path / "runs")

    def load(path):
        few = real.Variant("shapes_smoke", {"sample.num_steps": world.steps})
        experiment = real.Experiment(
            question="Which?",
            variants={"plain": real.Variant("shapes_smoke"), "few": few},
            baseline="plain",
            common={"eval.num_steps": 3},
            seeds=(1, 2),
        )
        return SimpleNamespace(EXPERIMENTS={"tiny": experiment})

    monkeypatch.setattr(runner, "load_file", load)
    world.folders = ("--results", world.results, "--runs", world.runs)
    world.run = lambda *more: call(runner, "tiny", *world.folders, *more)
    world.found = lambda: sorted(path.name for path in (world.results / "tiny").glob("*"))
    world.starts = lambda: sorted(path.parent.name for path in world.runs.rglob("*.log"))
    return world


@pytest.fixture(scope="module")
def named_runs(runner):
    """(experiment, its runs) by name, of config/experiments.py."""
    args = SimpleNamespace(seeds=None, variants=None, runs=Path("runs"), results=Path("results"))
    named = load_file(ROOT / "config" / "experiments.py").EXPERIMENTS
    return {name: (one, grid.plan(name, one, args)) for name, one in named.items()}


# Variants evaluated with guidance and after other epochs.
GUIDED = ("flow-grpo-cfg", "cfg-lr-1e-3", "cfg-lr-3e-3", "cfg-in-evaluation")


def test_experiments_are_valid_and_their_variants_evaluated_alike(named_runs):
    for name, (experiment, runs) in named_runs.items():
        assert experiment.baseline in experiment.variants
        assert all(re.fullmatch(r"[a-z0-9_-]+", word) for word in (name, *experiment.variants))
        assert len({run.result for run in runs}) == len(experiment.variants) * len(experiment.seeds)
        evaluated = {
            json.dumps(
                {k: v for k, v in flatten(run.config).items() if k.startswith("eval")}
                | {"eval.seed": run.config.eval.seed == run.seed}
            )
            for run in runs
            if run.variant not in GUIDED
        }
        assert len(evaluated) == 1
        assert all(run.config.num_epochs / run.config.eval_freq >= 2 for run in runs)
        kept = results.EPOCH_METRICS
        assert all(key in kept or key.startswith("eval/") for key in experiment.watched)


def test_fewer_and_more_steps_train_at_as_many_sigmas(named_runs):
    used = {}
    for run in named_runs["solvers"][1]:
        steps = run.config.sample.num_steps
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        start = torch.zeros(1, 1, 1, 1)
        if run.config.sample.solver != "dpm2":
            continue
        _, visited = solve("dpm2", lambda x, sigma: torch.zeros_like(x), start, sigmas, shift=1.0)
        used[run.variant] = int(len(visited) * run.config.train.timestep_fraction)
    assert used["dpm2-10"] == used["dpm2-5"] == used["dpm2-20"] == 3


def test_a_runs_command_gives_its_configuration(named_runs, monkeypatch):
    runs = [run for _, runs in named_runs.values() for run in runs]
    # One run per variant; others differ only in the seed.
    for run in {(run.name, run.variant): run for run in runs}.values():
        values = flags.FlagValues()
        monkeypatch.setattr(sys, "argv", run.command())
        config = config_flags.DEFINE_config_file("config", flag_values=values)
        values(sys.argv)
        assert flatten(config.value) == flatten(run.config)


def parts(result: Path) -> tuple[dict, str]:
    """Header of a result, and text of its rows."""
    about, numbers = result.read_text().split("\n", 1)
    return json.loads(about), numbers


def put(result: Path, header: dict, numbers: str) -> None:
    result.write_text(f"{json.dumps(header)}\n{numbers}")


def test_every_variant_runs_with_every_seed_and_once(tiny, monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    tiny.run("--jobs", 2)
    names = ["few-seed1.jsonl", "few-seed2.jsonl", "plain-seed1.jsonl", "plain-seed2.jsonl"]
    assert tiny.found() == names
    printed = capsys.readouterr().out
    assert printed.count("started") == 4
    assert printed.count("ended at epoch 2: eval/total 0.625, eval/shapes/strict 0.500") == 4
    log = tiny.runs / "tiny" / "few-seed1" / "experiment.log"
    assert "threads: 3" in log.read_text()

    tiny.run()
    assert "4 of them finished before" in capsys.readouterr().out
    assert log.read_text().count("threads") == 1
    (tiny.results / "tiny" / names[0]).unlink()
    tiny.run("--variants", "plain")
    assert len(tiny.found()) == 3


def test_a_result_has_a_header_and_cumulative_costs(tiny, runner):
    tiny.run("--variants", "few", "--seeds", 7)
    text = (tiny.results / "tiny" / "few-seed7.jsonl").read_text()
    about, *rows = map(json.loads, text.splitlines())
    assert (about["experiment"], about["variant"], about["seed"]) == ("tiny", "few", 7)
    assert about["changes"] == {"eval.num_steps": 3, "sample.num_steps": 2}
    assert about["git_revision"] == "abc" and about["versions"]["torch"] == "2"
    assert about["machine"]["jobs"] == about["starts"] == 1
    assert "--config.sample.num_steps=2 --config.seed=7" in about["command"]
    assert about["config"]["train.learning_rate"] == 1e-3 and "save_dir" not in about["config"]

    ratio = about["backward_over_forward"]
    assert 1 < ratio < 2
    costs = [0, 100 + 10 * ratio, 200 + 20 * ratio, 200 + 20 * ratio]
    assert [row["forward_equivalents"] for row in rows] == pytest.approx(costs, rel=1e-4)
    assert [row["seconds"] for row in rows] == [0, 1.2346, 3.2346, 3.2346]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 2]
    assert rows[1].keys() == {"epoch", "step", "seconds", "forward_equivalents", "loss/kl"}
    assert rows[-1]["eval/shapes/strict"] == 0.5 and rows[-1]["eval/diversity"] is None


def test_results_of_the_same_run_elsewhere_are_copied(tiny, capsys):
    tiny.run("--variants", "few", "--seeds", 1)
    other = tiny.results / "other" / "less-seed1.jsonl"
    other.parent.mkdir()
    result = tiny.results / "tiny" / "few-seed1.jsonl"
    header, numbers = parts(result)
    theirs = header | {
        "experiment": "other",
        "variant": "less",
        "baseline": "more",
        "question": "?",
    }
    put(other, theirs, numbers)
    result.unlink()
    capsys.readouterr()
    tiny.run("--variants", "few")
    printed = capsys.readouterr().out
    assert f"tiny few seed 1: copied from {other}" in printed
    assert printed.count("started") == 1 and "tiny few seed 2: started" in printed
    assert parts(result) == (header | {"ran_as": "other less"}, numbers)
    # With other settings, the same changes are another run.
    result.unlink()
    theirs["config"]["train.learning_rate"] = 0.5
    put(other, theirs, numbers)
    for path in tiny.runs.rglob("*.jsonl"):
        path.unlink()
    tiny.run("--variants", "few", "--seeds", 1)
    assert "tiny few seed 1: started" in capsys.readouterr().out


def test_results_on_other_prompts_are_neither_finished_nor_taken_over(tiny, capsys):
    tiny.run("--variants", "few", "--seeds", 1)
    result = tiny.results / "tiny" / "few-seed1.jsonl"
    header, numbers = parts(result)
    header["prompts"]["shapes"]["test"] = "0"
    put(result, header, numbers)
    with pytest.raises(ValueError, match="the test prompts of dataset shapes"):
        tiny.run("--variants", "few", "--seeds", 1)
    (tiny.results / "other").mkdir()
    result.rename(tiny.results / "other" / "few-seed1.jsonl")
    capsys.readouterr()
    tiny.run("--variants", "few", "--seeds", 1)
    assert "tiny few seed 1: started" in capsys.readouterr().out
    # Results of earlier versions have no prompts.
    del header["prompts"]
    put(result, header, numbers)
    tiny.run("--variants", "few", "--seeds", 1)
    assert "1 of them finished before" in capsys.readouterr().out


def test_a_failing_run_leaves_the_others_and_is_named(tiny, monkeypatch, capsys):
    monkeypatch.setenv("FAKE", "fail few-seed1")
    with pytest.raises(SystemExit) as stopped:
        tiny.run("--jobs", 2)
    log = tiny.runs / "tiny" / "few-seed1" / "experiment.log"
    assert "1 failed" in stopped.value.code and f"tiny few seed 1: {log}" in stopped.value.code
    assert "exit status 1: the reward is out of order" in capsys.readouterr().out
    assert len(tiny.found()) == 3

    monkeypatch.delenv("FAKE")
    tiny.run()
    assert len(tiny.found()) == 4 and "started" in capsys.readouterr().out


def test_a_run_without_its_costs_has_no_result(tiny, monkeypatch, capsys):
    monkeypatch.setenv("FAKE", "free plain-seed1")
    with pytest.raises(SystemExit):
        tiny.run("--variants", "plain", "--seeds", 1)
    assert "epoch 1 in" in (printed := capsys.readouterr().out) and "cost/forwards" in printed
    assert tiny.found() == []


def test_a_stop_ends_the_runs_and_the_same_command_continues(tiny, monkeypatch, capsys):
    monkeypatch.setenv("FAKE", "wait few-seed1")
    folder = tiny.runs / "tiny" / "few-seed1"

    def stop():
        while not (folder / "waiting").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        tiny.run("--variants", "few")
    assert stopped.value.code == "stopped; rerun the same command to continue"
    printed = capsys.readouterr().out
    assert "tiny few seed 1: stopped" in printed and "seed 2" not in printed
    assert tiny.found() == []

    monkeypatch.delenv("FAKE")
    tiny.run("--variants", "few", "--seeds", 1)
    about, *rows = (tiny.results / "tiny" / "few-seed1.jsonl").read_text().splitlines()
    assert json.loads(about)["starts"] == 2 and len(rows) == 4


def test_results_of_a_variant_that_has_changed_are_refused(tiny, capsys):
    tiny.run("--variants", "few", "--seeds", 1)
    tiny.steps = 3
    with pytest.raises(ValueError) as stopped:
        tiny.run()
    result = tiny.results / "tiny" / "few-seed1.jsonl"
    assert f"tiny few seed 1 has changed since {result}:" in str(stopped.value)
    assert "sample.num_steps: 2 -> 3" in str(stopped.value)
    assert tiny.starts() == ["few-seed1"]
    # The run directory of the former variant is refused, too.
    result.unlink()
    with pytest.raises(ValueError) as stopped:
        tiny.run()
    assert "sample.num_steps: 2 -> 3" in str(stopped.value)
    tiny.steps = 2
    tiny.run()
    assert len(tiny.found()) == 4


def test_a_key_of_a_later_version_does_not_make_results_old(tiny):
    tiny.run("--variants", "few", "--seeds", 1)
    result = tiny.results / "tiny" / "few-seed1.jsonl"
    header, numbers = parts(result)
    del header["config"]["train.ema_decay"], header["config"]["sample.num_steps"]
    put(result, header, numbers)
    with pytest.raises(ValueError) as stopped:
        tiny.run("--variants", "few", "--seeds", 1)
    # Set by the variant.
    assert "sample.num_steps: '(absent)' -> 2" in str(stopped.value)
    assert "ema_decay" not in str(stopped.value)


@pytest.mark.parametrize(
    "given, message",
    [
        (("nothing",), "invalid choice: 'nothing'"),
        ((), "name an experiment"),
        (("tiny", "--variants", "fewer"), "--variants fewer: choose from plain, few"),
        (("tiny", "--jobs", 0), "--jobs: must be at least 1, not 0"),
        (("tiny", "tiny", "--variants", "few"), "--variants needs exactly one experiment"),
    ],
)
def test_a_wrong_command_line_is_refused(tiny, runner, capsys, given, message):
    with pytest.raises(SystemExit):
        call(runner, *given)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "steps, message", [(0, "sample.num_steps"), ("ten", "cannot be casted to type <class 'int'>")]
)
def test_a_variant_that_cannot_run_is_refused_before_any_runs(tiny, steps, message):
    tiny.steps = steps
    with pytest.raises(ValueError) as stopped:
        tiny.run()
    assert "tiny, variant few: " in str(stopped.value) and message in str(stopped.value)
    assert not tiny.runs.exists()


def test_the_list_names_variants_and_finished_seeds(tiny, runner, capsys):
    tiny.run("--variants", "few", "--seeds", 2)
    capsys.readouterr()
    call(runner, "--list", *tiny.folders)
    assert capsys.readouterr().out.splitlines() == [
        "tiny: Which? (seeds 1, 2)",
        "  plain: shapes_smoke; not run yet",
        "  few: shapes_smoke sample.num_steps=2; finished: 2",
    ]


def made_run(runner, tiny, variant: str = "plain", **changes):
    experiment = runner.load_file(None).EXPERIMENTS["tiny"]
    args = SimpleNamespace(runs=tiny.runs, results=tiny.results)
    run = grid.make_run("tiny", experiment, variant, 1, args)
    run.config.update_from_flattened_dict(changes)
    return run


def test_the_real_trainers_numbers_make_a_result(tiny, runner, tmp_path):
    run = made_run(runner, tiny)
    train_here(run.folder, {"seed": 1, "eval.seed": 1, "eval.num_steps": 3})
    last = results.write_result(run, jobs=1)
    epochs = [row for row in read_metrics(run.folder / "metrics.jsonl") if "time/epoch" in row]
    assert len(epochs) == 2 == last["epoch"]
    assert last["seconds"] == pytest.approx(sum(row["time/epoch"] for row in epochs), rel=1e-4)
    assert "eval/shapes/strict" in last and "eval/tag/colors/shapes/strict" in last
    # 12 samples: 4 steps, then 2 sigmas for the policies old, reference and current.
    # At the first of two updates of the first epoch, one forward serves old and current.
    cost = 2 * 12 * (4 + 2 * (3 + results.backward_over_forward(run.config))) - 12
    assert last["forward_equivalents"] == pytest.approx(cost, rel=1e-4)


def test_the_flops_are_of_the_models_own_sizes(tiny, runner, shapes_model):
    config = made_run(runner, tiny).config
    transformer, side, text = results.model_shape(config)
    assert (transformer["in_channels"], side, side) == shapes_model.latent_shape((48, 48))
    assert text == shapes_model.encode(["a red circle"]).prompt_embeds.shape[1]
    config.pretrained.model = "owner/name"
    with pytest.raises(ValueError, match="owner/name"):
        results.model_shape(config)


def test_a_result_of_a_long_run_stays_small(tiny, runner):
    run = made_run(runner, tiny, num_epochs=500, eval_freq=50)
    run.folder.mkdir(parents=True)
    names = ["total", "shapes/strict", *(f"tag/{number}/shapes/strict" for number in range(20))]
    lines = []
    for epoch in range(501):
        row = {"step": 2 * epoch, "epoch": epoch}
        values = dict.fromkeys(results.EPOCH_METRICS, 1 / 3 + epoch)
        cost = {"time/epoch": 1 / 3, "cost/forwards": 1, "cost/backwards": 1}
        lines += [row | values | cost] if epoch else []
        if epoch % 50 == 0:
            lines.append(row | {f"eval/{name}": 1 / 7 for name in names})
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {"time": "", "device": "cpu", "git_revision": "", "git_dirty": False, "command": ""}
    (run.folder / "environments.jsonl").write_text(json.dumps(about) + "\n")
    (run.folder / "config.json").write_text(json.dumps({"eval.num_steps": 3}))
    last = results.write_result(run, jobs=1)
    assert run.result.stat().st_size < 30_000
    # The cost includes epochs that are left out.
    assert last["seconds"] == pytest.approx(500 / 3, rel=1e-4)
    rows = list(map(json.loads, run.result.read_text().splitlines()))[1:]
    assert sum("eval/total" in row for row in rows) == 11
