"""What several test modules need."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "config"))
# One thread a process, before torch is imported: several test files run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with multi-process tests, which wait a lot, start first: the suite ends sooner."""
    slow = {item.path for item in items if item.get_closest_marker("multiproc")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def smoke_config(tmp_path):
    """The smoke preset, writing below tmp_path."""
    import nft

    config = nft.shapes_smoke()
    config.save_dir = str(tmp_path / "run")
    return config


@pytest.fixture(scope="session")
def shapes_model():
    """The built-in model in float32 on the CPU, without LoRA: do not change it."""
    from tests.launch import build_shapes_model

    return build_shapes_model()
