"""Differences between the final states of two runs."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diffusion_nft.models.lora import DIFFUSERS_WEIGHTS, PEFT_FOLDER, PEFT_WEIGHTS
from diffusion_nft.runs.checkpoint import Checkpointer
from diffusion_nft.tracking.metrics import read_metrics

# Tolerance of the log if weights may differ.
LOG_TOLERANCE = 1e-2
LORAS = (DIFFUSERS_WEIGHTS, f"{PEFT_FOLDER}/{PEFT_WEIGHTS}")


def differences(run_dir: Path, other: Path, within: float = 0.0) -> list[str]:
    """One line per difference between the final states of two runs.

    ``within``: allowed relative distance of weights and of each kind of moments.  With 0, these,
    counters, the best checkpoint, the exported LoRA and the log (except times) must be bitwise
    equal; otherwise the log may differ by LOG_TOLERANCE, and floats in the state are not compared.
    """
    ours, theirs = (Checkpointer(folder).load_latest() for folder in (run_dir, other))
    if ours is None or theirs is None:
        return ["no checkpoint"]
    if ours.path.name != theirs.path.name:
        return [f"ends at {ours.path.name}, not {theirs.path.name}"]
    lines = _in_log(_log(run_dir), _log(other), LOG_TOLERANCE if within else 0.0)
    for group, expected in theirs.tensors.items():
        lines += _in_group(group, ours.tensors[group], expected, within)
    states = [{k: v for k, v in c.state.items() if k != "config"} for c in (ours, theirs)]
    if within:
        states = [_without_fractions(state) for state in states]
    best = [Checkpointer(folder).best() for folder in (run_dir, other)]
    best = [path and path.name for path in best]
    for name, pair in (("state.json", states), ("best.json", best)):
        if pair[0] != pair[1]:
            lines.append(f"{name} differs")
    if not within:
        # The bytes may differ, as safetensors does not fix the order of metadata.
        for name in LORAS:
            if _distance(load_file(ours.path / name), load_file(theirs.path / name)):
                lines.append(f"{name} differs")
    return lines


def _in_group(
    group: str, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], within: float
) -> list[str]:
    """Compares each kind of tensor separately, as step counts are much larger than moments."""
    if ours.keys() != theirs.keys():
        return [f"{group} has other tensors"]
    lines = []
    for kind in sorted({_kind(key) for key in theirs}):
        a, b = ({k: v for k, v in side.items() if _kind(k) == kind} for side in (ours, theirs))
        distance = _distance(a, b)
        if distance > (0.0 if kind == "step" else within):
            lines.append(f"{group} differs by {distance:.1e} in {kind}")
    return lines


def _kind(key: str) -> str:
    """Last parts of a key without numbers, such as "exp_avg" or "lora_A.weight"."""
    return ".".join(part for part in key.split(".")[-2:] if not part.isdigit())


def _without_fractions(value: Any) -> Any:
    """A JSON value with None for all floats."""
    if isinstance(value, dict):
        return {key: _without_fractions(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_fractions(item) for item in value]
    return None if isinstance(value, float) else value


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative distance over all tensors; 0 if bitwise equal."""
    if a.keys() != b.keys():
        return math.inf
    if all(torch.equal(a[key], b[key]) for key in b):
        return 0.0
    squares = sum(float((a[key].double() - b[key].double()).square().sum()) for key in b)
    norm = sum(float(value.double().square().sum()) for value in b.values())
    return math.sqrt(squares / norm) if norm else math.inf


def _log(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.startswith("time/")}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def _in_log(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], within: float) -> list[str]:
    if [row.keys() for row in ours] != [row.keys() for row in theirs]:
        return ["the log has other rows"]
    lines = []
    for row, expected in zip(ours, theirs, strict=True):
        for key, value in expected.items():
            same = row[key] == value or (
                None not in (row[key], value)
                and math.isclose(row[key], value, rel_tol=within, abs_tol=within)
            )
            if not same:
                lines.append(f"log, epoch {row['epoch']}: {key} {row[key]!r}, not {value!r}")
    return lines
