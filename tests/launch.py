"""Runs of the smoke preset: by the project's own commands in processes of their own, as a user
would, or in this process, which saves the seconds that importing takes.
"""

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 280
# Overrides of the smoke preset for a run of which little is asked: three epochs of one update.
TINY: dict[str, Any] = {
    "num_epochs": 3,
    "sample.num_groups": 2,
    "sample.num_image_per_prompt": 2,
    "sample.num_steps": 2,
    "train.gradient_step_per_epoch": 1,
    "eval.at_start": False,
    "eval_freq": 0,
    "eval.num_prompts": 2,
    "eval.num_steps": 2,
}


# Ends of the names of SD3's layers with LoRA, as in the published code.
LORA_TARGETS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)


def environment() -> dict[str, str]:
    """Offline, one thread a process."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


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


def train_command(
    save_dir: Path, *overrides: str, nproc: int = 1, preset: str = "shapes_smoke"
) -> list[str]:
    """Training of ``preset`` into ``save_dir`` with ``key=value`` overrides."""
    flags = [f"--config={ROOT}/config/nft.py:{preset}", f"--config.save_dir={save_dir}"]
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


def insist(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    """``done``, if it succeeded."""
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def train(save_dir: Path, *overrides: str, nproc: int = 1) -> subprocess.CompletedProcess[str]:
    """Trains to the end with the real command and insists on success."""
    return insist(run(train_command(save_dir, *overrides, nproc=nproc)))


def smoke(save_dir: Path, overrides: dict[str, Any] | None = None) -> ConfigDict:
    """The smoke preset with dotted ``overrides``, without images."""
    import nft

    config = nft.shapes_smoke()
    config.save_dir = str(save_dir)
    config.log.num_images = 0
    config.update_from_flattened_dict(overrides or {})
    return config


def build_shapes_model(precision: str = "no", **options: Any) -> Any:
    """The built-in model on the CPU, without LoRA."""
    from diffusion_nft.distributed.ranks import Distributed
    from diffusion_nft.models import build_model
    from diffusion_nft.models.precision import Precision
    from diffusion_nft.shapes.model import PIPELINE_DIR

    device = torch.device("cpu")
    return build_model(
        "sd3",
        folder=PIPELINE_DIR,
        name="shapes",
        max_sequence_length=8,
        dist=Distributed(0, 1, 0, device),
        precision=Precision(precision, device),
        **options,
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread in torch's kernels: the sums of a process of its own, to the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_trainer(config: ConfigDict, dist: Any, stage: Any = None) -> Any:
    """The trainer of ``stage`` (by default the first), from wherever the run directory stands."""
    from diffusion_nft.build import build_trainer
    from diffusion_nft.runs.run_dir import check_run_dir
    from diffusion_nft.runs.state import newest_checkpoint
    from diffusion_nft.validation.stages import stages_of

    check_run_dir(config)
    stage = stage or stages_of(config)[0]
    return build_trainer(config, dist, stage, newest_checkpoint(config, dist))


def train_here(save_dir: Path, overrides: dict[str, Any] | None = None) -> Any:
    """Trains in this process, to the end; returns the trainer."""
    from diffusion_nft.distributed.ranks import Distributed

    with one_thread():
        trainer = make_trainer(
            smoke(save_dir, overrides), Distributed(0, 1, 0, torch.device("cpu"))
        )
        trainer.run()
    return trainer


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def on_ranks(nproc: int, work: Callable[[], object]) -> None:
    """Calls ``work`` in ``nproc`` forks of this process, with torchrun's environment variables;
    insists that all succeed.  This process must not have used a GPU.
    """
    ranks = {"WORLD_SIZE": str(nproc), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    children = []
    for rank in range(nproc):
        child = os.fork()
        if not child:
            os.environ |= ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            try:
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * nproc


def train_on_ranks(jobs: list[tuple[int, Path, dict[str, Any]]]) -> None:
    """Trains the ``jobs`` (processes, save_dir, overrides) one after the other.

    A process of their own imports the libraries once and forks the ranks of each.
    """
    text = json.dumps([(nproc, str(save_dir), overrides) for nproc, save_dir, overrides in jobs])
    insist(run([sys.executable, str(ROOT / "tests/launch.py"), text]))


def _train_jobs(text: str) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "config")]
    from diffusion_nft.distributed.ranks import distributed

    for nproc, save_dir, overrides in json.loads(text):

        def train_rank(save_dir: str = save_dir, overrides: dict[str, Any] = overrides) -> None:
            with distributed(timeout_minutes=3) as dist:
                make_trainer(smoke(Path(save_dir), overrides), dist).run()

        on_ranks(nproc, train_rank)


if __name__ == "__main__":
    _train_jobs(sys.argv[1])
