"""Training on a served reward: the weights of a local run, across a restart of the server."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from diffusion_nft.data.prompts import DATASET_ROOT
from diffusion_nft.runs.checkpoint import Checkpointer
from diffusion_nft.tracking.metrics import read_metrics
from tests.launch import ROOT, environment, insist, run, train, train_command
from tests.runs.test_resume import assert_same_log, assert_same_state
from tests.scripts.test_reward_server import server

EPOCHS = 4
SETTINGS = (
    f"num_epochs={EPOCHS}",
    "train.learning_rate=0.0005",
    "log.num_images=0",
    "eval.at_start=False",
    "eval.num_prompts=4",
    "eval.held_out_rewards=('ocr',)",
)
START_S = 200
TOKEN = "secret"


def quoted_test_lines(folder: Path) -> str:
    """The built-in prompt set, its first test lines with a quoted text for ocr."""
    folder.mkdir()
    shutil.copy(DATASET_ROOT / "shapes" / "train_metadata.jsonl", folder)
    lines = (DATASET_ROOT / "shapes" / "test_metadata.jsonl").read_text().splitlines()[:4]
    rows = [json.loads(line) for line in lines]
    quoted = [row | {"prompt": f'{row["prompt"]} "red"'} for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in quoted)
    (folder / "test_metadata.jsonl").write_text(text)
    return f"dataset={folder}"


def lose_server_within_the_run(command: list[str], run_dir: Path, process: subprocess.Popen) -> str:
    """Starts ``command``, kills the server after a checkpoint; returns the run's output."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as training:
        until = time.monotonic() + START_S
        while not (run_dir / "checkpoints" / "checkpoint-2").exists():
            assert time.monotonic() < until
            assert training.poll() is None, training.communicate()[0][-4000:]
            time.sleep(0.01)
        process.kill()
        said, _ = training.communicate(timeout=START_S)
    assert training.returncode not in (0, None)
    return said


@pytest.mark.multiproc
@pytest.mark.timeout(900)
def test_a_run_that_loses_its_server_ends_as_one_that_needed_none(tmp_path, monkeypatch):
    monkeypatch.setenv("REWARD_SERVER_TOKEN", TOKEN)
    settings = (*SETTINGS, quoted_test_lines(tmp_path / "prompts"))
    train(tmp_path / "local", *settings, nproc=2)
    run_dir, flags = tmp_path / "served", ("--reward", "shapes")
    with server(*flags, token=TOKEN) as (process, address):
        command = train_command(
            run_dir, *settings, f"reward_servers={{'shapes': ('{address}',)}}", nproc=2
        )
        said = lose_server_within_the_run(command, run_dir, process)
    assert f"no answer from the servers of reward 'shapes' at {address}" in said
    saved = Checkpointer(run_dir).load_latest()
    assert saved is not None and 1 <= saved.state["epoch"] < EPOCHS
    assert f"the state of epoch {saved.state['epoch']} is being saved" in said

    with server(*flags, port=address.rpartition(":")[2], token=TOKEN):
        insist(run(command))
    assert_same_state(run_dir, tmp_path / "local")
    assert_same_log(run_dir, tmp_path / "local")
    rows = read_metrics(run_dir / "metrics.jsonl")
    evaluations = [row for row in rows if "eval/total" in row]
    assert [row["epoch"] for row in evaluations] == list(range(1, EPOCHS + 1))
    for row in evaluations:
        assert row["eval/total"] == row["eval/shapes"] != 0
        assert 0 <= row["eval/ocr"] <= 1
    assert not any("reward/ocr" in row for row in rows)
