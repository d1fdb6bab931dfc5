"""Checks that each reward is installed, has its weights, loads and scores images.

    python scripts/check_rewards.py
    python scripts/check_rewards.py --reward geneval,ocr --device cuda
    python scripts/check_rewards.py --config config/nft.py:sd3_multi_reward

Builds each reward as in training and scores two test images, twice.  Prints a table of the checks
with the time per image of the second call and the memory of the loaded reward, and for each failure
the command that fixes it.  --config checks the rewards of all stages of that preset, with their
options and servers.  Exits with 1 if a check failed.
"""

import argparse
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from tabulate import tabulate

from diffusion_nft.command_line import command, device, path_or_name, script_parser
from diffusion_nft.models.precision import set_tf32
from diffusion_nft.rewards import REWARDS, build_reward
from diffusion_nft.rewards.combine import RewardSet
from diffusion_nft.rewards.trial import remedy, trial_images
from diffusion_nft.validation.config_files import load_file
from diffusion_nft.validation.inputs import reward_weights
from diffusion_nft.validation.stages import merged_configs

STAGES = ("installed", "found", "loads", "scores")


@dataclass
class Finding:
    """Outcome of a check: the number of STAGES passed, and the problem of the next one."""

    name: str
    passed: int = 0
    results: tuple[str, ...] = ()  # seconds per image, GB, scores
    problem: str = ""
    remedy: str = ""

    def row(self) -> tuple[str, ...]:
        marks = ["yes"] * self.passed + ["NO"] + [""] * len(STAGES)
        return (self.name, *marks[: len(STAGES)], *self.results)


def check(
    name: str, device: torch.device, options: Mapping[str, Any], addresses: Sequence[str]
) -> Finding:
    """Builds the reward ``name`` and scores the trial images; failures are in the result."""
    finding = Finding(name)
    before = memory(device)
    try:
        rewards = {name: build_reward(name, device, options, addresses)}
        finding.passed = STAGES.index("scores")
        images, prompts, metadata = trial_images(name)
        score = RewardSet({name: 1.0}, rewards)
        seconds, scores = 0.0, []
        for _ in range(2):
            started = time.perf_counter()
            scores = score(images.to(device), prompts, metadata).total.tolist()
            seconds = (time.perf_counter() - started) / len(prompts)
        finding.passed = len(STAGES)
        numbers = " ".join(f"{score:.3f}" for score in scores)
        finding.results = (f"{seconds:.3f}", f"{memory(device) - before:.2f}", numbers)
    # A broken installation may raise anything.
    except Exception as error:
        if not finding.passed:
            finding.passed = 0 if isinstance(error, ImportError) else 1
            finding.passed += not isinstance(error, (ImportError, OSError))
        finding.problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        finding.remedy = remedy(name, error, addresses)
    gc.collect()
    return finding


def memory(device: torch.device) -> float:
    """GB allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def selected(args: argparse.Namespace) -> tuple[list[str], Mapping[str, Any], Mapping[str, Any]]:
    """Names of the rewards to check, and options and server addresses by name."""
    if not args.config:
        names = args.reward.split(",") if args.reward else list(REWARDS)
        if unknown := [name for name in names if name not in REWARDS]:
            raise ValueError(f"reward {unknown[0]!r} is unknown; choose from {', '.join(REWARDS)}")
        return names, {}, {}
    path, _, preset = args.config.partition(":")
    config = load_file(path).get_config(preset)
    stages = merged_configs(config)
    names = dict.fromkeys(name for stage in stages for name in reward_weights(stage)[1])
    return list(names), config.reward_options.to_dict(), config.reward_servers.to_dict()


def main() -> int:
    parser = script_parser(__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--reward", default="", help="comma-separated; default: all")
    which.add_argument("--config", type=path_or_name, help="path:preset, for its rewards")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=usual)
    args = parser.parse_args()
    names, options, servers = selected(args)
    set_tf32(True)  # the default of allow_tf32 in runs
    findings = []
    for name in names:
        print(f"checking {name} ...", file=sys.stderr, flush=True)
        findings.append(check(name, args.device, options.get(name, {}), servers.get(name, ())))
    header = ("reward", *STAGES, "s/image", "GB", "scores of the two images")
    rows = [finding.row() for finding in findings]
    print(tabulate(rows, header, tablefmt="plain", disable_numparse=True))
    failed = [finding for finding in findings if finding.problem]
    for finding in failed:
        print(f"\n{finding.name}: {finding.problem}")
        if finding.remedy:
            print(f"    {finding.remedy}")
    return 1 if failed else 0


if __name__ == "__main__":
    command(main)
