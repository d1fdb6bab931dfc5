"""Times every phase of an epoch, and compares it with the published way of running the algorithm.

    python scripts/benchmark.py                                   # the built-in model, on CPUs
    python scripts/benchmark.py --baseline --repeats 5 --set sample.num_groups=4
    torchrun --nproc_per_node=1 scripts/benchmark.py --arch sd3.5-medium --baseline \\
        --set sample.num_groups=2                                 # random weights, on a GPU

Throughput is that of whole epochs (sampling, rewards, updates) after one to warm up; phases come
from further epochs, in which each waits for the device.  With --baseline, epochs of both ways
alternate in this process, and the ratio is taken of neighbours.  Prints a table and JSON.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from diffusion_nft.benchmarks.baseline import Published
from diffusion_nft.benchmarks.models import ARCHITECTURES, Product, Setup
from diffusion_nft.benchmarks.phases import Observer, Peaks, judged_phases, synchronize
from diffusion_nft.command_line import command, positive, user_path
from diffusion_nft.distributed.ranks import Distributed, distributed
from diffusion_nft.rewards import parse_option
from diffusion_nft.runs.environment import cpu_name
from diffusion_nft.utils.files import write_atomically
from diffusion_nft.utils.paths import prepare_folder
from diffusion_nft.validation.config_files import load_file
from diffusion_nft.validation.schema import SCHEMA, expand_paths, unknown_key, validate

CONFIG_FILE = Path(__file__).resolve().parent.parent / "config" / "nft.py"
PRETRAINED = "pretrained"
PRESETS = {"shapes": "shapes", "sd3.5-tiny": "shapes_smoke"}
DEFAULT_PRESET = "sd3_geneval"
# A reward of real models that needs no weights.
SYNTHETIC_REWARD = "jpeg_compressibility"
PACKAGES = ("diffusers", "transformers", "peft", "numpy")


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ["shapes", PRETRAINED, *ARCHITECTURES]
    add("--arch", choices=names, default="shapes", help=f"{PRETRAINED}: what the preset names")
    add("--preset", help=f"of config/nft.py; default: shapes, or {DEFAULT_PRESET}")
    setting = {"type": parse_option, "action": "append", "default": [], "metavar": "KEY=VALUE"}
    add("--set", **setting, help="such as train.batch_size=4")
    add("--rewards", help="comma-separated, weight 1; default: the preset's")
    add("--baseline", action="store_true", help="alternate with the published way")
    add("--repeats", type=positive, default=3, help="measured epochs of each way")
    add("--output", type=user_path, help="also write the JSON here")
    return parser.parse_args()


def make_config(args: argparse.Namespace, save_dir: str) -> ConfigDict:
    """The preset with the command line's changes.  Raises ValueError for what cannot be."""
    config = load_file(CONFIG_FILE).get_config(
        args.preset or PRESETS.get(args.arch, DEFAULT_PRESET)
    )
    config.save_dir = save_dir
    config.stages = ()
    rewards = args.rewards
    if args.arch in ARCHITECTURES:
        rewards = rewards or SYNTHETIC_REWARD
        config.dataset = "shapes"  # any that is there: its words are not used
        config.pretrained.model = f"random/{args.arch}"
    if rewards:
        config.reward_fn = ConfigDict(dict.fromkeys(rewards.split(","), 1.0))
    for key, value in args.set:
        if key not in SCHEMA:
            raise ValueError(f"--set {key} {unknown_key(key)}")
        config.update_from_flattened_dict({key: value})
    validate(config)
    expand_paths(config)
    if config.algorithm != "nft":
        raise ValueError(f"algorithm {config.algorithm!r}: the benchmark is of 'nft'")
    return config


def run_epoch(way: Any, epoch: int) -> None:
    """One epoch of ``Product`` or ``Published``."""
    samples, r = way.sample(epoch)
    way.train(samples, r, epoch)


def timed_epoch(way: Any, epoch: int) -> float:
    """Seconds of an epoch, from all ranks' start to all ranks' end."""
    dist = way.setup.dist
    synchronize(dist.device)
    dist.barrier()
    started = time.perf_counter()
    run_epoch(way, epoch)
    synchronize(dist.device)
    dist.barrier()
    return time.perf_counter() - started


class Memory:
    """Peak memory in GB: on a GPU of one way without what others keep there, else of the process
    since it began.
    """

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"
        self._kept: dict[str, int] = {}
        self._before = 0

    def keep(self, name: str) -> None:
        """What was allocated since the last call belongs to ``name``."""
        if self._gpu:
            now = torch.cuda.memory_allocated()
            self._kept[name] = now - self._before
            self._before = now

    def start(self) -> None:
        """Peaks count from here."""
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak(self, name: str) -> float:
        """Since ``start``."""
        if not self._gpu:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        others = sum(size for other, size in self._kept.items() if other != name)
        return (torch.cuda.max_memory_allocated() - others) / 1e9


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(setup: Setup, repeats: int, baseline: bool) -> dict[str, Any]:
    """Everything that is measured, ready for JSON; rates are of all ranks, FLOPs of this one."""
    dist = setup.dist
    memory = Memory(dist.device)
    ways: list[Any] = []
    for build in (Product, Published)[: 1 + baseline]:
        ways.append(build(setup))
        memory.keep(ways[-1].name)
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    peaks_gb: dict[str, float] = {}
    for epoch in range(repeats + 1):
        for way in ways:
            memory.start()
            took = timed_epoch(way, epoch)
            peaks_gb[way.name] = memory.peak(way.name)
            if epoch > 0:  # the first one warms up
                seconds[way.name].append(took)
    precision = ways[0].model.precision
    dtypes = {"others": precision.compute_dtype, "decode": precision.trained_dtype}
    measured = {dtype: Peaks.measure(dist.device, dtype) for dtype in set(dtypes.values())}
    peaks = {name: measured[dtype] for name, dtype in dtypes.items()}
    results: dict[str, Any] = {
        "peaks": {
            "matmul_tflops": peaks["others"].flops / 1e12,
            "matmul_tflops_vae": peaks["decode"].flops / 1e12,
            "copy_gb_per_second": peaks["others"].bandwidth / 1e9,
        }
    }
    for way in ways:
        observer = Observer(way)
        with observer.watching():
            run_epoch(way, repeats + 1)
        if isinstance(way, Product):
            observer.time("checkpoint", way.state.save)
        results[way.name] = _summary(setup, observer, seconds[way.name], peaks)
        results[way.name]["peak_memory_gb"] = peaks_gb[way.name]
    if baseline:
        pairs = zip(seconds["baseline"], seconds["ours"], strict=True)
        ratios = [theirs / ours for theirs, ours in pairs]
        results["speedup"] = spread(ratios) | {"all": ratios}
    return results


def _summary(
    setup: Setup, observer: Observer, seconds: list[float], peaks: dict[str, Peaks]
) -> dict[str, Any]:
    phases = observer.phases
    # Ranks' shares differ by one sample at most.
    pairs = sum(setup.dist.gather_objects(phases["backward"].rows))
    flops = sum(phase.flops for phase in phases.values())
    rate = spread([setup.num_samples / s for s in seconds])
    return {
        "epoch_seconds": spread(seconds) | {"all": seconds},
        "images_per_second": rate,
        "pairs_per_second": spread([pairs / s for s in seconds]),
        "pairs_per_epoch": pairs,
        "flops_per_epoch": flops,
        "mfu": flops / statistics.median(seconds) / peaks["others"].flops,
        "phases": judged_phases(phases, peaks),
    }


def describe(setup: Setup) -> dict[str, Any]:
    """What ran where: sizes, versions, hardware."""
    config, cuda = setup.config, torch.cuda.is_available()
    random = setup.arch in ARCHITECTURES
    return {
        "arch": setup.arch,
        "weights": "random" if random else config.pretrained.model,
        "text_encoders": "none: random tensors in place of embeddings" if random else "the model's",
        "preset_sizes": {
            "resolution": config.resolution,
            "mixed_precision": config.mixed_precision,
            "rewards": list(config.reward_fn),
            "sample": config.sample.to_dict(),
            "train": config.train.to_dict(),
            "perf": config.perf.to_dict(),
        },
        "device": torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {os.cpu_count()} cores",
        "ranks": setup.dist.world_size,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "command": " ".join(sys.argv),
    }


def table(results: dict[str, Any]) -> str:
    """What was measured, in lines to read."""
    about, peaks = results["about"], results["peaks"]
    lines = [
        f"{about['arch']} ({about['weights']} weights; text encoders: {about['text_encoders']})",
        f"{about['device']}; {about['ranks']} rank(s) of {about['threads']} thread(s), "
        f"load {about['load_average']:.1f}; torch {about['torch']}",
        f"measured peaks: {peaks['matmul_tflops']:.3g} TFLOP/s in a matrix product, "
        f"{peaks['copy_gb_per_second']:.3g} GB/s in a copy",
    ]
    for name in ("ours", "baseline"):
        if name in results:
            lines += ["", *_way_lines(name, results[name])]
    if "speedup" in results:
        ratio = results["speedup"]
        lines += [
            "",
            f"ours is {ratio['median']:.2f} times as fast as the baseline (median of "
            f"{len(ratio['all'])}; {ratio['min']:.2f} to {ratio['max']:.2f})",
        ]
    return "\n".join(lines)


def _way_lines(name: str, way: dict[str, Any]) -> list[str]:
    seconds, images, pairs = (
        way[key] for key in ("epoch_seconds", "images_per_second", "pairs_per_second")
    )
    total = sum(phase["seconds"] for phase in way["phases"].values())
    lines = [
        f"{name}: {seconds['median']:.3g} s an epoch ({seconds['min']:.3g} to "
        f"{seconds['max']:.3g}), {images['median']:.3g} images/s, {pairs['median']:.3g} trained "
        f"pairs/s, {way['flops_per_epoch']:.3g} FLOP by formula, MFU {way['mfu']:.0%}, peak memory "
        f"{way['peak_memory_gb']:.2f} GB",
        f"  {'phase':<18}{'s':>9}{'share':>7}{'calls':>7}{'rows':>8}{'TFLOP/s':>9}",
    ]
    for phase, row in way["phases"].items():
        speed = row["flops"] / row["seconds"] / 1e12 if row["seconds"] else 0.0
        lines.append(
            f"  {phase:<18}{row['seconds']:9.3f}{row['seconds'] / total:7.0%}{row['calls']:7d}"
            f"{row['rows']:8d}{speed:9.3f}  {row['sentence']}"
        )
    return lines


def benchmark(args: argparse.Namespace, dist: Distributed, save_dir: str) -> dict[str, Any]:
    """Builds, measures, and adds what ran where."""
    setup = Setup.of(make_config(args, save_dir), dist, args.arch)
    return {"about": describe(setup)} | measure(setup, args.repeats, args.baseline)


def main() -> None:
    """Prints the table and the JSON on the first rank."""
    args = parse_flags()
    with distributed(timeout_minutes=10) as dist, tempfile.TemporaryDirectory() as folder:
        if args.output and dist.is_main:
            prepare_folder(args.output.parent)
        results = benchmark(args, dist, folder)
        text = json.dumps(results, indent=2)
        dist.print_once(f"{text}\n\n{table(results)}")
        if args.output and dist.is_main:
            write_atomically(args.output, f"{text}\n".encode())


if __name__ == "__main__":
    command(main)
