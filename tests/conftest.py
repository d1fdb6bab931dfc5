"""What several test modules need."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "config"))


@pytest.fixture
def smoke_config(tmp_path):
    """The smoke preset, writing below tmp_path."""
    import nft

    config = nft.shapes_smoke()
    config.save_dir = str(tmp_path / "run")
    return config
