"""Is every reward installed, are its weights there, does it load, does it score?

    python scripts/check_rewards.py
    python scripts/check_rewards.py --reward geneval,ocr --device cuda
    python scripts/check_rewards.py --config config/nft.py:sd3_multi_reward

Builds each reward as training does and lets it score two drawn images, twice.  Prints a table of
what holds, the time per image of the second call and the memory that the loaded reward takes, and
for each failure the command that mends it.  With --config, the rewards of that preset, of all of
its stages, with its options and servers.  Exits with 1 if anything failed.
"""

import argparse
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch
from PIL import Image, ImageDraw, ImageFont
from tabulate import tabulate

from diffusion_nft.command_line import command, device, path_or_name
from diffusion_nft.images import Images
from diffusion_nft.models.precision import set_tf32
from diffusion_nft.rewards import REWARDS, build_reward
from diffusion_nft.rewards.combine import RewardSet
from diffusion_nft.rewards.unifiedreward import START_COMMAND
from diffusion_nft.rewards.weights import WEIGHT_FILES, weights_root
from diffusion_nft.validation.config_files import load_file
from diffusion_nft.validation.inputs import reward_weights
from diffusion_nft.validation.stages import merged_configs

SIDE = 512
PROMPTS = ['a white poster that says "HELLO"', 'a white poster that says "WORLD"']
# The extra that installs a reward's packages, where it is not called as the reward.
EXTRAS = {"pickscore": "", "clipscore": "", "aesthetic": "", "imagereward": ""}
STAGES = ("installed", "found", "loads", "scores")


@dataclass
class Finding:
    """What holds of a reward: as many of STAGES as it passed, or why the next one failed."""

    name: str
    passed: int = 0
    seconds: float = 0.0
    gigabytes: float = 0.0
    problem: str = ""
    remedy: str = ""
    scores: list[float] = field(default_factory=list)

    def row(self) -> tuple[str, ...]:
        """Its line of the table."""
        marks = ["yes"] * self.passed + ["NO"] + [""] * len(STAGES)
        done = self.passed == len(STAGES)
        cost = (f"{self.seconds:.3f}", f"{self.gigabytes:.2f}") if done else ("", "")
        return (
            self.name,
            *marks[: len(STAGES)],
            *cost,
            " ".join(f"{score:.3f}" for score in self.scores),
        )


def example_batch(name: str) -> tuple[Images, list[str], list[dict]]:
    """Two images with prompts and metadata that ``name`` can score."""
    if name == "shapes":
        from diffusion_nft.shapes.captions import metadata_lines, sample_scene
        from diffusion_nft.shapes.scene import render_batch

        lines = metadata_lines("test")[:2]
        rng = np.random.default_rng(0)
        drawn = torch.from_numpy(render_batch([sample_scene(line, rng) for line in lines]))
        return Images.from_float(drawn), [line["prompt"] for line in lines], lines
    arrays = []
    for word in ("HELLO", "WORLD"):
        poster = Image.new("RGB", (SIDE, SIDE), "white")
        font = ImageFont.load_default(size=96)
        ImageDraw.Draw(poster).text((SIDE / 2, SIDE / 2), word, "black", font, anchor="mm")
        arrays.append(np.asarray(poster, dtype=np.float32) / 255)
    include = [{"class": "bench", "count": 1}]
    metadata = [{"tag": "single_object", "include": include, "prompt": p} for p in PROMPTS]
    images = Images.from_float(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))
    return images, PROMPTS, metadata


def check(
    name: str, device: torch.device, options: Mapping[str, Any], addresses: Sequence[str]
) -> Finding:
    """Builds the reward ``name`` and lets it score; never raises."""
    finding = Finding(name)
    before = memory(device)
    try:
        rewards = {name: build_reward(name, device, options, addresses)}
        finding.passed = STAGES.index("scores")
        images, prompts, metadata = example_batch(name)
        images = images.to(device)
        score = RewardSet({name: 1.0}, rewards)
        for _ in range(2):
            started = time.perf_counter()
            finding.scores = score(images, prompts, metadata).total.tolist()
            finding.seconds = (time.perf_counter() - started) / len(prompts)
        finding.passed = len(STAGES)
        finding.gigabytes = memory(device) - before
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


def remedy(name: str, error: Exception, addresses: Sequence[str]) -> str:
    """The command that mends ``error``; empty where there is no single one."""
    if addresses:
        if not isinstance(error, ConnectionError):
            return ""
        return (
            f"python scripts/reward_server.py --reward {name} --port {urlsplit(addresses[0]).port}"
        )
    if isinstance(error, ImportError):
        extra = EXTRAS.get(name, name)
        return f'pip install -e ".[{extra}]"' if extra else "pip install -e ."
    if isinstance(error, ConnectionError) and name == "unifiedreward":
        return START_COMMAND
    if isinstance(error, ValueError) and name in WEIGHT_FILES:
        path = weights_root() / WEIGHT_FILES[name].file_name
        if str(path) in str(error):
            return f"rm {path} && python scripts/download.py {name}"
    return f"python scripts/download.py {name}" if isinstance(error, OSError) else ""


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
    """Checks one reward after the other; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
