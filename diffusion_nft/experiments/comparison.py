"""Statistics of experiments: gains, and paired tests at equal compute.

Intervals are Student's t over seeds.
"""

import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_nft.tracking.monitor import ALARM
from diffusion_nft.utils.files import read_lines

ACCURACY = "eval/shapes/strict"
COST, SECONDS = "forward_equivalents", "seconds"
NO_ALARM_EPOCH = sys.maxsize
CONFIDENCE = 0.95
# Minimum number of pairs for a test.
MIN_PAIRS = 3


@dataclass(frozen=True)
class Result:
    """A result file of scripts/experiments.py: header, and rows of evaluations and epochs."""

    about: dict[str, Any]
    rows: list[dict[str, Any]]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "eval/total" in row]

    def first_alarms(self) -> dict[str, int]:
        """Alarm -> first epoch in which it is on, or NO_ALARM_EPOCH; earliest first."""
        first: dict[str, int] = {}
        for row in self.rows:
            for key, on in row.items():
                if key.startswith(ALARM):
                    name, epoch = key.removeprefix(ALARM), row["epoch"] if on else NO_ALARM_EPOCH
                    first[name] = min(first.get(name, NO_ALARM_EPOCH), epoch)
        return dict(sorted(first.items(), key=lambda item: item[1]))

    @cached_property
    def epochs(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "reward/mean" in row]

    @property
    def gain(self) -> float:
        """Final minus initial strict accuracy."""
        return self.evaluations[-1][ACCURACY] - self.evaluations[0][ACCURACY]

    def last(self, key: str) -> float:
        """A metric of the last evaluation; NaN if missing."""
        value = self.evaluations[-1].get(key)
        return math.nan if value is None else value

    def at(self, spent: float, key: str = COST) -> float:
        """Strict accuracy at ``spent`` of ``key``, interpolated between evaluations."""
        spendings, values = ([row[name] for row in self.evaluations] for name in (key, ACCURACY))
        return float(np.interp(spent, spendings, values))

    def reaches(self, accuracy: float) -> float:
        """Forward-equivalents until strict ``accuracy`` is reached, interpolated between
        evaluations; infinite if it is not reached.
        """
        rows = self.evaluations
        if rows[0][ACCURACY] >= accuracy:
            return 0.0
        for before, after in itertools.pairwise(rows):
            if after[ACCURACY] >= accuracy:
                part = (accuracy - before[ACCURACY]) / (after[ACCURACY] - before[ACCURACY])
                return before[COST] + part * (after[COST] - before[COST])
        return math.inf


# variant -> seed -> result, with the baseline first.
Results = dict[str, dict[int, Result]]


def read(folder: Path) -> Results:
    """Reads the results of an experiment.

    Raises ValueError if there are none, or if the settings of a variant differ between seeds.
    """
    found: Results = {}
    baseline = ""
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise ValueError(f"{folder} has no results: run scripts/experiments.py {folder.name}")
    for path in paths:
        about, *rows = read_lines(path) or [{}]
        if missing := {"variant", "seed", "baseline", "preset", "changes"} - about.keys():
            raise ValueError(f"{path} is not a result: its first line has no {', '.join(missing)}")
        result = Result(about, rows)
        if len(result.evaluations) < 2 or ACCURACY not in result.evaluations[0]:
            raise ValueError(f"{path} must have at least two evaluations with {ACCURACY}")
        found.setdefault(about["variant"], {})[about["seed"]] = result
        baseline = about["baseline"]
    for variant, results in found.items():
        kinds = {
            (
                result.about["preset"],
                json.dumps(result.about["changes"], sort_keys=True),
                tuple(row["epoch"] for row in result.evaluations),
            )
            for result in results.values()
        }
        if len(kinds) > 1:
            raise ValueError(f"{folder}: the seeds of {variant} differ in {sorted(kinds)}")
    return {name: found[name] for name in sorted(found, key=lambda name: (name != baseline, name))}


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half-width of its 95 % interval (Student's t); NaN for a single value."""
    from scipy import stats

    n = len(values)
    if n < 2:
        return values[0], math.nan
    error = statistics.stdev(values) / math.sqrt(n)
    return statistics.fmean(values), float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error


class Comparison(NamedTuple):
    """Difference of a variant to the baseline after ``spent``; ``p`` is NaN without a test."""

    difference: str
    spent: float
    p: float = math.nan


def paired_test(
    variant: dict[int, Result], baseline: dict[int, Result], key: str = COST
) -> Comparison:
    """Difference in strict accuracy with its interval, and p of a paired t-test over common seeds
    (at least three), at the largest amount of ``key`` that all runs of both variants have spent.
    """
    from scipy import stats

    spent = min(result.last(key) for runs in (variant, baseline) for result in runs.values())
    seeds = sorted(variant.keys() & baseline.keys())
    ours, theirs = ([results[s].at(spent, key) for s in seeds] for results in (variant, baseline))
    if not seeds:
        return Comparison("no common seed", spent)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = share(statistics.fmean(differences), "+")
    if len(seeds) < MIN_PAIRS:
        return Comparison(f"{mean}, n={len(seeds)}: not tested", spent)
    if len({round(difference, 9) for difference in differences}) == 1:
        return Comparison(f"{mean} for each of n={len(seeds)}", spent)
    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(CONFIDENCE)
    interval = f"{mean} [{share(low, '+')}, {share(high, '+')}], n={len(seeds)}"
    return Comparison(interval, spent, float(test.pvalue))


def holm(ps: dict[str, float]) -> dict[str, float]:
    """``ps`` adjusted for multiple tests by Holm's step-down method (1979), which controls the
    family-wise error rate; NaN is not a test.
    """
    tested = sorted((p, variant) for variant, p in ps.items() if not math.isnan(p))
    steps = ((len(tested) - step) * p for step, (p, _) in enumerate(tested))
    adjusted = itertools.accumulate(steps, max)
    return ps | {variant: min(p, 1.0) for (_, variant), p in zip(tested, adjusted, strict=True)}


def head_start(variant: dict[int, Result], baseline: dict[int, Result]) -> str:
    """Share of a variant's compute after which the baseline has the variant's final accuracy.

    Mean and range over the common seeds in which it is reached, and their number.  A dash if the
    accuracy of the variant fell in all seeds.
    """
    seeds = sorted(variant.keys() & baseline.keys())
    if all(variant[s].gain < 0 for s in seeds):
        return "–"
    needed = [baseline[s].reaches(variant[s].last(ACCURACY)) / variant[s].last(COST) for s in seeds]
    there = [value for value in needed if math.isfinite(value)]
    if not there:
        return f"0 of {len(seeds)}"
    span = f"{share(statistics.fmean(there))} ({share(min(there))} to {share(max(there))})"
    return span if len(there) == len(seeds) else f"{len(there)} of {len(seeds)}: {span}"


def share(value: float, sign: str = "") -> str:
    """``".760"``, or with ``sign`` "+" ``"+.025"``; a dash for NaN."""
    return "–" if math.isnan(value) else re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{sign}.3f}")


def probability(p: float) -> str:
    """``".035"`` or ``"<.001"``; a dash for NaN."""
    return "<.001" if p < 0.001 else share(p)
