"""Is every reward installed, are its weights there, does it load, does it score?

    python scripts/check_rewards.py
    python scripts/check_rewards.py --reward geneval,ocr --device cuda
    python scripts/check_rewards.py --config config/nft.py:sd3_multi_reward

Builds each reward as training does and lets it score two drawn images, twice.  Prints a table of
the checks, the time per image of the second call and the memory that the loaded reward takes, and
for each failure the command that fixes it.  With --config, the rewards of that preset, of all of
its stages, with its options and servers.  Exits with 1 if anything failed.
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
    """The number of STAGES that a reward passed, and why the next one failed."""

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
    """Builds the reward ``name`` and lets it score; never raises."""
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
    # Whatever a broken installation raises is what this command is there to show.
    except Exception as error:
        if not finding.passed:
            finding.passed = 0 if isinstance(error, ImportError) else 1
            finding.passed += not isinstance(error, (ImportError, OSError))
        finding.problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        finding.remedy = remedy(name, error, addresses)
    gc.collect()
    return finding


def memory(device: torch.device) -> float:
    """GB in use: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    return psutil.Process().memory_info().rss / 1e9


def wanted(args: argparse.Namespace) -> tuple[list[str], Mapping[str, Any], Mapping[str, Any]]:
    """Names, options and addresses of the rewards to check."""
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
    which.add_argument(
        "--config", type=path_or_name, help="path:preset, for the rewards of a preset"
    )
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=usual)
    args = parser.parse_args()
    names, options, servers = wanted(args)
    set_tf32(True)  # as in runs, unless they have allow_tf32 = False
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
