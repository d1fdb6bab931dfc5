"""The log of a run: metrics.jsonl, images, optionally wandb and tensorboard; and a timer.

metrics.jsonl has one JSON object per line with ``step`` (optimizer steps), ``epoch`` and keys
``reward/*, loss/*, optim/*, time/*, eval/*``.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from diffusion_nft.images import Images
from diffusion_nft.rollout import GRID_COLUMNS
from diffusion_nft.tracking.grids import full_captions, image_grid, save_grid
from diffusion_nft.utils.console import LOGGER
from diffusion_nft.utils.files import append_line, read_lines, write_atomically

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_id.txt"
QUARTILES = {"q25": 0.25, "q50": 0.5, "q75": 0.75}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl in order; empty if the file does not exist.

    Skips an incomplete last line, of a killed run.  Raises ValueError naming any other line that is
    not a JSON object with ``step`` and ``epoch``.
    """
    rows = read_lines(path)
    for number, row in enumerate(rows, start=1):
        if not _is_row(row):
            raise ValueError(f"{path}:{number} is not a JSON object with step and epoch")
    return rows


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and {"step", "epoch"} <= value.keys()


def _finite(value: float) -> float | None:
    """``value`` for JSON: ints stay ints, NaN and infinities become None."""
    if isinstance(value, int):
        return int(value)
    return float(value) if math.isfinite(value) else None


def _scalars(values: Mapping[str, float | Tensor]) -> dict[str, float | None]:
    """``values`` for JSON; a distribution becomes its quartiles."""
    row: dict[str, float | None] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            for name, share in QUARTILES.items():
                row[f"{key}_{name}"] = _finite(float(value.nanquantile(share)))
        else:
            row[key] = _finite(value)
    return row


class Metrics:
    """Writes to ``run_dir``, and to wandb and tensorboard as ``config.log`` asks; does nothing
    unless ``enabled``, as on ranks other than the main one.

    ``config`` is the run's whole configuration.  If wandb cannot start (no key, no network, not
    installed), logs a warning and continues.  Raises ImportError if tensorboard is asked for and
    not installed.
    """

    def __init__(self, config: ConfigDict, run_dir: Path, *, enabled: bool = True):
        self._run_dir, self._enabled = run_dir, enabled
        self._path = run_dir / METRICS_FILE
        self._tensorboard = self._wandb = None
        if enabled:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._tensorboard = _start_tensorboard(run_dir) if config.log.tensorboard else None
            self._wandb = _start_wandb(config, run_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.close(failed=kind is not None)

    def log(self, values: Mapping[str, float | Tensor], *, step: int, epoch: int) -> None:
        """Appends one line of ``values``; NaN and infinities are written as null.

        A tensor ``[N]`` is a distribution, whose NaN are ignored: the line has its quartiles
        ``KEY_q25``, ``KEY_q50`` and ``KEY_q75``, wandb and tensorboard also a histogram ``KEY``.
        The line is fsynced, so that it precedes any later checkpoint: a resumed run does not log
        epochs before its checkpoint again.  Raises DiskError if it cannot be written.
        """
        if not self._enabled:
            return
        assert not {"step", "epoch"} & values.keys(), "step and epoch are arguments of log()"
        scalars = _scalars(values)
        row = {"step": step, "epoch": epoch, **scalars}
        append_line(self._path, json.dumps(row, allow_nan=False))
        known = {key: value for key, value in row.items() if value is not None}
        histograms = {
            key: finite
            for key, value in values.items()
            if isinstance(value, Tensor) and len(finite := value[value.isfinite()])
        }
        if self._wandb is not None:
            import wandb

            drawn = {key: wandb.Histogram(value.tolist()) for key, value in histograms.items()}
            # Without step=, as wandb would drop rows that a resumed run logs again.
            self._wandb.log(known | drawn)
        if self._tensorboard is not None:
            for key in scalars.keys() & known.keys():
                self._tensorboard.add_scalar(key, known[key], step)
            for key, value in histograms.items():
                self._tensorboard.add_histogram(key, value, step)
            self._tensorboard.flush()

    def log_images(
        self,
        name: str,
        images: Images,
        captions: Sequence[str],
        scores: Sequence[float],
        *,
        epoch: int,
    ) -> None:
        """Saves a grid as ``images/<name>-<epoch>.png`` ("/" in ``name`` becomes "_"), with its
        ``full_captions``; nothing without images.
        """
        if not self._enabled or not len(images):
            return
        grid = image_grid(images, captions, columns=GRID_COLUMNS, scores=scores)
        path = self._run_dir / "images" / f"{name.replace('/', '_')}-{epoch:06d}.png"
        save_grid(grid, path)
        full = full_captions(grid)
        if self._wandb is not None:
            import wandb

            image = wandb.Image(grid, caption=full or None)
            self._wandb.log({f"images/{name}": image, "epoch": epoch})
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, np.asarray(grid), epoch, dataformats="HWC")
            if full:
                markdown = full.replace("\n", "  \n")
                self._tensorboard.add_text(f"{name}/captions", markdown, epoch)
            self._tensorboard.flush()

    def truncate(self, step: int, epoch: int | None = None, stage: int | None = None) -> None:
        """Atomically removes lines after optimizer step ``step``, and after ``epoch`` and ``stage``
        if given, and damaged lines.

        Called when a run continues from a checkpoint, so that each epoch is logged once.  Before
        everything is removed (-1), the file is copied to ``metrics.jsonl.1`` or the next free
        number.  ``epoch`` matters if all updates of an epoch were skipped, so that the step did
        not change; ``stage`` if the next stage was evaluated at its start, which has the step and
        the epoch at which the previous one ended.
        """
        if self._enabled and self._path.exists():
            last_epoch = math.inf if epoch is None else epoch
            last_stage = math.inf if stage is None else stage

            def keep(line: bytes) -> bool:
                try:
                    row = json.loads(line)
                except ValueError:
                    return False
                return (
                    line.endswith(b"\n")
                    and _is_row(row)
                    and row["step"] <= step
                    and row["epoch"] <= last_epoch
                    and row.get("stage", 0) <= last_stage
                )

            content = self._path.read_bytes()
            if step < 0 and content:
                free = (self._path.with_name(f"{METRICS_FILE}.{n}") for n in count(1))
                write_atomically(next(path for path in free if not path.exists()), content)
            lines = content.splitlines(keepends=True)
            write_atomically(self._path, b"".join(filter(keep, lines)))
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = _start_tensorboard(self._run_dir, purge_step=step + 1)

    def close(self, *, failed: bool = False) -> None:
        """Closes the files; wandb marks the run finished or ``failed``.  May be called twice."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None


def _start_tensorboard(run_dir: Path, purge_step: int | None = None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("log.tensorboard needs: pip install tensorboard") from error
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)


def _wandb_id(run_dir: Path) -> str:
    """The id of the wandb run, which stays the same when the run is resumed."""
    path = run_dir / WANDB_ID_FILE
    if not path.exists():
        write_atomically(path, os.urandom(4).hex().encode())
    return path.read_text().strip()


def _start_wandb(config: ConfigDict, run_dir: Path) -> Any:
    """A wandb run, or None if off or not available.  WANDB_MODE overrides ``online``."""
    mode = config.log.wandb
    if mode == "off":
        return None
    try:
        import wandb
        from requests.utils import get_netrc_auth  # as wandb finds its key
    except ImportError:
        LOGGER.warning(
            "wandb is not installed (pip install wandb); metrics go to metrics.jsonl only"
        )
        return None
    if mode == "online":
        mode = os.environ.get("WANDB_MODE", mode)
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or get_netrc_auth(host)):
        LOGGER.warning(
            "wandb: no API key (wandb login, or WANDB_API_KEY), so this run logs offline"
        )
        mode = "offline"
    try:
        run = wandb.init(
            project=config.log.wandb_project,
            name=config.run_name or run_dir.resolve().name,
            id=_wandb_id(run_dir),
            resume="allow",
            mode=mode,  # pyright: ignore[reportArgumentType]  (WANDB_MODE may be anything)
            dir=str(run_dir),
            config=config.to_dict(),
        )
        run.define_metric("*", step_metric="step")
    except (wandb.Error, OSError, ValueError) as error:
        LOGGER.warning(f"wandb could not start ({error}); metrics go to metrics.jsonl only")
        return None
    return run


class Timer:
    """Seconds per phase.  On CUDA a phase ends when its queued work has finished."""

    def __init__(self, device: torch.device | None = None):
        self._device = device
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the wall time of the block to ``name``, unless it raises."""
        started = time.perf_counter()
        yield
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def pop(self) -> dict[str, float]:
        """``{"time/<phase>": seconds}`` since the last pop; resets to zero."""
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}": value for name, value in seconds.items()}
