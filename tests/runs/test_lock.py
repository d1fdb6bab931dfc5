"""One process at a time writes to a folder; a kill releases its lock."""

import errno
import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.run import StartError
from diffusion_nft.run import run as start
from diffusion_nft.runs.lock import LOCK_FILE, FolderInUse, only_writer
from tests.launch import smoke
from tests.scripts.in_process import call, script

CPU = torch.device("cpu")
ONE = Distributed(0, 1, 0, CPU)


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[int]:
    """Locks ``folder`` in another process, which has a child that outlives it; yields its id."""
    ready, told = os.pipe()
    holder = os.fork()
    if not holder:
        with only_writer("save_dir", folder, ONE):
            worker = os.fork()
            if worker:
                os.write(told, str(worker).encode())
            time.sleep(60)
        os._exit(1)
    worker = int(os.read(ready, 100))
    try:
        yield holder
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        # Leftovers of the killed process do not prevent a new start.
        with only_writer("save_dir", folder, ONE):
            os.kill(worker, signal.SIGKILL)
        os.close(ready)
        os.close(told)


def test_the_second_writer_is_refused_by_name_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "run"
    with held_elsewhere(folder) as holder:
        words = rf"save_dir = '{folder}' is in use by process {holder} on host "
        words += rf"{socket.gethostname()} since 20\d\d-.*Z; .*another save_dir"
        with pytest.raises(FolderInUse, match=words), only_writer("save_dir", folder, ONE):
            pass
        # Refused on every rank.
        other = Distributed(1, 2, 1, CPU)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Distributed, "broadcast_object", lambda self, value: "in use")
            with pytest.raises(FolderInUse), only_writer("save_dir", folder, other):
                pass


def test_a_second_start_of_a_run_is_refused(tmp_path):
    with held_elsewhere(tmp_path / "run") as holder:
        with pytest.raises(StartError, match=f"is in use by process {holder} on host"):
            start(smoke(tmp_path / "run"), ONE)
        assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / LOCK_FILE]


def test_a_second_evaluation_into_a_folder_is_refused(tmp_path):
    flags = "--pretrained shapes --resolution 48 --max_sequence_length 8 --mixed_precision no"
    evaluation = [*flags.split(), "--output_dir", tmp_path / "out", "--dataset", "shapes"]
    with held_elsewhere(tmp_path / "out"):
        with pytest.raises(FolderInUse, match=r"--output_dir = .* is in use by process"):
            call(script("evaluation"), *evaluation, "--limit", 2)
        assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / LOCK_FILE]


def test_the_folder_is_afterwards_as_it_was(tmp_path):
    with only_writer("save_dir", tmp_path / "new", ONE):
        assert (tmp_path / "new" / LOCK_FILE).is_file()
    with only_writer("save_dir", tmp_path, ONE):
        pass
    assert not list(tmp_path.iterdir())


def test_a_leftover_file_is_not_a_lock(tmp_path):
    (tmp_path / LOCK_FILE).write_text("process 1 on host gone since then")
    with only_writer("save_dir", tmp_path, ONE):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK_FILE).read_text()


def test_a_file_removed_by_its_holder_is_locked_again(tmp_path, monkeypatch):
    path, real, calls = tmp_path / LOCK_FILE, fcntl.lockf, []

    def lockf(descriptor: int, how: int) -> None:
        if not calls:
            path.unlink()
        calls.append(descriptor)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with only_writer("save_dir", tmp_path, ONE):
        assert len(calls) == 2 and path.is_file()


def test_a_folder_that_cannot_be_locked_gives_a_warning(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with only_writer("save_dir", tmp_path, ONE):
        pass
    assert "cannot be locked (No locks available): make sure" in capsys.readouterr().err
