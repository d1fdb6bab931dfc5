"""Seconds per epoch by size, with one process of scripts/benchmark.py per point."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BENCHMARK = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"


@dataclass(frozen=True)
class Axis:
    """A key of the preset, or "ranks", with its values; ``fixed``: other changes of the preset."""

    key: str
    sizes: tuple[int, ...]
    fixed: tuple[str, ...]
    arch: str = "shapes"
    preset: str = "shapes"


# Full micro-batches at every size.
SMALL_BATCHES = ("sample.batch_size=24", "train.batch_size=24", "train.gradient_step_per_epoch=1")
AXES = {
    "groups": Axis(
        "sample.num_groups", (2, 4, 8, 16), ("sample.num_image_per_prompt=24", *SMALL_BATCHES)
    ),
    "images per prompt": Axis(
        "sample.num_image_per_prompt", (12, 24, 48, 96), ("sample.num_groups=2", *SMALL_BATCHES)
    ),
    "resolution": Axis(
        "resolution",
        (64, 128, 256, 512),
        ("sample.num_groups=2", "sample.num_image_per_prompt=2", "sample.num_steps=4"),
        arch="sd3.5-tiny",
        preset="shapes_smoke",
    ),
    "ranks": Axis("ranks", (1, 2), ("sample.num_groups=4", *SMALL_BATCHES)),
}


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """k of the least-squares fit ``seconds = c size^k`` on logarithms."""
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(slope)


def time_epochs(axis: Axis, size: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Results of scripts/benchmark.py at ``size``, with OMP_NUM_THREADS (default 1) threads per
    process.  Raises OSError if it fails.
    """
    is_ranks, output = axis.key == "ranks", folder / "result.json"
    changes = axis.fixed if is_ranks else (*axis.fixed, f"{axis.key}={size}")
    ranks = size if is_ranks else 1
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(BENCHMARK)]
    command += ["--arch", axis.arch, "--preset", axis.preset, "--repeats", str(repeats)]
    command += [f"--output={output}", *(f"--set={change}" for change in changes)]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise OSError(f"{BENCHMARK.name} with {axis.key} {size}: exit status {done.returncode}")
    return json.loads(output.read_text())


def measure(name: str, sizes: Sequence[int], repeats: int, folder: Path) -> dict[str, Any]:
    """Seconds of the fastest epochs on the axis ``name``, and exponents, ready for JSON."""
    axis, seconds, about = AXES[name], {}, None
    for size in sizes:
        result = time_epochs(axis, size, repeats, folder)
        about = result["about"]
        for part, times in result["ours"]["seconds"].items():
            seconds.setdefault(part, []).append(times["min"])
        print(f"{name} {size}: {seconds['epoch'][-1]:.3f} s per epoch", flush=True)
    return {
        "key": axis.key,
        "sizes": list(sizes),
        "fixed": list(axis.fixed),
        "seconds": seconds,
        "exponents": {part: exponent(sizes, values) for part, values in seconds.items()},
        "about": about,
    }


def draw(curves: dict[str, Any], path: Path) -> None:
    """Plots one log-log panel per curve.  Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 3.0), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (name, curve) in zip(panels, curves.items(), strict=True):
        for part, seconds in curve["seconds"].items():
            label = f"{part}: {curve['exponents'][part]:.2f}"
            panel.loglog(curve["sizes"], seconds, marker="o", label=label)
        panel.set_xlabel(name)
        panel.set_xticks(curve["sizes"], [str(size) for size in curve["sizes"]])
        panel.minorticks_off()
        panel.legend(fontsize="small", title="exponent")
    panels[0].set_ylabel("seconds per epoch")
    figure.savefig(path, dpi=150)
