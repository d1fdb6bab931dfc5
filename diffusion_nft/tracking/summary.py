"""The result of a run: a table of its first and last evaluation, and before/after images."""

from pathlib import Path
from typing import Any

from PIL.Image import Image
from tabulate import tabulate

from diffusion_nft.evaluation.results import NUM_SAMPLES, Evaluation
from diffusion_nft.tracking.grids import side_by_side
from diffusion_nft.tracking.metrics import METRICS_FILE, read_metrics

# Metric that counts changes of the test prompts; absent before the first change.
TEST_SET = "test_set"


def images_file(stage: int) -> str:
    """File name of the before/after images of ``stage`` (0: of a run without stages)."""
    return f"before_after_stage{stage}.png" if stage else "before_after.png"


def stage_evaluations(path: Path, stage: int) -> list[dict[str, Any]]:
    """The evaluations of ``stage`` (0: of a run without stages) in the metrics file ``path``."""
    rows = read_metrics(path)
    return [row for row in rows if "eval/total" in row and row.get("stage", 0) == stage]


def comparable(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a stage's ``evaluations`` with the test prompts and number of lines of the last."""
    tests = [(row.get(NUM_SAMPLES), row.get(TEST_SET)) for row in evaluations]
    return [row for row, test in zip(evaluations, tests, strict=True) if test == tests[-1]]


def result_table(run_dir: Path, stage: int = 0) -> str:
    """Table of the first and last comparable evaluation of ``stage`` (0: of a run without stages),
    one row per metric and tag, or a line if there is none.
    """
    name = f"stage {stage}" if stage else ""
    rows = comparable(stage_evaluations(run_dir / METRICS_FILE, stage))
    if not rows:
        return f"{run_dir}: no evaluation yet{f' in {name}' if name else ''}"
    first, last = rows[0], rows[-1]
    best = max(rows, key=lambda row: row["eval/total"])
    keys = [key for key in last if key.startswith("eval/") and key != NUM_SAMPLES]
    keys.sort(key=lambda key: (key.startswith("eval/tag/"), key))
    table = tabulate(
        [
            (key.removeprefix("eval/"), first[key], last[key], last[key] - first[key])
            for key in keys
            if first.get(key) is not None and last[key] is not None
        ],
        (name, f"epoch {first['epoch']}", f"epoch {last['epoch']}", "gain"),
        tablefmt="plain",
        floatfmt=("", ".4f", ".4f", "+.4f"),
    )
    return f"{table}\nbest eval/total: {best['eval/total']:.4f} at epoch {best['epoch']}"


def result(run_dir: Path, stage: int = 0) -> str:
    """``result_table`` of ``stage``, and the path of its before/after images."""
    images = run_dir / images_file(stage)
    where = f"\nbefore/after images: {images}" if images.exists() else ""
    return result_table(run_dir, stage) + where


def compare_images(before: Evaluation, after: Evaluation) -> Image:
    """Pairs of images of the same test lines by two policies, with their scores."""
    lines = before.image_lines
    return side_by_side(
        before.images,
        after.images,
        [before.prompts[line].text for line in lines],
        [before.scores["total"][line] for line in lines],
        [after.scores["total"][line] for line in lines],
    )
