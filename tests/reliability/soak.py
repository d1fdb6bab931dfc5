"""Measures memory, threads, open files and files in the run directory over a long run.

    python tests/reliability/soak.py --epochs 500 --out docs/results/soak

Trains a small run of the built-in model with the training script, writes one line per epoch to
<out>.jsonl and a figure to <out>.png.  Exits with 1 if a quantity grew from the median of the first
fifth to that of the last fifth, after a warm-up of a tenth.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from diffusion_nft.command_line import script_parser
from tests.launch import environment, train_command

SETTINGS = {
    "sample.num_groups": 2,
    "sample.num_image_per_prompt": 2,
    "sample.num_steps": 2,
    "eval.num_prompts": 4,
    "eval.num_steps": 2,
    "eval_freq": 25,
    "save_freq": 5,
    "log.num_images": 4,
    "log.image_freq": 25,
}
# Quantity -> relative growth that is allowed.
ALLOWED = {"memory_mb": 0.02, "threads": 0.0, "open_files": 0.0, "checkpoints": 0.0}


def look(process: psutil.Process, run_dir: Path) -> dict[str, float]:
    return {
        "memory_mb": process.memory_info().rss / 1e6,
        "threads": process.num_threads(),
        "open_files": process.num_fds(),
        "checkpoints": len(list(run_dir.glob("checkpoints/checkpoint-*"))),
        "images_and_results": len(list(run_dir.glob("images/*")) + list(run_dir.glob("eval/*"))),
    }


def epochs_made(path: Path) -> int:
    return path.read_text().count('"loss/total"') if path.exists() else 0


def watch(epochs: int, run_dir: Path) -> list[dict[str, float]]:
    """Trains ``epochs``, with one measurement per epoch.  Raises RuntimeError if the run fails."""
    overrides = [f"{key}={value}" for key, value in (SETTINGS | {"num_epochs": epochs}).items()]
    rows: list[dict[str, float]] = []
    log = run_dir.with_suffix(".log")
    with (
        log.open("w") as output,
        subprocess.Popen(
            train_command(run_dir, *overrides), stdout=output, stderr=output, env=environment()
        ) as started,
    ):
        process = psutil.Process(started.pid)
        while started.poll() is None:
            time.sleep(0.05)
            epoch = epochs_made(run_dir / "metrics.jsonl")
            if epoch > (rows[-1]["epoch"] if rows else 0) and started.poll() is None:
                rows.append({"epoch": epoch, **look(process, run_dir)})
    if started.returncode:
        raise RuntimeError(f"the run failed:\n{log.read_text()[-2000:]}")
    return rows


def growth(rows: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Quantity -> medians of the first and last fifth, after a tenth of warm-up.

    Raises ValueError without ``rows``.
    """
    if not rows:
        raise ValueError("no epoch was seen")
    settled = rows[len(rows) // 10 :]
    fifth = max(1, len(settled) // 5)
    return {
        key: (
            statistics.median(row[key] for row in settled[:fifth]),
            statistics.median(row[key] for row in settled[-fifth:]),
        )
        for key in ALLOWED
    }


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Plots one panel per quantity over epochs."""
    from matplotlib.figure import Figure

    keys = [key for key in rows[0] if key != "epoch"]
    figure = Figure(figsize=(7, 2 * len(keys)), layout="constrained")
    axes = figure.subplots(len(keys), 1, sharex=True)
    for axis, key in zip(axes, keys, strict=True):
        axis.plot([row["epoch"] for row in rows], [row[key] for row in rows], linewidth=1)
        axis.set_ylabel(key.replace("_", " "))
        axis.set_ylim(0, 1.15 * max(row[key] for row in rows))
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("epoch")
    figure.savefig(path, dpi=110)


def main() -> Any:
    parser = script_parser(__doc__)
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("soak"), help="without suffix")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = watch(args.epochs, Path(folder) / "run")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(rows, args.out.with_suffix(".png"))
    print(f"{args.epochs} epochs in {time.monotonic() - started:.0f} s")
    failed = []
    for key, (first, last) in growth(rows).items():
        grew = last > first * (1 + ALLOWED[key])
        print(f"{key:12} {first:10.1f} -> {last:10.1f}  {'GREW' if grew else 'steady'}")
        failed += [key] if grew else []
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
