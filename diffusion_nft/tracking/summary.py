"""What a run gained: a table of its first and last evaluation, and the images side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from diffusion_nft.evaluation.results import NUM_SAMPLES, Evaluation
from diffusion_nft.tracking.grids import side_by_side
from diffusion_nft.tracking.metrics import METRICS_FILE, read_metrics

# The column of evaluations that counts the changes of the test prompts; absent before the first.
TEST_SET = "test_set"


def images_file(stage: int) -> str:
    """The name of the images that end ``stage``; 0: a run without stages."""
    return f"before_after_stage{stage}.png" if stage else "before_after.png"


def stage_evaluations(path: Path, stage: int) -> list[dict[str, Any]]:
    """The evaluations of ``stage`` in the metrics file ``path``; 0: of a run without stages.

    Those of different stages are of other test lines or rewards, and do not compare.
    """
    rows = read_metrics(path)
    return [row for row in rows if "eval/total" in row and row.get("stage", 0) == stage]


def comparable(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a stage's ``evaluations`` that compare with the last: of the same test prompts, and
    of as many lines.
    """
    own = [(row.get(NUM_SAMPLES), row.get(TEST_SET)) for row in evaluations]
    return [row for row, what in zip(evaluations, own, strict=True) if what == own[-1]]


def result_table(run_dir: Path, stage: int = 0) -> str:
    """First and last evaluation of ``stage`` (0: of a run without stages), a row per metric and
    tag; says so if there was none.

    Evaluations that do not compare with the last are left out.
    """
    name = f"stage {stage}" if stage else ""
    rows = comparable(stage_evaluations(run_dir / METRICS_FILE, stage))
    if not rows:
        return f"{run_dir}: no evaluation yet{f' in {name}' if name else ''}"
    first, last = rows[0], rows[-1]
    best = max(rows, key=lambda row: row["eval/total"])
    table = [(name, f"epoch {first['epoch']}", f"epoch {last['epoch']}", "gain")]
    names = [key for key in last if key.startswith("eval/") and key != NUM_SAMPLES]
    for key in sorted(names, key=lambda key: (key.startswith("eval/tag/"), key)):
        before, after = first.get(key), last[key]
        if before is not None and after is not None:
            table.append(
                (
                    key.removeprefix("eval/"),
                    f"{before:.4f}",
                    f"{after:.4f}",
                    f"{after - before:+.4f}",
                )
            )
    best_line = f"best eval/total: {best['eval/total']:.4f} at epoch {best['epoch']}"
    return "\n".join([*aligned(table, str.rjust), best_line])


def result(run_dir: Path, stage: int = 0) -> str:
    """What ``stage`` gained, as text to print: its table, and where its images are."""
    images = run_dir / images_file(stage)
    drawn = [f"before/after images: {images}"] if images.exists() else []
    return "\n".join([result_table(run_dir, stage), *drawn])


def aligned(
    table: Sequence[Sequence[str]], align: Callable[[str, int], str] = str.ljust
) -> list[str]:
    """Its rows as lines: the first column is left-aligned, the others as ``align`` does it."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(align, row[1:], widths[1:])]).rstrip()
        for row in table
    ]


def compare_images(before: Evaluation, after: Evaluation) -> Image:
    """The same test lines by two policies, each pair with its scores."""
    lines = before.image_lines
    return side_by_side(
        before.images,
        after.images,
        [before.prompts[line].text for line in lines],
        [before.scores["total"][line] for line in lines],
        [after.scores["total"][line] for line in lines],
    )
