"""What the tests of this folder share."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch import train_here
from tests.reliability.experiments import SETTINGS


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train_here(run_dir, SETTINGS)
    return run_dir


@pytest.fixture
def disk(tmp_path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A disk of 64 kB, and a function that mounts it again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
            check=True,
            capture_output=True,
            text=True,
        )

    try:
        mount("size=64k")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    yield folder, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
