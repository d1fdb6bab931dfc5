"""Result files of runs, small enough to be committed.

The first line is a header, followed by one object per evaluation or epoch with the training seconds
and forward-equivalents so far, without evaluations.  A forward-equivalent is a forward pass of one
sample through the transformer without LoRA; backward passes are converted by FLOPs
(models/flops.py).
"""

import json
import math
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion_nft.data.prompts import changed_prompts
from diffusion_nft.experiments.grid import ROOT, PlannedRun, differences, read_header, refuse
from diffusion_nft.models.flops import backward_cost, forward_cost
from diffusion_nft.runs.environment import ENVIRONMENTS_FILE, cpu_name
from diffusion_nft.runs.run_dir import CONFIG_FILE
from diffusion_nft.shapes import BUILT_IN_MODEL
from diffusion_nft.tracking.metrics import METRICS_FILE, read_metrics
from diffusion_nft.utils.files import read_lines, read_object, write_atomically
from diffusion_nft.validation.flat import flatten

BUILT_IN_PIPELINE = ROOT / "diffusion_nft" / "shapes" / "pipeline"
THREADS = "OMP_NUM_THREADS"
# Metrics kept of an epoch, in addition to those of the monitor.
EPOCH_METRICS = ("reward/mean", "reward/diversity", "reward/x0_rms", "loss/kl")
MAX_EPOCHS_KEPT = 80
SIGNIFICANT_DIGITS = 5


class Incomplete(ValueError):
    """A run is not finished, or lacks data for its result."""


def model_shape(config: ConfigDict) -> tuple[dict[str, Any], int, int]:
    """Configuration of the transformer, side of its latents and number of prompt tokens of a run.

    Raises ValueError for a model that is neither the built-in one nor a folder.
    """
    name = config.pretrained.model
    folder = BUILT_IN_PIPELINE if name == BUILT_IN_MODEL else Path(name)
    if not folder.is_dir():
        raise ValueError(
            f"pretrained.model {name!r}: experiments count the FLOPs of {BUILT_IN_MODEL!r} or of a "
            "diffusers folder"
        )
    parts = ("transformer/config.json", "vae/config.json", "tokenizer/tokenizer_config.json")
    transformer, vae, tokenizer = (read_object(folder / part) for part in parts)
    side = config.resolution // 2 ** (len(vae["block_out_channels"]) - 1)
    text = tokenizer["model_max_length"] + config.pretrained.max_sequence_length
    return transformer, side, text


def backward_over_forward(config: ConfigDict) -> float:
    """FLOPs of a backward pass to the LoRA, divided by those of a forward pass without LoRA."""
    shape = model_shape(config)
    return backward_cost(*shape, config.train.lora_rank).flops / forward_cost(*shape).flops


def threads(jobs: int) -> str:
    """Threads per run: OMP_NUM_THREADS, or an equal share of the cores."""
    return os.environ.get(THREADS, str(max(1, (os.cpu_count() or 1) // jobs)))


def place(run: PlannedRun) -> dict[str, Any]:
    """The part of the header about the experiment."""
    about = {key: getattr(run.experiment, key) for key in ("question", "baseline", "watched")}
    return {"experiment": run.name, **about, "variant": run.variant}


def header(run: PlannedRun, ratio: float, jobs: int) -> dict[str, Any]:
    """The header of a result: the run, its machine and versions."""
    starts = read_lines(run.folder / ENVIRONMENTS_FILE)
    if not starts:
        raise Incomplete(f"{run.folder / ENVIRONMENTS_FILE} has no start")
    about = dict(starts[-1])
    del about["command"]
    command = shlex.join(["python", *run.command()])
    return {
        **place(run),
        "seed": run.seed,
        "preset": run.preset,
        "changes": run.changes,
        "command": f"{THREADS}={threads(jobs)} {command}",
        "date": about.pop("time"),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": threads(jobs),
            "jobs": jobs,
            "device": about.pop("device"),
        },
        "git_revision": about.pop("git_revision"),
        "git_dirty": about.pop("git_dirty"),
        "starts": len(starts),
        "versions": about,
        "backward_over_forward": ratio,
        "prompts": run.prompts,
        "config": {k: v for k, v in flatten(run.config).items() if k != "save_dir"},
    }


def rows(run: PlannedRun, ratio: float) -> Iterator[dict[str, Any]]:
    """One object per evaluation or epoch, with the seconds and cost of the epochs so far.

    Epochs repeated after an interruption count once.  Raises Incomplete if an epoch has no cost or
    the last epoch was not evaluated.
    """
    every = math.ceil(run.config.num_epochs / MAX_EPOCHS_KEPT)
    seconds = cost = 0.0
    ended = False
    for row in read_metrics(run.folder / METRICS_FILE):
        evaluation = "eval/total" in row
        if not evaluation:
            try:
                seconds += row["time/epoch"]
                cost += row["cost/forwards"] + ratio * row["cost/backwards"]
            except KeyError as error:
                raise Incomplete(
                    f"epoch {row['epoch']} in {run.folder / METRICS_FILE} has no {error}: remove "
                    f"{run.folder} to run it again"
                ) from error
        if evaluation or row["epoch"] % every == 0:
            kept = {"seconds": seconds, "forward_equivalents": cost} | {
                k: v
                for k, v in row.items()
                if k in EPOCH_METRICS or k.startswith(("eval/", "monitor/"))
            }
            rounded = {
                k: float(f"{v:.{SIGNIFICANT_DIGITS}g}") if isinstance(v, float) else v
                for k, v in kept.items()
            }
            yield {"epoch": row["epoch"], "step": row["step"], **rounded}
        ended = evaluation and row["epoch"] == run.config.num_epochs
    if not ended:
        raise Incomplete(f"it ended before epoch {run.config.num_epochs} was evaluated")


def write_result(run: PlannedRun, jobs: int) -> dict[str, Any]:
    """Writes the result of a finished run; returns its last evaluation.

    Raises ValueError if the run is not finished or had another configuration.
    """
    ratio = backward_over_forward(run.config)
    numbers = list(rows(run, ratio))
    ran = read_object(run.folder / CONFIG_FILE)
    refuse(run, run.folder, differences(run, ran, []))
    _write(run.result, header(run, ratio, jobs), "".join(f"{_json(row)}\n" for row in numbers))
    return numbers[-1]


def _write(path: Path, header: dict[str, Any], rest: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{_json(header)}\n{rest}".encode())


def _json(line: dict[str, Any]) -> str:
    return json.dumps(line, separators=(",", ":"))


def same_elsewhere(run: PlannedRun) -> Path | None:
    """The newest result of the same run under another variant or experiment.

    Excludes copied results, and those of uncommitted code.  Raises ValueError for a damaged result.
    """
    found = []
    for path in run.result.parent.parent.glob(f"*/*-seed{run.seed}.jsonl"):
        about = read_header(path)
        if path == run.result or "ran_as" in about or about["git_dirty"]:
            continue
        # As in JSON, where tuples are lists.
        changes = json.loads(json.dumps(run.changes))
        same = about["preset"] == run.preset and about["changes"] == changes
        same = same and not changed_prompts(about.get("prompts", {}), run.prompts)
        if same and not differences(run, about["config"], list(about["changes"])):
            found.append((about["date"], path))
    return max(found)[1] if found else None


def copy_result(run: PlannedRun, source: Path) -> None:
    """Copies the result ``source`` as that of ``run``; the header names its origin."""
    first, _, rest = source.read_text(encoding="utf-8").partition("\n")
    about = json.loads(first)
    ran_as = f"{about['experiment']} {about['variant']}"
    _write(run.result, about | place(run) | {"ran_as": ran_as}, rest)
