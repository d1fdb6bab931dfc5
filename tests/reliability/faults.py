"""Sends a signal to a training run at the n-th call of the function of a phase, on one rank.

Can be run instead of the training script, with a plan before the flags:

    torchrun ... tests/reliability/faults.py '{"phase": "training", "call": 3}' --config ...

A plan {"counts": FOLDER} sends no signal and writes the number of calls of each phase, by rank.
"""

import functools
import importlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train_nft.py"

# Phase -> function whose calls are counted; each is called at least once per epoch on some rank.
PHASES = {
    "sampling": "diffusion_nft.rollout:thumbnails",  # after each batch of images
    "scoring": "diffusion_nft.rewards.combine:RewardSet.__call__",  # in the background thread
    "training": "diffusion_nft.update:Learner._loss",  # before each micro-batch
    "update": "diffusion_nft.policy:Policy.ema_update",  # before EMA and old weights
    "log": "diffusion_nft.tracking.metrics:Metrics.log",
    "evaluation": "diffusion_nft.evaluation.evaluate:thumbnails",
    # Before each fsync.
    "checkpoint": "diffusion_nft.runs.checkpoint:sync",
}


@dataclass(frozen=True)
class Strike:
    """Sends ``signal`` at call ``call`` (from 1) of ``phase`` on ``rank``, to ``whom``.

    self: that rank; all: all ranks and the launcher, as in a crash of the machine; launcher:
    torchrun.  Only in the first attempt of torchrun.
    """

    phase: str
    call: int
    rank: int = 0
    whom: str = "self"
    signal: str = "SIGKILL"

    def text(self) -> str:
        return json.dumps(asdict(self))

    def __call__(self) -> None:
        number = signal.Signals[self.signal]
        launcher = os.getppid()
        if self.whom == "launcher":
            os.kill(launcher, number)
            return
        if self.whom == "all":
            ranks = children(launcher)
            os.kill(launcher, number)
            for process in ranks:
                if process != os.getpid():
                    os.kill(process, number)
        os.kill(os.getpid(), number)


def children(process: int) -> list[int]:
    """Process ids of the children (Linux)."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@contextmanager
def before_each_call(phase: str, act: Callable[[int], None]) -> Iterator[None]:
    """Calls ``act(n)`` before call n (from 1) of the function of ``phase`` in the block."""
    # Import all modules before patching, as one may import a function from another.
    modules = {key: importlib.import_module(e.partition(":")[0]) for key, e in PHASES.items()}
    *parents, name = PHASES[phase].partition(":")[2].split(".")
    holder: Any = functools.reduce(getattr, parents, modules[phase])
    function, calls = getattr(holder, name), 0

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        act(calls)
        return function(*args, **kwargs)

    setattr(holder, name, watched)
    try:
        yield
    finally:
        setattr(holder, name, function)


@contextmanager
def struck(strike: Strike) -> Iterator[None]:
    """Applies ``strike`` in the block, on its rank and in the first attempt of torchrun."""
    here = int(os.environ.get("RANK", 0)) == strike.rank
    first = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0

    def act(call: int) -> None:
        if call == strike.call and here and first:
            strike()

    with before_each_call(strike.phase, act):
        yield


@contextmanager
def counted(folder: Path) -> Iterator[None]:
    """Writes the number of calls of each phase in the block to ``<rank>.json`` in ``folder``."""
    counts = dict.fromkeys(PHASES, 0)

    def keep(phase: str, call: int) -> None:
        counts[phase] = call

    watches = [before_each_call(phase, functools.partial(keep, phase)) for phase in PHASES]
    for watch in watches:
        watch.__enter__()
    yield
    folder.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", 0))
    (folder / f"{rank}.json").write_text(json.dumps(counts))


def main() -> None:
    plan = json.loads(sys.argv.pop(1))
    sys.argv[0] = str(SCRIPT)
    with counted(Path(plan["counts"])) if "counts" in plan else struck(Strike(**plan)):
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:  # absl always raises it
            if end.code:
                raise


if __name__ == "__main__":
    main()
