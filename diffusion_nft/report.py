"""What a run gained: a table of its first and last evaluation, and the pictures side by side."""

from pathlib import Path

from PIL.Image import Image

from diffusion_nft.evaluate import Evaluation
from diffusion_nft.metrics import METRICS_FILE, read_metrics
from diffusion_nft.pictures import side_by_side


def result_table(run_dir: Path) -> str:
    """First, best and last evaluation of a run as text; says so if there was none."""
    path = run_dir / METRICS_FILE
    lines = [line for line in read_metrics(path) if "eval/total" in line] if path.exists() else []
    if not lines:
        return f"{run_dir}: no evaluation yet"
    first, last = lines[0], lines[-1]
    best = max(lines, key=lambda line: line["eval/total"])
    head = [f"epoch {line['epoch']}" for line in (first, best, last)]
    rows = [("", head[0], f"best: {head[1]}", f"last: {head[2]}", "gain")]
    for key in last:
        values = [line.get(key) for line in (first, best, last)]
        if key.startswith("eval/") and all(isinstance(v, float | int) for v in values):
            numbers = [f"{value:.4f}" for value in values]
            rows.append((key, *numbers, f"{values[2] - values[0]:+.4f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    )


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
