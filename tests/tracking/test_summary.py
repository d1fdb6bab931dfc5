"""The table of a run's result, checked by hand."""

import json
from pathlib import Path

import pytest

from diffusion_nft.tracking.summary import result_table


def write(run_dir: Path, *rows: dict) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_first_last_and_best(tmp_path):
    write(
        tmp_path,
        {"step": 0, "epoch": 0, "eval/total": 0.25, "eval/x": 0.5, "eval/gone": None},
        {"step": 1, "epoch": 1, "loss/total": 3.0},
        {"step": 1, "epoch": 1, "eval/total": 0.75, "eval/x": 0.5},
        {"step": 2, "epoch": 2, "eval/total": 0.5, "eval/x": 0.125, "eval/gone": 1.0},
    )
    lines = [line.split() for line in result_table(tmp_path).splitlines()]
    assert lines[0] == ["epoch", "0", "epoch", "2", "gain"]
    assert ["total", "0.2500", "0.5000", "+0.2500"] in lines
    assert ["x", "0.5000", "0.1250", "-0.3750"] in lines
    assert not any("gone" in line for line in lines)
    assert "best eval/total: 0.7500 at epoch 1" in result_table(tmp_path)


@pytest.mark.parametrize("change", [{"eval/num_samples": 24}, {"test_set": 1}])
def test_evaluations_of_other_lines_or_prompts_do_not_compare(tmp_path, change):
    same = {"eval/num_samples": 12}
    write(
        tmp_path,
        {"step": 0, "epoch": 0, "eval/total": 0.9} | same,
        {"step": 1, "epoch": 1, "eval/total": 0.5} | same | change,
        {"step": 2, "epoch": 2, "eval/total": 0.75} | same | change,
    )
    lines = [line.split() for line in result_table(tmp_path).splitlines()]
    assert lines[0] == ["epoch", "1", "epoch", "2", "gain"]
    assert lines[1:-1] == [["total", "0.5000", "0.7500", "+0.2500"]]
    assert "best eval/total: 0.7500 at epoch 2" in result_table(tmp_path)


def test_stages_do_not_compare(tmp_path):
    write(
        tmp_path,
        {"step": 0, "epoch": 0, "stage": 1, "eval/total": 0.25},
        {"step": 1, "epoch": 1, "stage": 1, "eval/total": 0.75},
        {"step": 1, "epoch": 1, "stage": 2, "eval/total": 5.0},
        {"step": 2, "epoch": 2, "stage": 2, "eval/total": 4.5},
    )
    first, second = (
        [line.split() for line in result_table(tmp_path, n).splitlines()] for n in (1, 2)
    )
    assert first[0] == ["stage", "1", "epoch", "0", "epoch", "1", "gain"]
    assert first[1] == ["total", "0.2500", "0.7500", "+0.5000"]
    assert second[0] == ["stage", "2", "epoch", "1", "epoch", "2", "gain"]
    assert second[1] == ["total", "5.0000", "4.5000", "-0.5000"]
    assert "no evaluation yet in stage 3" in result_table(tmp_path, 3)


def test_without_an_evaluation_it_says_so(tmp_path):
    assert "no evaluation yet" in result_table(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "loss/total": 1.0}\n')
    assert "no evaluation yet" in result_table(tmp_path)
