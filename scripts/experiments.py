"""Runs experiments of config/experiments.py: the training script for every variant and seed.

    python scripts/experiments.py --list
    python scripts/experiments.py negatives solvers --jobs 2
    python scripts/experiments.py fast --seeds 42 43 --variants faithful 9-sigmas --jobs 2

Each run is a process; its directory and log are in --runs, its results in
--results/EXPERIMENT/VARIANT-seedSEED.jsonl.  Rerunning the command continues after a stop; finished
runs are not repeated, even if another experiment has run them.  Ends with an error if a variant has
changed since its results.  scripts/experiments_plot.py makes tables and figures of the results.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from diffusion_nft.command_line import command, positive, script_parser, user_path
from diffusion_nft.distributed.preemption import requested, stop_on_signals
from diffusion_nft.experiments.grid import ROOT, is_done, plan
from diffusion_nft.experiments.results import model_shape
from diffusion_nft.experiments.runner import run_all
from diffusion_nft.utils.paths import prepare_folder
from diffusion_nft.validation.config_files import load_file


def parse_flags(experiments: dict[str, Any]) -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="experiments in config/experiments.py")
    add("--seeds", type=int, nargs="+", help="default: those of the experiment")
    add("--variants", nargs="+", help="variants of a single experiment; default: all")
    add("--jobs", type=positive, default=1, help="simultaneous runs, which share the cores")
    add("--results", type=user_path, default=Path("docs/results"))
    add("--runs", type=user_path, default=Path("logs", "experiments"))
    add("--list", action="store_true", help="show the experiments and finished runs")
    args = parser.parse_args()
    if not args.names and not args.list:
        parser.error("name an experiment, or give --list")
    if unknown := [name for name in args.names if name not in experiments]:
        parser.error(f"invalid choice: {unknown[0]!r} (choose from {', '.join(experiments)})")
    if args.variants and len(args.names) != 1:
        parser.error("--variants needs exactly one experiment")
    if args.variants:
        variants = experiments[args.names[0]].variants
        if unknown := [variant for variant in args.variants if variant not in variants]:
            parser.error(f"--variants {unknown[0]}: choose from {', '.join(variants)}")
    return args


def show(experiments: dict[str, Any], args: argparse.Namespace) -> None:
    """Prints the named experiments, default all, with their variants and finished seeds."""
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
        sys.exit(f"{len(failed)} failed (rerun the same command to retry):\n  {names}")
    if stopped:
        sys.exit("stopped; rerun the same command to continue")


if __name__ == "__main__":
    command(main)
