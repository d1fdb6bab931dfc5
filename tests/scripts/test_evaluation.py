"""The evaluation script against the evaluation in training."""

import json
from pathlib import Path

import pytest

from tests.launch import insist, run, torchrun, train_here
from tests.scripts.in_process import call, command, script


def evaluation(*flags: object) -> None:
    call(script("evaluation"), *flags)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    # A high learning rate, for a visible LoRA.
    settings = {"eval.num_prompts": 6, "eval.batch_size": 4, "eval.num_steps": 5}
    train_here(folder, settings | {"train.learning_rate": 0.01, "eval.solver": "dpm2"})
    return folder


def averages(folder: Path) -> dict:
    return json.loads((folder / "average_scores.json").read_text())


def scores(folder: Path) -> list[dict]:
    lines = (folder / "evaluation_results.jsonl").read_text().splitlines()
    return [json.loads(line)["scores"] for line in lines]


def test_without_the_lora_the_numbers_are_the_base_models(run_dir, tmp_path):
    flags = "--pretrained shapes --dataset shapes --resolution 48 --max_sequence_length 8"
    flags += " --mixed_precision no --num_inference_steps 5 --solver dpm2 --batch_size 4 --limit 6"
    evaluation(*flags.split(), "--output_dir", tmp_path)
    assert scores(tmp_path) == scores(run_dir / "eval" / "epoch-000000")
    assert averages(tmp_path)["diversity"] != averages(run_dir / "eval" / "epoch-000002")


def test_another_seed_draws_other_images(run_dir, tmp_path):
    checkpoint = run_dir / "checkpoints" / "checkpoint-4"
    flags = ("--checkpoint_path", checkpoint, "--limit", 6, "--reward", "jpeg_compressibility")
    evaluation(*flags, "--output_dir", tmp_path / "a")
    evaluation(*flags, "--output_dir", tmp_path / "b", "--seed", 7)
    assert scores(tmp_path / "a") != scores(tmp_path / "b")


def test_saved_images_can_be_scored_later(run_dir, tmp_path, monkeypatch):
    rewards = ("--reward", "shapes,jpeg_compressibility")
    here = ("--checkpoint_path", run_dir, "--output_dir", tmp_path, "--limit", 3)
    evaluation(*here, *rewards, "--save_images")
    first = scores(tmp_path)
    assert len(first) == 3 and len(list((tmp_path / "images").iterdir())) == 3
    rows = (tmp_path / "evaluation_results.jsonl").read_text().splitlines()
    assert (tmp_path / json.loads(rows[2])["image_path"]).is_file()
    # Rescoring needs no checkpoint.
    there = ("--dataset", "shapes", "--output_dir", tmp_path, "--limit", 3, "--rescore")
    evaluation(*there, "--reward", "jpeg_incompressibility")
    # Earlier scores and settings are kept; "total" is over all rewards.
    for row, expected in zip(scores(tmp_path), first, strict=True):
        assert row.keys() == expected.keys() | {"jpeg_incompressibility"}
        assert row["shapes"] == expected["shapes"]
        assert row["jpeg_incompressibility"] == -expected["jpeg_compressibility"]
        assert row["total"] == pytest.approx(row["shapes"])
    settings = averages(tmp_path)["settings"]
    assert (settings["resolution"], settings["pretrained.model"]) == (48, "shapes")
    names = {"shapes", "jpeg_compressibility", "jpeg_incompressibility"}
    assert settings["rewards"].keys() == names
    evaluation(*here, "--rescore", *rewards, "--skip_rewards", "jpeg_compressibility")
    assert [row["shapes"] for row in scores(tmp_path)] == [row["shapes"] for row in first]
    with pytest.raises(ValueError, match="3 other prompts than the 2 lines"):
        evaluation(*here[:-1], 2, "--rescore", *rewards)


def same_bytes(one: Path, other: Path) -> None:
    for name in ("average_scores.json", "evaluation_results.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.multiproc
def test_two_processes_write_the_same_bytes(run_dir, tmp_path):
    flags = ["--checkpoint_path", str(run_dir), "--limit", "7", "--batch_size", "2"]
    flags += ["--output_dir"]
    insist(run(torchrun(2, "scripts/evaluation.py", *flags, str(tmp_path / "two"))))
    evaluation(*flags, tmp_path / "one")
    same_bytes(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dataset", "nowhere", "--reward", "shapes"), "nowhere"),
        (("--dataset", "shapes", "--reward", "pikscore"), "pikscore"),
        (("--dataset", "shapes", "--checkpoint_path", "/nowhere"), "/nowhere"),
        (("--dataset", "shapes", "--limit", "0", "--pretrained", "shapes"), "limit"),
        (("--dataset", "shapes", "--rescore"), "evaluation_results.jsonl"),
        (("--dataset", "shapes", "--skip_rewards", "shapes"), "leaves no reward"),
        (
            ("--dataset", "shapes", "--reward_servers", "ocr=http://127.0.0.1:9"),
            "not among the rewards",
        ),
        (("--dataset", "shapes", "--option", "ocr.threads=2"), "not among the rewards"),
        (("--dataset", "shapes", "--option", "shapes.rul=lenient"), "no option 'rul'"),
        (("--dataset", "shapes", "--option", "shapes.rule=lennient"), "lennient"),
        (("--dataset", "shapes", "--option", "pikscore.dtype=fp16"), "pikscore"),
        (("--dataset", "shapes", "--reward_servers", "shapes=nowhere"), "is not an address"),
        ((), "--dataset"),
    ],
)
def test_mistakes_are_named(flags, words, tmp_path, capsys):
    small = ("--resolution", 48, "--max_sequence_length", 8, "--mixed_precision", "no")
    with pytest.raises(SystemExit) as caught:
        command("evaluation", *small, *flags, "--output_dir", tmp_path)
    # argparse prints its message.
    assert words in f"{caught.value.code}{capsys.readouterr().err}"
    assert not (tmp_path / "average_scores.json").exists()
