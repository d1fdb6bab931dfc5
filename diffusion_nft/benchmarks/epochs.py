"""Throughput, peak memory and phases of whole epochs, for scripts/benchmark.py."""

import os
import resource
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from tabulate import tabulate

from diffusion_nft.benchmarks.baseline import Published
from diffusion_nft.benchmarks.models import ARCHITECTURES, Product, Setup
from diffusion_nft.benchmarks.phases import Observer, Peaks, synchronize, with_rooflines
from diffusion_nft.runs.environment import cpu_name, environment
from diffusion_nft.validation.config_files import load_file
from diffusion_nft.validation.schema import SCHEMA, expand_paths, unknown_key, validate

CONFIG_FILE = Path(__file__).resolve().parents[2] / "config" / "nft.py"
PRESETS = {"shapes": "shapes", "sd3.5-tiny": "shapes_smoke"}
DEFAULT_PRESET = "sd3_geneval"
# Reward of ARCHITECTURES; needs no weights.
SYNTHETIC_REWARD = "jpeg_compressibility"


def make_config(
    arch: str,
    save_dir: str,
    *,
    preset: str | None = None,
    rewards: str | None = None,
    changes: Iterable[tuple[str, Any]] = (),
) -> ConfigDict:
    """The preset (default: that of ``arch``) with comma-separated ``rewards`` and ``changes`` of
    dotted keys.  Raises ValueError for an invalid configuration.
    """
    config = load_file(CONFIG_FILE).get_config(preset or PRESETS.get(arch, DEFAULT_PRESET))
    config.save_dir = save_dir
    config.stages = ()
    if arch in ARCHITECTURES:
        rewards = rewards or SYNTHETIC_REWARD
        config.dataset = "shapes"  # must exist; its prompts are not used
        config.pretrained.model = f"random/{arch}"
    if rewards:
        config.reward_fn = ConfigDict(dict.fromkeys(rewards.split(","), 1.0))
    for key, value in changes:
        if key not in SCHEMA:
            raise ValueError(f"--set {key} {unknown_key(key)}")
        config.update_from_flattened_dict({key: value})
    validate(config)
    expand_paths(config)
    if config.algorithm != "nft":
        raise ValueError(f"algorithm {config.algorithm!r}: the benchmark supports 'nft' only")
    return config


def timed_epoch(way: Any, epoch: int) -> dict[str, float]:
    """Runs an epoch of ``Product`` or ``Published``; returns the seconds of its parts and in total,
    synchronised over ranks.
    """
    dist, times = way.setup.dist, []

    def note_time() -> None:
        synchronize(dist.device)
        dist.barrier()
        times.append(time.perf_counter())

    note_time()
    samples, r = way.sample(epoch)
    note_time()
    way.train(samples, r, epoch)
    note_time()
    start, sampled, end = times
    return {"sampling": sampled - start, "training": end - sampled, "epoch": end - start}


def memory_gb(device: torch.device, *, peak: bool) -> float:
    """GB of tensors on a GPU, now or at the peak since the last reset.  On CPUs, the peak of the
    process since its start, or 0 for now.
    """
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9 if peak else 0.0


def spread(values: list[float]) -> dict[str, Any]:
    about = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return about | {"all": values}


def measure(setup: Setup, repeats: int, baseline: bool) -> dict[str, Any]:
    """All measurements, ready for JSON; rates are over all ranks, FLOPs on this rank."""
    device = setup.dist.device
    ways: list[Any] = []
    kept_gb: dict[str, float] = {}
    for build in (Product, Published)[: 1 + baseline]:
        before = memory_gb(device, peak=False)
        ways.append(build(setup))
        kept_gb[ways[-1].name] = memory_gb(device, peak=False) - before
    seconds: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    peaks_gb: dict[str, float] = {}
    for epoch in range(repeats + 1):
        for way in ways:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = timed_epoch(way, epoch)
            others = sum(kept_gb.values()) - kept_gb[way.name]
            peaks_gb[way.name] = memory_gb(device, peak=True) - others
            if epoch > 0:  # the first is a warm-up
                seconds[way.name].append(took)
    precision = ways[0].model.precision
    dtypes = {"others": precision.compute_dtype, "decode": precision.trained_dtype}
    measured = {dtype: Peaks.measure(device, dtype) for dtype in set(dtypes.values())}
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
            timed_epoch(way, repeats + 1)
        if isinstance(way, Product):
            observer.timed("checkpoint", way.state.save)()
        results[way.name] = _summary(setup, observer, seconds[way.name], peaks)
        results[way.name]["peak_memory_gb"] = peaks_gb[way.name]
    if baseline:
        pairs = zip(seconds["baseline"], seconds["ours"], strict=True)
        results["speedup"] = spread([theirs["epoch"] / ours["epoch"] for theirs, ours in pairs])
    return results


def _summary(
    setup: Setup, observer: Observer, seconds: list[dict[str, float]], peaks: dict[str, Peaks]
) -> dict[str, Any]:
    phases = observer.phases
    # The number of samples of ranks may differ by one.
    pairs = sum(setup.dist.gather_objects(phases["backward"].rows))
    flops = sum(phase.flops for phase in phases.values())
    by_part = {part: spread([times[part] for times in seconds]) for part in seconds[0]}
    epochs = by_part["epoch"]
    return {
        "seconds": by_part,
        "images_per_second": spread([setup.num_samples / s for s in epochs["all"]]),
        "pairs_per_second": spread([pairs / s for s in epochs["all"]]),
        "pairs_per_epoch": pairs,
        "flops_per_epoch": flops,
        "mfu": flops / epochs["median"] / peaks["others"].flops,
        "phases": with_rooflines(phases, peaks),
    }


def describe(setup: Setup) -> dict[str, Any]:
    """Sizes, versions and hardware of the benchmark."""
    config, random = setup.config, setup.arch in ARCHITECTURES
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
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        **environment(),
    }


def table(results: dict[str, Any]) -> str:
    """The results of ``measure`` and ``describe`` ("about") as text."""
    about, peaks = results["about"], results["peaks"]
    device = about["cpu"] if about["device"] == "cpu" else about["device"]
    parts = [
        f"{about['arch']} ({about['weights']} weights; text encoders: {about['text_encoders']})\n"
        f"{device}; {about['world_size']} rank(s) of {about['threads']} thread(s), "
        f"load {about['load_average']:.1f}; torch {about['torch']}\n"
        f"measured peaks: {peaks['matmul_tflops']:.3g} TFLOP/s in a matrix product, "
        f"{peaks['copy_gb_per_second']:.3g} GB/s in a copy"
    ]
    parts += [_way_table(name, results[name]) for name in ("ours", "baseline") if name in results]
    if ratio := results.get("speedup"):
        parts.append(
            f"ours is {ratio['median']:.2f} times as fast as the baseline (median of "
            f"{len(ratio['all'])}; {ratio['min']:.2f} to {ratio['max']:.2f})"
        )
    return "\n\n".join(parts)


def _way_table(name: str, way: dict[str, Any]) -> str:
    seconds = way["seconds"]["epoch"]
    images, pairs = way["images_per_second"], way["pairs_per_second"]
    total = sum(phase["seconds"] for phase in way["phases"].values())
    rows = [
        {
            "phase": phase,
            "s": row["seconds"],
            "share": row["seconds"] / total,
            "calls": row["calls"],
            "rows": row["rows"],
            "TFLOP/s": row["flops"] / row["seconds"] / 1e12 if row["seconds"] else 0.0,
            "": row["sentence"],
        }
        for phase, row in way["phases"].items()
    ]
    return (
        f"{name}: {seconds['median']:.3g} s per epoch ({seconds['min']:.3g} to "
        f"{seconds['max']:.3g}), {images['median']:.3g} images/s, {pairs['median']:.3g} trained "
        f"pairs/s, {way['flops_per_epoch']:.3g} FLOP by formula, MFU {way['mfu']:.0%}, peak memory "
        f"{way['peak_memory_gb']:.2f} GB\n"
        + tabulate(
            rows, headers="keys", tablefmt="plain", floatfmt=("", ".3f", ".0%", "", "", ".3f")
        )
    )
