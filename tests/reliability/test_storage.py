"""Full and read-only disks: one line, the former state intact, and the run can continue."""

import json
import re

import pytest
import torch

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.runs.checkpoint import Checkpointer, CheckpointError
from diffusion_nft.runs.run_dir import RunDirError, check_run_dir
from diffusion_nft.tracking.metrics import Metrics, read_metrics
from diffusion_nft.trainer import Trainer
from diffusion_nft.utils.files import DiskError, append_line, write_atomically
from tests.launch import make_trainer, run, smoke, train_command, train_here
from tests.reliability.compare import differences
from tests.reliability.experiments import SETTINGS

CPU = torch.device("cpu")


def build(run_dir) -> Trainer:
    return make_trainer(smoke(run_dir, SETTINGS), Distributed(0, 1, 0, CPU))


def kilobytes_of_a_run(finished) -> tuple[int, int]:
    """Of one checkpoint, and of the rest."""

    def size(paths) -> int:
        return sum(-(-path.stat().st_size // 4096) * 4 for path in paths if path.is_file())

    one = size((finished / "checkpoints" / "checkpoint-4").rglob("*"))
    rest = size(path for path in finished.rglob("*") if "checkpoints" not in path.parts)
    return one, rest


def test_a_run_on_a_full_disk_keeps_its_state_and_goes_on_when_there_is_room(finished, disk):
    folder, remount = disk
    one, rest = kilobytes_of_a_run(finished)
    # Room for the first checkpoint and half of the second.
    remount(f"size={one * 3 // 2 + rest}k")
    run_dir = folder / "run"
    words = rf"{re.escape(str(run_dir))}/checkpoints/checkpoint-4 could not be written.*No space"
    with pytest.raises(DiskError, match=words) as caught:
        train_here(run_dir, SETTINGS)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir()] == [
        "checkpoint-2"
    ]
    remount(f"size={3 * (one + rest)}k")
    train_here(run_dir, SETTINGS)
    assert differences(run_dir, finished) == []


def test_a_read_only_disk_is_named_before_the_first_epoch(finished, disk):
    folder, remount = disk
    remount("size=64m")
    checkpointer = Checkpointer(folder / "run")
    checkpointer.save(1, tensors={}, state={"epoch": 1})
    remount("ro")
    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written.*Read-only"):
        checkpointer.save(2, tensors={}, state={"epoch": 2})
    checkpoint = checkpointer.load_latest()
    assert checkpoint is not None and checkpoint.state == {"epoch": 1}
    with pytest.raises(OSError, match=r"Read-only file system.*new"):
        build(folder / "new")


def fill(folder) -> None:
    with pytest.raises(OSError, match="No space"), (folder / "filler").open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()


def test_small_files_on_a_full_disk_stay_as_they_were(disk, smoke_config):
    folder, _ = disk
    smoke_config.log.wandb = "off"
    write_atomically(folder / "config.json", b"{}\n")
    append_line(folder / "lines.jsonl", "1")
    metrics = Metrics(smoke_config, folder)
    metrics.log({"a": 1.0}, step=1, epoch=1)
    fill(folder)
    with pytest.raises(DiskError, match=r"config\.json could not be written: No space left"):
        write_atomically(folder / "config.json", bytes(8192))
    with pytest.raises(DiskError, match=r"lines\.jsonl could not be written: No space left"):
        append_line(folder / "lines.jsonl", "2" * 8192)
    with pytest.raises(DiskError, match=r"metrics\.jsonl could not be written: No space left"):
        metrics.log({f"key{i}": 1.0 for i in range(1000)}, step=2, epoch=2)
    (folder / "filler").unlink()
    assert (folder / "config.json").read_bytes() == b"{}\n"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "lines.jsonl",
        "metrics.jsonl",
    ]
    append_line(folder / "lines.jsonl", "3")
    assert (folder / "lines.jsonl").read_text() == "1\n3\n"
    again = Metrics(smoke_config, folder)
    again.log({"a": 2.0}, step=2, epoch=2)
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2]


def test_a_half_written_configuration_is_named_with_the_way_out(smoke_config, tmp_path):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "config.json"
    for damage in (b'{"seed": 4', b"\x00" * 100, b"\xff\xfe"):
        path.write_bytes(damage)
        with pytest.raises(RunDirError, match=r"config\.json is damaged.*state\.json"):
            check_run_dir(smoke_config)


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("nproc", [1, 2])
def test_the_command_says_one_line_about_a_full_disk(finished, disk, nproc):
    folder, remount = disk
    one, rest = kilobytes_of_a_run(finished)
    remount(f"size={one * 3 // 2 + rest}k")
    overrides = [f"{key}={value}" for key, value in SETTINGS.items()]
    done = run(train_command(folder / "run", *overrides, nproc=nproc))
    assert done.returncode != 0
    assert done.stderr.count("Traceback") == (nproc > 1)  # torchrun's own
    assert done.stderr.count("checkpoint-4 could not be written") == 1
    state = json.loads((folder / "run" / "checkpoints/checkpoint-2/state.json").read_text())
    assert state["epoch"] == 1
