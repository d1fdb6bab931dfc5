"""Runs the project's own commands in processes of their own, as a user would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 240


def environment() -> dict[str, str]:
    """Offline, one thread a process, no terminal control codes."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return os.environ | settings


def torchrun(nproc: int, script: str, *flags: str) -> list[str]:
    """The command line that starts ``script`` on ``nproc`` processes on a free port."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={nproc}",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
        str(ROOT / script),
        *flags,
    ]


def train_command(save_dir: Path, *overrides: str, nproc: int = 1) -> list[str]:
    """Training of the smoke preset into ``save_dir`` with ``key=value`` overrides."""
    flags = [f"--config={ROOT}/config/nft.py:shapes_smoke", f"--config.save_dir={save_dir}"]
    flags += [f"--config.{override}" for override in overrides]
    script = "scripts/train_nft_sd3.py"
    if nproc == 1:
        return [sys.executable, str(ROOT / script), *flags]
    return torchrun(nproc, script, *flags)


def run(command: list[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs ``command`` to its end; its output is captured."""
    return subprocess.run(
        command,
        cwd=cwd or ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def train(save_dir: Path, *overrides: str, nproc: int = 1) -> subprocess.CompletedProcess[str]:
    """Trains to the end and insists on success."""
    done = run(train_command(save_dir, *overrides, nproc=nproc))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done
