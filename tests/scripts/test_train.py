"""The training command: mistakes cost one line, and it runs under torchrun."""

import json
import sys

import pytest

from diffusion_nft.metrics import read_metrics
from tests.launch import run, train, train_command

MISTAKES = {
    "a mistyped key": (["train.learning_rat=0.1"], "learning_rate"),
    "a wrong type": (["train.batch_size=many"], "train.batch_size"),
    "a wrong value": (["sample.num_image_per_prompt=1"], "sample.num_image_per_prompt"),
    "an unknown reward": (["reward_fn={'pikscore': 1.0}"], "pikscore"),
    "a missing data set": (["dataset=nowhere"], "nowhere"),
    "an unknown solver": (["sample.solver=dmp2"], "dpm2"),
    "a missing model": (["pretrained.model=nobody/nothing", "resolution=48"], "nobody/nothing"),
}


def assert_one_line_error(done, *words: str) -> None:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr[-1500:]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert any(all(word in line for word in words) for line in lines), done.stderr[-1500:]
    assert len(lines) <= 4, done.stderr[-1500:]


@pytest.mark.multiproc
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_costs_one_line(name, tmp_path):
    overrides, word = MISTAKES[name]
    done = run(train_command(tmp_path / "run", *overrides))
    assert_one_line_error(done, word)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.multiproc
def test_an_unknown_preset_costs_one_line(tmp_path):
    done = run(train_command(tmp_path / "run", preset="shapez"))
    assert_one_line_error(done, "shapez", "shapes_smoke")


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("config", "word"), [("config/nf.py:shapes", "no such file"), ("config/nft.py", "shapes_smoke")]
)
def test_a_preset_that_is_not_named_rightly_costs_one_line(config, word):
    assert_one_line_error(
        run([sys.executable, "scripts/train_nft_sd3.py", "--config", config]), word
    )


@pytest.mark.multiproc
def test_two_processes_under_torchrun(tmp_path):
    done = train(tmp_path / "run", "num_epochs=1", "log.num_images=4", nproc=2)
    # Said once, not once a rank.
    assert done.stdout.count("best eval/total") == 1
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 1]
    environment = json.loads((tmp_path / "run" / "environments.jsonl").read_text())
    assert environment["world_size"] == 2
