"""Suites: values, scales and rows of the tables."""

import json
from pathlib import Path

import pytest

from diffusion_nft.evaluation.suites import (
    SUITES,
    as_json,
    as_markdown,
    read_rows,
    result_table,
)

PAPER = SUITES["paper"]


def averages(**means: float) -> dict:
    values = {name: {"mean": mean, "stderr": 0.01, "count": 8} for name, mean in means.items()}
    return {"num_samples": 8, "num_prompts": 2, "mean": values}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two models; the second was interrupted after GenEval."""
    geneval = averages(**{"geneval/accuracy": 0.5})
    geneval["mean_over_tags"] = {"geneval/accuracy": {"mean": 0.625, "stderr": None}}
    drawbench = averages(pickscore=0.85, unifiedreward=0.6, imagereward=-0.3)
    done = {"base": {"geneval": geneval, "drawbench": drawbench}, "lora": {"geneval": geneval}}
    for model, results in done.items():
        for dataset, result in results.items():
            place = tmp_path / model / dataset
            place.mkdir(parents=True)
            (place / "average_scores.json").write_text(json.dumps(result))
        (tmp_path / model / "settings.json").write_text(json.dumps({"seed": 7}))
        (tmp_path / model / "environments.jsonl").write_text('{"torch": "1.0"}\n{"torch": "2.0"}\n')
    (tmp_path / "lora" / "ocr").mkdir()
    (tmp_path / "unrelated").mkdir()
    return tmp_path


def test_a_row_is_in_the_papers_scales(folder):
    base, lora = read_rows(folder, PAPER)
    assert (base.name, lora.name) == ("base", "lora")
    values = {c.title: c.value(base.averages.get(c.dataset, {})) for c in PAPER.columns}
    # PickScore and its error times 26, UnifiedReward times 5; GenEval averaged over tags.
    assert values["PickScore"] == pytest.approx((22.1, 0.26))
    assert values["UnifiedReward"] == pytest.approx((3.0, 0.05))
    assert values["GenEval"] == (0.625, None)
    assert values["ImageReward"] == (-0.3, 0.01)
    assert values["OCR"] is None and values["HPSv2.1"] is None
    assert base.environment == {"torch": "1.0, 2.0"}


def test_the_table_as_a_reader_sees_it(folder):
    lines = result_table(PAPER, read_rows(folder, PAPER)).splitlines()
    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines
    }
    assert cells[""] == [column.title for column in PAPER.columns]
    assert cells["base"] == ["0.625", "", "22.10 ± 0.26", "", "", "", "-0.30 ± 0.01", "3.00 ± 0.05"]
    assert cells["lora"] == ["0.625"] + [""] * 7
    assert cells["reference: base, guidance 4.5"][:3] == ["0.630", "0.590", "22.34"]
    assert cells["reference: Flow-GRPO on OCR"] == ["", "0.920"] + [""] * 6
    assert len({len(line) for line in lines}) == 1
    text = as_markdown(PAPER, read_rows(folder, PAPER))
    for part in ("| seed", "| torch", "geneval 8 lines of 2 prompts, drawbench 8 lines"):
        assert part in text


def test_the_json_holds_all_that_the_table_shows(folder):
    tables = json.loads(json.dumps(as_json(PAPER, read_rows(folder, PAPER))))
    base = tables["models"][0]
    assert base["values"]["PickScore"]["mean"] == pytest.approx(22.1)
    assert base["settings"]["seed"] == 7 and base["environment"]["torch"] == "1.0, 2.0"
    assert base["averages"]["geneval"]["mean"]["geneval/accuracy"]["mean"] == 0.5
    assert tables["references"]["NFT on GenEval"]["GenEval"] == 0.98


def test_reward_settings_are_below_the_table(folder):
    rows = read_rows(folder, PAPER)
    assert "reward_settings" not in as_markdown(PAPER, rows)
    path = folder / "lora" / "geneval" / "average_scores.json"
    result = json.loads(path.read_text())
    result["settings"] = {"reward_options": {"geneval": {"dtype": "fp16"}}, "reward_servers": {}}
    path.write_text(json.dumps(result))
    lines = as_markdown(PAPER, read_rows(folder, PAPER)).splitlines()
    (line,) = (line for line in lines if "geneval: options" in line)
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["", "{'dtype': 'fp16'}"]
