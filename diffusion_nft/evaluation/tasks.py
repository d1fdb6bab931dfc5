"""Test sets of a suite selected by flags, and their rewards."""

import argparse
from pathlib import Path

from diffusion_nft.data.prompts import evaluated_lines
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.evaluation.evaluate import Task, choose_rewards
from diffusion_nft.evaluation.options import EvalOptions, named_rewards
from diffusion_nft.evaluation.results import finished
from diffusion_nft.evaluation.suites import Suite


def suite_tasks(
    suite: Suite, args: argparse.Namespace, options: EvalOptions, model_dir: Path
) -> list[Task]:
    """The test sets to evaluate.  Raises ValueError with the names of all missing ones."""
    chosen = args.datasets.split(",") if args.datasets else suite.datasets
    if unknown := [name for name in chosen if name not in suite.datasets]:
        raise ValueError(f"--datasets {unknown[0]!r}: choose from {', '.join(suite.datasets)}")
    skipped = set(filter(None, args.skip_rewards.split(",")))
    tasks: list[Task] = []
    problems: list[str] = []
    unused = skipped | named_rewards(args)
    for name in chosen:
        weights = choose_rewards(name, "", "", options.run)
        unused -= weights.keys()
        weights = {reward: w for reward, w in weights.items() if reward not in skipped}
        if not weights:
            continue
        try:
            prompts, lines = evaluated_lines(name, args.limit)
        except ValueError as error:
            problems.append(str(error))
            continue
        options.check_test_prompts(weights, prompts, lines)
        tasks.append(Task(name, prompts, lines, weights, model_dir / name))
    if problems:
        raise ValueError("\n  ".join(["test sets are missing:", *problems]))
    if not tasks:
        raise ValueError(f"--skip_rewards leaves no reward in {', '.join(chosen)}")
    if unused:
        raise ValueError(f"{', '.join(sorted(unused))}: no such reward in {', '.join(chosen)}")
    return tasks


def try_rewards(tasks: list[Task], options: EvalOptions, dist: Distributed) -> bool:
    """Builds each reward that is still needed on the first rank, to fail before any sampling.

    Returns False on all ranks if none is needed.  Raises OSError, ImportError or ValueError if a
    reward cannot be built.
    """
    needed: set[str] = set()
    for task in tasks:
        done = finished(task.folder)
        needed |= task.weights.keys() - (done["settings"].get("rewards", {}) if done else {})
    # From one rank, as a network file system may show different states to others.
    needed = dist.broadcast_object(needed)
    if dist.is_main:
        for name in sorted(needed):
            options.rewards({name: 1.0}, dist)
    dist.barrier()
    return bool(needed)
