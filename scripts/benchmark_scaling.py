"""How an epoch's cost grows: with prompts, images per prompt, resolution, and ranks.

    python scripts/benchmark_scaling.py --output scaling.json --figure scaling.png
    python scripts/benchmark_scaling.py --axes groups resolution --repeats 5

Every curve is of the product's own epochs, the fastest of --repeats after one to warm up, all other
sizes fixed; the exponent is the slope of a straight line through the logarithms (1: proportional,
0: constant, -1: halves where the size doubles).  The built-in model; for resolutions sd3.5-tiny,
the SD3.5 architecture with small random weights.  The figure needs matplotlib (the extra "plots").
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark import describe, make_config

from diffusion_nft.benchmarks.models import Product, Setup
from diffusion_nft.benchmarks.phases import synchronize
from diffusion_nft.command_line import command, positive, user_path
from diffusion_nft.distributed.ranks import Distributed, distributed
from diffusion_nft.rewards import parse_option
from diffusion_nft.utils.files import write_atomically
from diffusion_nft.utils.paths import prepare_folder

BENCHMARK = Path(__file__).with_name("benchmark.py")
PARTS = ("sampling", "training", "epoch")


@dataclass(frozen=True)
class Axis:
    """What is varied: ``key`` over ``sizes``, all ``fixed`` beside it."""

    key: str
    sizes: tuple[int, ...]
    fixed: tuple[str, ...]
    arch: str = "shapes"
    preset: str = "shapes"


# Whole micro-batches at every size, so that no curve has the steps of a half-empty last one.
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


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    add("--repeats", type=positive, default=3, help="epochs at each size; the fastest counts")
    add("--ranks", type=positive, nargs="+", default=list(AXES["ranks"].sizes), help="processes")
    add("--output", type=user_path, help="write the JSON here too")
    add("--figure", type=user_path, help="draw the curves into this PNG")
    return parser.parse_args()


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """k of the least-squares fit ``seconds = c size^k`` in logarithms."""
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(slope)


def time_here(
    axis: Axis, size: int, repeats: int, dist: Distributed, folder: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of the parts of an epoch at ``size``, and what ran."""
    changes = [*map(parse_option, axis.fixed), (axis.key, size)]
    args = argparse.Namespace(arch=axis.arch, preset=axis.preset, rewards=None, set=changes)
    setup = Setup.of(make_config(args, folder), dist, axis.arch)
    way = Product(setup)
    best: dict[str, float] = dict.fromkeys(PARTS, float("inf"))
    for epoch in range(repeats + 1):
        started = time.perf_counter()
        samples, r = way.sample(epoch)
        synchronize(dist.device)
        sampled = time.perf_counter()
        way.train(samples, r, epoch)
        synchronize(dist.device)
        ended = time.perf_counter()
        if epoch > 0:
            times = (sampled - started, ended - sampled, ended - started)
            best = {part: min(best[part], s) for part, s in zip(PARTS, times, strict=True)}
    return best, describe(setup)


def time_ranks(axis: Axis, ranks: int, repeats: int, folder: str) -> dict[str, float]:
    """Seconds of an epoch on ``ranks`` processes of one thread each, by torchrun."""
    output = Path(folder, f"ranks-{ranks}.json")
    arguments = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    arguments += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(BENCHMARK)]
    arguments += ["--preset", axis.preset, "--repeats", str(repeats), "--output", str(output)]
    for change in axis.fixed:
        arguments += ["--set", change]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise OSError(f"{BENCHMARK.name} on {ranks} ranks ended with status {done.returncode}")
    result = json.loads(output.read_text())
    return {"epoch": result["ours"]["epoch_seconds"]["min"]}


def measure(args: argparse.Namespace, dist: Distributed, folder: str) -> dict[str, Any]:
    """The curves of ``args.axes``, ready for JSON."""
    curves: dict[str, Any] = {}
    for name in args.axes:
        axis, about = AXES[name], None
        sizes = args.ranks if name == "ranks" else axis.sizes
        times: list[dict[str, float]] = []
        for size in sizes:
            if name == "ranks":
                times.append(time_ranks(axis, size, args.repeats, folder))
            else:
                seconds, about = time_here(axis, size, args.repeats, dist, folder)
                times.append(seconds)
            dist.print_once(f"{name} {size}: {times[-1]['epoch']:.3f} s an epoch")
        seconds = {part: [time[part] for time in times] for part in times[0]}
        curves[name] = {
            "key": axis.key,
            "sizes": list(sizes),
            "fixed": list(axis.fixed),
            "seconds": seconds,
            "exponents": {part: exponent(sizes, values) for part, values in seconds.items()},
            "about": about,
        }
    return curves


def draw(curves: dict[str, Any], path: Path) -> None:
    """One panel for each curve, both axes logarithmic.  Raises ImportError without matplotlib."""
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
    panels[0].set_ylabel("seconds an epoch")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, prints JSON and exponents, draws."""
    args = parse_flags()
    if len(set(args.ranks)) < 2 and "ranks" in args.axes:
        raise ValueError("--ranks: a slope needs two numbers at least")
    if args.figure and not importlib.util.find_spec("matplotlib"):
        raise ImportError("--figure needs matplotlib: pip install 'diffusion-nft[plots]'")
    for path in filter(None, (args.output, args.figure)):
        prepare_folder(path.parent)
    with distributed(timeout_minutes=10) as dist, tempfile.TemporaryDirectory() as folder:
        curves = measure(args, dist, folder)
    text = json.dumps({"threads": torch.get_num_threads(), "curves": curves}, indent=2)
    print(text)
    for name, curve in curves.items():
        fits = ", ".join(f"{part} {k:.2f}" for part, k in curve["exponents"].items())
        print(f"{name} {curve['sizes']}: exponents {fits}")
    if args.output:
        write_atomically(args.output, f"{text}\n".encode())
    if args.figure:
        draw(curves, args.figure)


if __name__ == "__main__":
    command(main)
