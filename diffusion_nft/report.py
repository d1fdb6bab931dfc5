"""What a run gained: a table of its first and last evaluation, and the pictures side by side."""

from pathlib import Path

from PIL.Image import Image

from diffusion_nft.evaluate import NUM_SAMPLES, Evaluation
from diffusion_nft.metrics import METRICS_FILE, read_metrics
from diffusion_nft.pictures import side_by_side


def result_table(run_dir: Path) -> str:
    """The run's first and last evaluation, a row per metric and tag; says so if there was none.

    Evaluations of another number of lines than the last do not compare, and are left out.
    """
    path = run_dir / METRICS_FILE
    rows = [row for row in read_metrics(path) if "eval/total" in row] if path.exists() else []
    if not rows:
        return f"{run_dir}: no evaluation yet"
    last = rows[-1]
    rows = [row for row in rows if row.get(NUM_SAMPLES) == last.get(NUM_SAMPLES)]
    first = rows[0]
    best = max(rows, key=lambda row: row["eval/total"])
    table = [("", f"epoch {first['epoch']}", f"epoch {last['epoch']}", "gain")]
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
    return "\n".join([*_aligned(table), best_line])


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table
    ]


def compare_pictures(before: Evaluation, after: Evaluation) -> Image:
    """The same test lines by two policies, each pair with its scores."""
    lines = before.picture_lines
    return side_by_side(
        before.pictures,
        after.pictures,
        [before.prompts[line].text for line in lines],
        [before.scores["total"][line] for line in lines],
        [after.scores["total"][line] for line in lines],
    )
