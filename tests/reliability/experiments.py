"""Experiments that stop a run, rerun its command, and compare with an uninterrupted run."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from diffusion_nft.runs.checkpoint import Checkpointer
from tests.launch import ROOT, environment, torchrun, train_command
from tests.reliability.compare import differences
from tests.reliability.faults import PHASES, Strike, children

# Two epochs of two updates, with several calls of each phase.
SETTINGS = {
    "num_epochs": 2,
    "train.learning_rate": 0.0005,
    "train.batch_size": 4,
    "nft.kl_weight": 0.01,
    "eval.num_prompts": 4,
    "eval.at_start": False,
    "eval.num_steps": 2,
    "eval.batch_size": 2,
    "log.num_images": 1,
}
WRAPPER = "tests/reliability/faults.py"
TIMEOUT_S = 300
STOPPED = "the same command continues the run"
SAVING = re.compile(r"the state of epoch (\d+) is being saved")
# Allowed relative distance of weights on another number of processes.
FP64_WITHIN, FP32_WITHIN = 1e-9, 1e-3


@dataclass(frozen=True)
class Kind:
    """How a run of ``nproc`` processes is stopped and resumed."""

    name: str
    nproc: int
    whom: str = "self"
    signal: str = "SIGKILL"
    resume_nproc: int = 0  # 0: ``nproc``
    restarts: int = 0  # of torchrun
    fp64: bool = False
    by_clock: bool = False  # at a random time instead of in a phase

    @property
    def within(self) -> float:
        if self.resume_nproc in (0, self.nproc):
            return 0.0
        return FP64_WITHIN if self.fp64 else FP32_WITHIN


KINDS = (
    Kind("SIGKILL, the only process", 1),
    Kind("SIGKILL, one rank of 2", 2),
    Kind("SIGKILL, torchrun and its 2 ranks", 2, whom="all"),
    Kind("SIGKILL, torchrun and its 2 ranks, by the clock", 2, whom="all", by_clock=True),
    Kind("SIGKILL, one rank of 2, torchrun --max-restarts 1", 2, restarts=1),
    Kind("SIGKILL, 2 ranks, resumed on 3 (fp64)", 2, whom="all", resume_nproc=3, fp64=True),
    Kind("SIGKILL, 2 ranks, resumed on 1 (fp32)", 2, whom="all", resume_nproc=1),
    Kind("SIGTERM, the only process", 1, signal="SIGTERM"),
    Kind("SIGTERM, one rank of 2", 2, signal="SIGTERM"),
    Kind("SIGTERM, torchrun with 2 ranks", 2, whom="launcher", signal="SIGTERM"),
    Kind("SIGINT, torchrun with 2 ranks", 2, whom="launcher", signal="SIGINT"),
)


@dataclass(frozen=True)
class Result:
    """Outcome of an experiment; no ``problems`` if the run recovered."""

    kind: str
    strike: str
    exits: list[int]
    seconds: float
    problems: list[str]


def command(run_dir: Path, nproc: int, *, plan: str = "", fp64: bool = False, restarts: int = 0):
    """The training command, through the wrapper with a ``plan``."""
    settings = SETTINGS | {"mixed_precision": "fp64" if fp64 else "no"}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    plain = train_command(run_dir, *overrides, nproc=nproc)
    flags = plain[-1 - len(overrides) - 1 :]
    if not plan and not restarts:
        return plain
    script = [WRAPPER, plan] if plan else ["scripts/train_nft.py"]
    if nproc == 1:
        return [sys.executable, str(ROOT / script[0]), *script[1:], *flags]
    line = torchrun(nproc, *script, *flags)
    return [*line[:3], f"--max-restarts={restarts}", "--monitor-interval=0.1", *line[3:]]


def start(line: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts ``line`` with its output in ``log``."""
    env = environment() | {"PYTHONPATH": str(ROOT)}
    with log.open("ab") as file:
        return subprocess.Popen(line, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes]) -> int:
    """The exit code.  After a timeout, kills all processes and raises TimeoutExpired."""
    try:
        return process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise


def kill_all(process: subprocess.Popen[bytes]) -> int:
    """Kills a launcher and its children, as in a crash of the machine; returns its exit code."""
    ranks = children(process.pid)
    for pid in (process.pid, *ranks):
        os.kill(pid, signal.SIGKILL)
    return process.wait()


class Laboratory:
    """Experiments in ``folder``, with lazily created uninterrupted runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def reference(self, nproc: int, fp64: bool = False) -> Path:
        """An uninterrupted run; RUN.counts has its seconds and the calls of each phase by rank."""
        run_dir = self.folder / f"reference-{nproc}{'-fp64' if fp64 else ''}"
        counts = run_dir.with_suffix(".counts")
        if not (counts / "seconds.json").exists():
            plan = json.dumps({"counts": str(counts)})
            started = time.monotonic()
            log = run_dir.with_suffix(".log")
            code = finish(start(command(run_dir, nproc, plan=plan, fp64=fp64), log))
            assert code == 0, log.read_text()[-4000:]
            (counts / "seconds.json").write_text(json.dumps(time.monotonic() - started))
        return run_dir

    def _counts(self, nproc: int, rank: int) -> dict[str, int]:
        counts = self.reference(nproc).with_suffix(".counts")
        return json.loads((counts / f"{rank}.json").read_text())

    def choose(self, kind: Kind, phase: str, rng: random.Random) -> Strike:
        """A random call of ``phase`` on a random rank that has calls."""
        able = [rank for rank in range(kind.nproc) if self._counts(kind.nproc, rank)[phase]]
        rank = rng.choice(able)
        call = rng.randint(1, self._counts(kind.nproc, rank)[phase])
        return Strike(phase, call, rank, kind.whom, kind.signal)

    def run(self, kind: Kind, strike: Strike, name: str, rng: random.Random) -> Result:
        """Stops a run at ``strike`` (or by the clock) and resumes it to its end."""
        run_dir, log = self.folder / name, self.folder / f"{name}.log"
        shutil.rmtree(run_dir, ignore_errors=True)
        log.unlink(missing_ok=True)
        started = time.monotonic()
        what = f"{strike.phase}, call {strike.call} of rank {strike.rank}"
        if kind.by_clock:
            seconds = json.loads(
                (self.reference(kind.nproc).with_suffix(".counts") / "seconds.json").read_text()
            )
            after = rng.uniform(0.3, 0.9) * seconds
            what = f"after {after:.1f} s"
            process = start(command(run_dir, kind.nproc, fp64=kind.fp64), log)
            time.sleep(after)
            ended = process.poll() is not None
            what += " (it had ended)" if ended else ""
            exits = [process.wait() if ended else kill_all(process)]
        else:
            line = command(
                run_dir, kind.nproc, plan=strike.text(), fp64=kind.fp64, restarts=kind.restarts
            )
            exits = [finish(start(line, log))]
        problems = []
        if not what.endswith("(it had ended)"):
            output = log.read_text(errors="replace")
            problems = self._unexpected_end(kind, exits[0], output)
            # After SIGKILL, other ranks print the same message without saving.
            problems += _not_saved(run_dir, output) if kind.signal != "SIGKILL" else []
        if not kind.restarts:
            nproc = kind.resume_nproc or kind.nproc
            exits.append(finish(start(command(run_dir, nproc, fp64=kind.fp64), log)))
            if exits[1]:
                problems.append(f"the rerun command ended with {exits[1]}")
        if not problems:
            reference = self.reference(kind.nproc, kind.fp64)
            problems = differences(run_dir, reference, kind.within)
        return Result(kind.name, what, exits, time.monotonic() - started, problems)

    def _unexpected_end(self, kind: Kind, code: int, output: str) -> list[str]:
        """Problems of the end of the stopped run."""
        if kind.signal == "SIGKILL":
            expected = "0" if kind.restarts else "not 0"
            return [] if (code == 0) == bool(kind.restarts) else [f"exit {code}, not {expected}"]
        # torchrun exits with 1 after a signal.
        expected = 1 if kind.whom == "launcher" else 0
        lines = [] if code == expected else [f"exit {code}, not {expected}"]
        # Unless the run was already finished.
        if STOPPED not in output and "best eval/total" not in output:
            lines.append("no message on how to continue")
        return lines


def _not_saved(run_dir: Path, output: str) -> list[str]:
    """Problems of the checkpoint that a stopped run announced."""
    said = SAVING.search(output)
    if said is None:
        return ["it stopped without saving"] if STOPPED in output else []
    newest = Checkpointer(run_dir).load_latest()
    if newest is None:
        return [f"epoch {said[1]} was to be saved, but there is no checkpoint"]
    epoch = newest.state["epoch"]
    return [] if epoch == int(said[1]) else [f"epoch {said[1]} was to be saved, not {epoch}"]


def plan(index: int) -> tuple[Kind, str]:
    """Kind and phase of experiment ``index``; 77 experiments have all pairs."""
    return KINDS[index % len(KINDS)], list(PHASES)[index % len(PHASES)]
