"""A short run against its record, and whatever must not change it: memory knobs, stopping."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.golden.make_short_run import GOLDEN, short_run

# Everything that bounds memory, turned the other way.
MEMORY: dict[str, Any] = {
    "sample.batch_size": 12,
    "train.batch_size": 4,
    "perf.vae_batch_size": 3,
    "perf.embed_cache_gb": 0.0,
    "perf.offload_text_encoders": True,
    "perf.gradient_checkpointing": True,
}


def agree(found: Any, expected: Any, within: float) -> None:
    """Equal in structure; numbers to a relative (around 0 an absolute) ``within``."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            agree(found[key], value, within)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            agree(one, other, within)
    else:
        assert found == (expected and pytest.approx(expected, rel=within, abs=within))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Any]:
    return short_run(tmp_path_factory.mktemp("runs") / "whole")


def test_the_run_is_the_recorded_one(whole):
    agree(whole, json.loads(GOLDEN.read_text()), 1e-6)
    # The record is of a run that learns: neither a gradient nor a distance is zero.
    last = whole["metrics"][-2]
    assert last["optim/grad_norm"] > 0 and last["loss/old_distance"] > 0 and last["loss/kl"] > 0


def test_memory_knobs_change_nothing(whole, tmp_path):
    agree(short_run(tmp_path, **MEMORY), whole, 1e-9)


def test_stopping_changes_nothing(whole, tmp_path: Path):
    short_run(tmp_path, num_epochs=1)
    agree(short_run(tmp_path), whole, 0.0)
