"""Runs the training script on planned runs, several simultaneously, until a stop is requested."""

import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from diffusion_nft.distributed.preemption import requested
from diffusion_nft.experiments.grid import PlannedRun
from diffusion_nft.experiments.results import (
    THREADS,
    Incomplete,
    copy_result,
    same_elsewhere,
    threads,
    write_result,
)

POLL_SECONDS = 0.2
SHOWN_METRICS = ("eval/total", "eval/shapes/strict")


def run_all(todo: list[PlannedRun], jobs: int) -> list[PlannedRun]:
    """Runs ``todo``, ``jobs`` at a time, until all have ended or a stop is requested.

    Prints starts and ends; returns the failed runs.  The result of the same run in another variant
    or experiment is copied.
    """
    waiting, failed = deque(todo), []
    running: list[tuple[PlannedRun, subprocess.Popen[bytes], float]] = []
    try:
        while running or (waiting and not requested()):
            while waiting and len(running) < jobs and not requested():
                run = waiting.popleft()
                if source := same_elsewhere(run):
                    copy_result(run, source)
                    print(f"{run.title}: copied from {source}")
                    continue
                running.append((run, _start(run, jobs), time.monotonic()))
                print(f"{run.title}: started, log: {run.log}", flush=True)
            time.sleep(POLL_SECONDS)
            if requested():
                _end(process for _, process, _ in running)
            for entry in [entry for entry in running if entry[1].poll() is not None]:
                run, process, began = entry
                running.remove(entry)
                text, is_failed = _finish(run, process.returncode, jobs)
                print(f"{run.title}: {text} ({time.monotonic() - began:.0f} s)", flush=True)
                failed += [run] if is_failed else []
    finally:
        _end(process for _, process, _ in running)
    return failed


def _start(run: PlannedRun, jobs: int) -> subprocess.Popen[bytes]:
    run.folder.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *run.command()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {THREADS: threads(jobs)},
        )


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Requests a stop of ``processes`` and waits for their end."""
    asked = list(processes)
    for process in asked:
        process.terminate()
    for process in asked:
        process.wait()


def _finish(run: PlannedRun, code: int, jobs: int) -> tuple[str, bool]:
    """The outcome of a run that ended with ``code``: a message, and True for a failure."""
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
    # Lines of a progress bar end with a carriage return.
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    return lines[-1] if lines else "no output"
