"""The reproduction script: same results as training and evaluation, resuming, and tables."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffusion_nft import rewards
from diffusion_nft.data import prompts as data
from diffusion_nft.evaluation import options as settings
from diffusion_nft.rewards import RewardOutput
from tests.launch import ROOT, environment, train_here
from tests.scripts.in_process import call, script


def reproduce(*flags: object) -> None:
    call(script("reproduce"), *flags)


def scores(folder: Path) -> list[dict]:
    lines = (folder / "evaluation_results.jsonl").read_text().splitlines()
    return [json.loads(line)["scores"] for line in lines]


def test_training_evaluation_and_reproduction_give_the_same_numbers(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    evaluated = {"eval.num_prompts": 6, "eval.batch_size": 4, "eval.num_steps": 10}
    train_here(run, evaluated | {"train.learning_rate": 0.01})
    both = ("--checkpoint_path", run, "--limit", 6, "--output_dir")
    call(script("evaluation"), *both, tmp_path / "one")
    reproduce("--suite", "shapes", *both, tmp_path / "all")
    trained = run / "eval" / "epoch-000002"
    (model,) = (tmp_path / "all").glob("run-checkpoint-4*")
    assert scores(trained) == scores(tmp_path / "one") == scores(model / "shapes")
    averages = [
        json.loads((folder / "average_scores.json").read_text())
        for folder in (trained, tmp_path / "one", model / "shapes")
    ]
    for key in ("mean", "tags", "mean_over_tags", "diversity", "num_samples"):
        assert averages[0][key] == averages[1][key] == averages[2][key]
    # The settings of the two scripts are the same, too.
    assert averages[1]["settings"] == averages[2]["settings"]
    capsys.readouterr()
    # A second call does not load the model.
    monkeypatch.setattr(settings, "load_model", None)
    reproduce("--suite", "shapes", *both, tmp_path / "all")
    shown = capsys.readouterr().out
    mean = averages[0]["mean"]["shapes/strict"]["mean"]
    assert f"{mean:.3f} ±" in shown and model.name in shown
    table = shown[shown.index("|") : shown.index("images and scores")].strip()
    assert (tmp_path / "all" / "table.md").read_text().startswith(table)


def test_a_killed_reproduction_repeats_no_finished_image(tmp_path):
    flags = ["--suite", "shapes", "--limit", "16", "--batch_size", "4", "--output_dir", tmp_path]
    command = [sys.executable, str(ROOT / "scripts/reproduce.py"), *map(str, flags)]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    while len(list(tmp_path.glob("*/shapes/images/0*.png"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    images = tmp_path / "base-cfg1-seed42-16lines" / "shapes" / "images"
    made = {path.name: path.stat().st_mtime_ns for path in images.glob("0*.png")}
    assert 4 <= len(made) < 16, "killed too early or too late"
    reproduce(*flags)
    # Finished chunks of four.
    whole = sorted(made)[: len(made) // 4 * 4]
    assert len(list(images.glob("0*.png"))) == 16
    assert all((images / name).stat().st_mtime_ns == made[name] for name in whole)
    # The results are those of an uninterrupted call.
    reproduce(*flags[:-1], tmp_path / "again")
    for name in ("average_scores.json", "evaluation_results.jsonl"):
        one = images.parent / name
        other = tmp_path / "again" / images.parent.relative_to(tmp_path) / name
        assert one.read_bytes() == other.read_bytes()


class Brightness:
    """Replacement of all rewards of the paper: the mean of the pixels."""

    def __init__(self, device: torch.device):
        del device

    def __call__(self, images, prompts, metadata) -> RewardOutput:
        mean = images.mean(dim=(1, 2, 3)).double()
        return RewardOutput(mean, {"accuracy": (mean > 0.5).double()})


class Missing(Brightness):
    """A reward that is not available."""

    def __init__(self, device: torch.device):
        raise OSError("no server answers")


@pytest.fixture
def paper(tmp_path, monkeypatch) -> None:
    """Small replacements of the paper's test sets and rewards."""
    root = tmp_path / "dataset"
    for name in ("geneval", "ocr", "drawbench"):
        (root / name).mkdir(parents=True)
        for split in data.SPLITS:
            (root / name / f"{split}.txt").write_text('a sign that says "HELLO"\na cat\n')
    (root / "ocr" / "test.txt").write_text('a sign that says "HELLO"\n')
    lines = [{"tag": tag, "prompt": f"a {tag}"} for tag in ("counting", "colors", "colors")]
    (root / "geneval" / "test.txt").unlink()
    (root / "geneval" / "test_metadata.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    monkeypatch.setattr(data, "DATASET_ROOT", root)
    here = f"{__name__}:Brightness"
    for name in ("geneval", "ocr", "pickscore", "clipscore", "hpsv2", "aesthetic", "imagereward",
                 "unifiedreward"):  # fmt: skip
        monkeypatch.setitem(rewards.REWARDS, name, here)
    monkeypatch.setattr(rewards, "PROMPT_CHECKS", {})


BUILT_IN = ("--pretrained", "shapes", "--resolution", 48, "--num_inference_steps", 2)


def test_the_papers_suite_on_stand_ins(paper, tmp_path, capsys, monkeypatch):
    out = ("--output_dir", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setitem(rewards.REWARDS, "unifiedreward", f"{__name__}:Missing")
        with pytest.raises(OSError, match="no server answers"):
            reproduce(*BUILT_IN, *out)
        assert not list((tmp_path / "out").rglob("*.png")), "refused before sampling"
    reproduce(*BUILT_IN, *out, "--skip_rewards", "aesthetic")
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    (model,) = table["models"]
    assert model["averages"].keys() == {"geneval", "ocr", "drawbench"}
    drawbench = model["averages"]["drawbench"]["mean"]
    brightness = drawbench["clipscore"]["mean"]
    values = {title: value["mean"] for title, value in model["values"].items()}
    assert values["PickScore"] == pytest.approx(26 * brightness)
    assert values["UnifiedReward"] == pytest.approx(5 * brightness)
    assert values["ImageReward"] == pytest.approx(brightness) and "Aesthetic" not in values
    tags = model["averages"]["geneval"]["tags"]
    by_tag = [tags[tag]["geneval/accuracy"]["mean"] for tag in ("counting", "colors")]
    assert values["GenEval"] == pytest.approx(sum(by_tag) / 2)
    assert values["OCR"] == model["averages"]["ocr"]["mean"]["ocr"]["mean"]
    assert "reference: NFT on several rewards" in capsys.readouterr().out
    # A skipped reward is added later; images and other scores are kept.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/*/images/*")}
    reproduce(*BUILT_IN, *out)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    (again,) = json.loads((tmp_path / "out" / "table.json").read_text())["models"]
    assert again["values"].pop("Aesthetic")["mean"] == pytest.approx(brightness)
    assert again["values"] == model["values"]
    for name, count in (("geneval", 3), ("ocr", 1), ("drawbench", 2)):
        (folder,) = (tmp_path / "out").glob(f"*/{name}")
        assert len(list((folder / "images").iterdir())) == count and (folder / "grid.png").exists()


def test_all_missing_test_sets_are_named(paper, tmp_path):
    (data.DATASET_ROOT / "ocr" / "test.txt").unlink()
    (data.DATASET_ROOT / "drawbench" / "test.txt").unlink()
    with pytest.raises(ValueError, match=r"(?s)prepare_data.py ocr.*prepare_data.py drawbench"):
        reproduce(*BUILT_IN, "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match="no such reward in geneval"):
        reproduce(*BUILT_IN, "--datasets", "geneval", "--skip_rewards", "ocr")
    with pytest.raises(ValueError, match="choose from geneval, ocr, drawbench"):
        reproduce(*BUILT_IN, "--datasets", "genval")


def test_other_settings_are_other_rows_or_refused(paper, tmp_path):
    flags = (*BUILT_IN, "--datasets", "ocr", "--output_dir", tmp_path)
    reproduce(*flags)
    with pytest.raises(ValueError, match=r"eval\.batch_size: 16 -> 4"):
        reproduce(*flags, "--batch_size", 4)
    # Also for another test set of the same model.
    with pytest.raises(ValueError, match=r"eval\.batch_size: 16 -> 4"):
        reproduce(*BUILT_IN, "--datasets", "geneval", "--output_dir", tmp_path, "--batch_size", 4)
    reproduce(*flags, "--guidance_scale", 2, "--seed", 1)
    reproduce(*flags, "--solver", "dpm2")
    names = {model["name"] for model in json.loads((tmp_path / "table.json").read_text())["models"]}
    assert names == {
        "shapes-cfg1-seed42-2steps-48px",
        "shapes-cfg2-seed1-2steps-48px",
        "shapes-cfg1-seed42-dpm2-2steps-48px",
    }
    with pytest.raises(ValueError, match="leaves no reward in ocr"):
        reproduce(*flags, "--skip_rewards", "ocr")
