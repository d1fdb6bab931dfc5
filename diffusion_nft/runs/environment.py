"""The environment of a run: versions, device, git revision, command."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffusion_nft.utils.files import append_line

ENVIRONMENTS_FILE = "environments.jsonl"
RECORDED_PACKAGES = (
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "pillow",
    # of rewards
    "open_clip_torch",
    "opencv-python-headless",
    "rapidocr",
    "onnxruntime",
    "openai",
)


def _git(*arguments: str) -> str | None:
    """Output of a git command in this package's folder, or None without git or a repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment() -> dict[str, Any]:
    status = _git("status", "--porcelain", "--untracked-files=no")
    cuda = torch.cuda.is_available()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{package: _version(package) for package in RECORDED_PACKAGES},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "git_revision": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "command": shlex.join(sys.argv),
    }


def write_environment(run_dir: Path) -> None:
    """Appends ``environment()`` to ``environments.jsonl``, one line per start of the run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    append_line(run_dir / ENVIRONMENTS_FILE, json.dumps(environment()))
