"""Runs experiments of config/experiments.py: every variant with every seed, by the training script.

    python scripts/experiments.py --list
    python scripts/experiments.py negatives solvers --jobs 2
    python scripts/experiments.py fast --seeds 42 43 --variants faithful 9-sigmas --jobs 2

A run is a process of its own; its directory and log lie in --runs, its numbers in
--results/EXPERIMENT/VARIANT-seedSEED.jsonl.  The same command goes on where it was stopped.  What
has finished is not run again, in another experiment neither if the variant is the same there;
results of a variant that has changed since are refused.  scripts/experiments_plot.py draws them.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_nft.command_line import command, positive, user_path
from diffusion_nft.distributed.preemption import requested, stop_on_signals
from diffusion_nft.experiments.grid import ROOT, PlannedRun, is_done, plan
from diffusion_nft.experiments.results import (
    THREADS,
    Incomplete,
    model_shape,
    same_elsewhere,
    take_over,
    threads,
    write_result,
)
from diffusion_nft.utils.paths import prepare_folder
from diffusion_nft.validation.config_files import load_file

POLL_SECONDS = 0.2
SHOWN_METRICS = ("eval/total", "eval/shapes/strict")


def parse_flags(experiments: dict[str, Any]) -> argparse.Namespace:
    """The command line; wrong names end the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="of config/experiments.py, one after another")
    add("--seeds", type=int, nargs="+", help="default: the experiment's")
    add("--variants", nargs="+", help="of one experiment; default: all")
    add("--jobs", type=positive, default=1, help="runs at once; they share the cores")
    add("--results", type=user_path, default=Path("docs/results"))
    add("--runs", type=user_path, default=Path("logs", "experiments"))
    add("--list", action="store_true", help="show the experiments and which runs are finished")
    args = parser.parse_args()
    if not args.names and not args.list:
        parser.error("name an experiment, or give --list")
    if unknown := [name for name in args.names if name not in experiments]:
        parser.error(f"invalid choice: {unknown[0]!r} (choose from {', '.join(experiments)})")
    if args.variants and len(args.names) != 1:
        parser.error("--variants are those of one experiment: name it alone")
    if args.variants:
        variants = experiments[args.names[0]].variants
        if unknown := [variant for variant in args.variants if variant not in variants]:
            parser.error(f"--variants {unknown[0]}: choose from {', '.join(variants)}")
    return args


def start(run: PlannedRun, jobs: int) -> subprocess.Popen[bytes]:
    """The training script on ``run``; what it prints is added to its log."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *run.command()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {THREADS: threads(jobs)},
        )


def finish(run: PlannedRun, code: int, jobs: int) -> tuple[str, bool]:
    """What became of a run that ended with ``code``, and whether it failed."""
    try:
        if code:
            raise Incomplete(f"exit status {code}: {_last_line(run.log)}")
        last = write_result(run, jobs)
    except ValueError as error:
        if requested():
            return "stopped", False
        return f"FAILED, {error}; log: {run.log}", True
    shown = ", ".join(f"{key} {last[key]:.3f}" for key in SHOWN_METRICS if key in last)
    return f"ended at epoch {last['epoch']}: {shown}", False


def _last_line(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    # A progress bar ends its lines with a carriage return.
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def taken_over(run: PlannedRun) -> bool:
    """Whether another variant or experiment has run the same; its result is that of ``run``."""
    source = same_elsewhere(run)
    if source:
        take_over(run, source)
        print(f"{run.title}: the run of {source}")
    return source is not None


def run_all(todo: list[PlannedRun], jobs: int) -> list[PlannedRun]:
    """Works off ``todo``, ``jobs`` at once, until all ended or a stop is asked for; says when a run
    starts and ends.  Returns those that failed.
    """
    waiting, failed = deque(todo), []
    running: list[tuple[PlannedRun, subprocess.Popen[bytes], float]] = []
    try:
        while running or (waiting and not requested()):
            while waiting and len(running) < jobs and not requested():
                run = waiting.popleft()
                if taken_over(run):
                    continue
                running.append((run, start(run, jobs), time.monotonic()))
                print(f"{run.title}: started, log: {run.log}", flush=True)
            time.sleep(POLL_SECONDS)
            if requested():
                _end(process for _, process, _ in running)
            for entry in [entry for entry in running if entry[1].poll() is not None]:
                run, process, began = entry
                running.remove(entry)
                text, is_failed = finish(run, process.returncode, jobs)
                seconds = time.monotonic() - began
                print(f"{run.title}: {text} ({seconds:.0f} s)", flush=True)
                failed += [run] if is_failed else []
    finally:
        _end(process for _, process, _ in running)
    return failed


def _end(processes: Iterator[subprocess.Popen[bytes]]) -> None:
    """Asks them to save and end, and waits until they have."""
    asked = list(processes)
    for process in asked:
        process.terminate()
    for process in asked:
        process.wait()


def show(experiments: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints the experiments, or those named, with their variants and finished seeds."""
    for name in args.names or experiments:
        experiment = experiments[name]
        print(f"{name}: {experiment.question} (seeds {', '.join(map(str, experiment.seeds))})")
        for variant, chosen in experiment.variants.items():
            found = args.results.joinpath(name).glob(f"{variant}-seed*.jsonl")
            seeds = sorted(int(path.stem.rpartition("seed")[2]) for path in found)
            finished = f"finished: {', '.join(map(str, seeds))}" if seeds else "not run yet"
            changes = " ".join(f"{key}={value}" for key, value in chosen.changes.items())
            print(f"  {variant}: {chosen.preset} {changes}".rstrip() + f"; {finished}")


def main() -> None:
    """Plans, refuses what has changed, runs the rest."""
    experiments = load_file(ROOT / "config" / "experiments.py").EXPERIMENTS
    args = parse_flags(experiments)
    if args.list:
        return show(experiments, args)
    runs = [
        run for name in dict.fromkeys(args.names) for run in plan(name, experiments[name], args)
    ]
    for run in runs:
        model_shape(run.config)
    todo = [run for run in runs if not is_done(run)]
    if todo:
        prepare_folder(args.results)
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before")
    with stop_on_signals():
        failed = run_all(todo, args.jobs)
        stopped = requested()
    if failed:
        names = "\n  ".join(f"{run.title}: {run.log}" for run in failed)
        sys.exit(f"{len(failed)} failed (the same command tries again):\n  {names}")
    if stopped:
        sys.exit("stopped; the same command continues")


if __name__ == "__main__":
    command(main)
