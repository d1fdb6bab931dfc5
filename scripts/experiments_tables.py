"""What results of experiments say in tables: gains, paired tests, tags, alarms; and their page.

Intervals are Student's t over seeds.
"""

import argparse
import itertools
import json
import math
import re
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_nft.monitor import ALARM

TAG_STRICT = re.compile("eval/tag/(.+)/shapes/strict")
STRICT, STRICTER, DIVERSITY = "eval/shapes/strict", "eval/shapes/stricter", "eval/diversity"
COST, SECONDS = "forward_equivalents", "seconds"
CONFIDENCE = 0.95
# Fewer pairs than this say next to nothing about their spread.
MIN_PAIRS = 3
NEVER = sys.maxsize
COLUMNS = (
    "arm",
    "seeds",
    "strict",
    "gain ± 95 %",
    "stricter",
    "diversity",
    "seconds",
    "forward-equivalents, thousands",
    "against {baseline} at equal compute [95 %]",
    "at, thousands",
    "p",
    "{baseline} is there after",
)


@dataclass(frozen=True)
class Result:
    """A file of scripts/experiments.py: what ran, and its evaluations and epochs in their order."""

    about: dict[str, Any]
    rows: list[dict[str, Any]]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows that are evaluations."""
        return [row for row in self.rows if "eval/total" in row]

    def first_alarms(self) -> dict[str, int]:
        """The epoch at which each alarm of the monitor is first on, earliest first; and those that
        never are, at NEVER.
        """
        first: dict[str, int] = {}
        for row in self.rows:
            for key, on in row.items():
                if key.startswith(ALARM):
                    epoch = row["epoch"] if on else NEVER
                    first[key] = min(first.get(key, NEVER), epoch)
        return {
            key.removeprefix(ALARM): epoch
            for key, epoch in sorted(first.items(), key=lambda item: item[1])
        }

    @property
    def gain(self) -> float:
        """Strict accuracy at the end minus that at the start."""
        return self.evaluations[-1][STRICT] - self.evaluations[0][STRICT]

    def last(self, key: str) -> float:
        """A number of the last evaluation; NaN where it has none."""
        value = self.evaluations[-1].get(key)
        return math.nan if value is None else value

    def at(self, cost: float) -> float:
        """Strict accuracy after ``cost`` forward-equivalents, between evaluations by a line."""
        costs, values = ([row[key] for row in self.evaluations] for key in (COST, STRICT))
        return float(np.interp(cost, costs, values))

    def reaches(self, accuracy: float) -> float:
        """The forward-equivalents at which strict accuracy first is ``accuracy``, between
        evaluations by a line; infinite if it never is.
        """
        rows = self.evaluations
        if rows[0][STRICT] >= accuracy:
            return 0.0
        for before, after in itertools.pairwise(rows):
            if after[STRICT] >= accuracy:
                part = (accuracy - before[STRICT]) / (after[STRICT] - before[STRICT])
                return before[COST] + part * (after[COST] - before[COST])
        return math.inf


# arm -> seed -> result; the baseline comes first.
Results = dict[str, dict[int, Result]]


def read(folder: Path) -> Results:
    """The results of an experiment.

    Raises ValueError if there are none, or if the seeds of an arm ran with different settings.
    """
    found: Results = {}
    baseline = ""
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise ValueError(f"{folder} holds no results: python scripts/experiments.py {folder.name}")
    for path in paths:
        about, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        result = Result(about, rows)
        if len(result.evaluations) < 2 or STRICT not in result.evaluations[0]:
            raise ValueError(f"{path} must hold two evaluations or more, with {STRICT}")
        found.setdefault(about["arm"], {})[about["seed"]] = result
        baseline = about["baseline"]
    for arm, results in found.items():
        kinds = {
            (
                result.about["preset"],
                json.dumps(result.about["changes"], sort_keys=True),
                tuple(row["epoch"] for row in result.evaluations),
            )
            for result in results.values()
        }
        if len(kinds) > 1:
            raise ValueError(f"{folder}: the seeds of {arm} differ in {sorted(kinds)}")
    return {arm: found[arm] for arm in sorted(found, key=lambda arm: (arm != baseline, arm))}


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half its 95 % interval by Student's t; NaN for a single value."""
    from scipy import stats

    n = len(values)
    if n < 2:
        return values[0], math.nan
    error = statistics.stdev(values) / math.sqrt(n)
    return statistics.fmean(values), float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error


def paired_test(arm: dict[int, Result], baseline: dict[int, Result]) -> tuple[str, str, str]:
    """(difference of the strict accuracies with its interval, the forward-equivalents at which it
    is taken, p) over common seeds; fewer than three are not tested.  Taken is the most that every
    run of both arms has spent.
    """
    from scipy import stats

    budget = min(result.last(COST) for runs in (arm, baseline) for result in runs.values())
    spent = f"{budget / 1e3:.1f}"
    seeds = sorted(arm.keys() & baseline.keys())
    ours, theirs = ([results[s].at(budget) for s in seeds] for results in (arm, baseline))
    if not seeds:
        return "no common seed", spent, "–"
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = share(statistics.fmean(differences), "+")
    if len(seeds) < MIN_PAIRS:
        return f"{mean}, n={len(seeds)}: not tested", spent, "–"
    if len({round(difference, 9) for difference in differences}) == 1:
        return f"{mean} for each of n={len(seeds)}", spent, "–"
    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(CONFIDENCE)
    interval = f"{mean} [{share(low, '+')}, {share(high, '+')}], n={len(seeds)}"
    return interval, spent, "<.001" if test.pvalue < 0.001 else share(test.pvalue)


def head_start(arm: dict[int, Result], baseline: dict[int, Result]) -> str:
    """The share of an arm's compute after which the baseline is where the arm ends, mean and range
    over common seeds, and in how many it gets there.  A dash if the arm only lost.
    """
    seeds = sorted(arm.keys() & baseline.keys())
    if all(arm[s].gain < 0 for s in seeds):
        return "–"
    needed = [baseline[s].reaches(arm[s].last(STRICT)) / arm[s].last(COST) for s in seeds]
    there = [value for value in needed if math.isfinite(value)]
    if not there:
        return f"0 of {len(seeds)}"
    span = f"{share(statistics.fmean(there))} ({share(min(there))} to {share(max(there))})"
    return span if len(there) == len(seeds) else f"{len(there)} of {len(seeds)}: {span}"


def share(value: float, sign: str = "") -> str:
    """.760, or with ``sign`` "+": +.025; a dash for NaN."""
    return "–" if math.isnan(value) else re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{sign}.3f}")


def cells(arm: str, results: dict[int, Result], baseline: dict[int, Result] | None) -> list[str]:
    """A row of the table: means over the seeds of ``arm``."""

    def mean(key: str) -> float:
        return statistics.fmean(result.last(key) for result in results.values())

    gain, half = mean_and_half_width([result.gain for result in results.values()])
    against = ("–", "–", "–", "–")
    if baseline is None:
        against = ("no results of it", "–", "–", "–")
    elif baseline is not results:
        against = (*paired_test(results, baseline), head_start(results, baseline))
    return [
        arm,
        str(len(results)),
        start_and_end(results, STRICT),
        f"{share(gain, '+')} ± {share(half)}",
        share(mean(STRICTER)),
        share(mean(DIVERSITY)),
        f"{mean(SECONDS):.0f}",
        f"{mean(COST) / 1e3:.1f}",
        *against,
    ]


def start_and_end(results: dict[int, Result], key: str) -> str:
    """``".485 → .762"``: means over seeds of the first and the last evaluation."""
    start = statistics.fmean(result.evaluations[0][key] for result in results.values())
    return f"{share(start)} → {share(statistics.fmean(r.last(key) for r in results.values()))}"


def by_tag(results: Results) -> list[list[str]]:
    """Strict accuracy of each tag, a row an arm."""
    runs = [result for seeds in results.values() for result in seeds.values()]
    keys = set.intersection(*(set(row) for result in runs for row in result.evaluations))
    tags = {found[1]: key for key in sorted(keys) if (found := TAG_STRICT.fullmatch(key))}
    if not tags:
        return []
    rows = [["strict by tag", *tags]]
    for arm, seeds in results.items():
        rows.append([arm, *(start_and_end(seeds, key) for key in tags.values())])
    return rows


def commands(name: str, results: Results, jobs: int) -> list[str]:
    """What ran the experiment: a command for each choice of seeds, with the arms that had it."""
    arms: dict[tuple[int, ...], list[str]] = {}
    for arm, runs in results.items():
        arms.setdefault(tuple(sorted(runs)), []).append(arm)
    start = ["python", "scripts/experiments.py", name, "--arms"]
    return [
        shlex.join([*start, *names, "--seeds", *map(str, seeds), "--jobs", str(jobs)])
        for seeds, names in arms.items()
    ]


def report(name: str, results: Results, args: argparse.Namespace) -> str:
    """The experiment's page: question, figure, table, how to read it, how to remake it."""
    abouts = [result.about for seeds in results.values() for result in seeds.values()]
    about = abouts[-1]
    baseline = results.get(about["baseline"])
    rows = [[column.format(baseline=about["baseline"]) for column in COLUMNS]]
    rows += [cells(arm, seeds, baseline) for arm, seeds in results.items()]
    ratios = sorted({about["backward_over_forward"] for about in abouts})
    again = ["python", "scripts/experiments_plot.py", name]
    again += ["--results", str(args.results), "--output", str(args.output)]
    return "\n".join(
        [
            f"# {name}\n",
            f"{about['question']}\n",
            f"![Strict accuracy against compute and time]({name}.png)\n",
            *table(rows),
            *table(by_tag(results)),
            *watched_lines(name, results),
            "Means over seeds; ± and [ ] are 95 % intervals (Student's t over seeds), p is of a",
            "paired t-test over common seeds, not corrected for the number of arms. Evaluations",
            "count in neither seconds nor forward-equivalents. A forward-equivalent is a sample's",
            "pass through the transformer; a backward pass is",
            f"{', '.join(f'{ratio:.3f}' for ratio in ratios)} of them by FLOPs. Two arms are "
            "compared where the cheapest run of both ended; between evaluations curves are lines, "
            "which lie below a curve that flattens, the more so the dearer its epochs. The last "
            "column is the share of an arm's compute that the baseline needs for the accuracy with "
            "which the arm ends, mean (range), where it gets there. Bands are "
            f"of the gain over the start. Machine: {machines(abouts)}.\n",
            f"    {shlex.join(again)}\n",
            "remakes figures and tables from the results, which came from (with another --results, "
            "since what is there is not run again)\n",
            *(f"    {line}" for line in commands(name, results, about["machine"]["jobs"])),
            "",
            f"at revision {revisions(abouts)}.{elsewhere(abouts)}\n",
        ]
    )


def table(rows: list[list[str]]) -> list[str]:
    """Markdown; the first row is the head.  Nothing of no rows."""
    if not rows:
        return []
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body, ""]


def watched(results: Results) -> list[str]:
    """The metrics that the experiment draws beside strict accuracy."""
    abouts = [result.about for seeds in results.values() for result in seeds.values()]
    return abouts[-1].get("watched", [])


def watched_lines(name: str, results: Results) -> list[str]:
    """The figure of what is watched, and a table of when each alarm was first on."""
    lines = []
    if watched(results):
        lines += [f"![Watched metrics by epoch]({name}-watched.png)", ""]
    rows = alarms(results)
    if rows and len(rows[0]) == 2:
        lines += ["No alarm of the monitor was on in the runs that watched for them.", ""]
    elif rows:
        lines += table(rows)
        lines += ["Alarms: runs in which the limit was passed, of those that watched it, and the"]
        lines += ["median of the epochs in which it first was (first to last of them). Evaluations"]
        lines += ["are not of every epoch.", ""]
    return lines


def alarms(results: Results) -> list[list[str]]:
    """A row an arm, a column an alarm that was ever on, the earliest first; and one of what was
    first in a run.  A dash: no run of the arm watched it.
    """
    firsts = {arm: [run.first_alarms() for run in runs.values()] for arm, runs in results.items()}
    every = [item for runs in firsts.values() for run in runs for item in run.items()]
    if not every:
        return []
    on = sorted((epoch, name) for name, epoch in every if epoch < NEVER)
    columns = [["first epochs of alarms", *firsts]]
    for name in dict.fromkeys(name for _, name in on):
        seen = ([run[name] for run in runs if name in run] for runs in firsts.values())
        columns.append([name, *map(_first_epochs, seen)])
    columns.append(["first of all", *map(_first_of_all, firsts.values())])
    return [list(row) for row in zip(*columns, strict=True)]


def _first_epochs(seen: list[int]) -> str:
    epochs = sorted(epoch for epoch in seen if epoch < NEVER)
    if not epochs:
        return f"0 of {len(seen)}" if seen else "–"
    span = f"{statistics.median(epochs):g} ({epochs[0]} to {epochs[-1]})"
    return f"{len(epochs)} of {len(seen)}: {span}"


def _first_of_all(runs: list[dict[str, int]]) -> str:
    """``"loss/kl 4, eval/diversity 1"``; alarms of the same epoch are named together."""
    names = []
    for run in runs:
        epoch = min(run.values(), default=NEVER)
        if epoch < NEVER:
            names.append(" + ".join(name for name, when in run.items() if when == epoch))
    counts = ", ".join(f"{name} {count}" for name, count in Counter(names).most_common())
    return counts or ("none" if any(runs) else "–")


def machines(abouts: list[dict[str, Any]]) -> str:
    """Where the seconds were measured, each kind of place once."""
    places = (about["machine"] for about in abouts)
    texts = (
        f"{place['cpu']} with {place['cores']} cores, {place['device']}, "
        f"{place['threads']} thread(s) a run, {place['jobs']} run(s) at once"
        for place in places
    )
    return "; ".join(dict.fromkeys(texts))


def revisions(abouts: list[dict[str, Any]]) -> str:
    """Of the program, each once, the commonest first; a star: the working tree had changes."""
    names = [about["git_revision"][:9] + "*" * about["git_dirty"] for about in abouts]
    text = ", ".join(name for name, _ in Counter(names).most_common())
    return f"{text} (* with changes that were not committed)" if "*" in text else text


def elsewhere(abouts: list[dict[str, Any]]) -> str:
    """Which results are those of the same arm in another experiment."""
    taken = Counter((about["arm"], about["ran_as"]) for about in abouts if "ran_as" in about)
    texts = (f"{arm} (seeds: {count}) ran as {ran_as}" for (arm, ran_as), count in taken.items())
    return f" Taken from other experiments: {'; '.join(texts)}." if taken else ""
