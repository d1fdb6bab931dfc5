"""What results of experiments say in tables, by variant, tag and alarm; and their page."""

import argparse
import math
import re
import shlex
import statistics
from collections import Counter
from typing import Any

from diffusion_nft.experiments.comparison import (
    ACCURACY,
    COST,
    NO_ALARM_EPOCH,
    SECONDS,
    Result,
    Results,
    head_start,
    holm,
    mean_and_half_width,
    paired_test,
    probability,
    share,
)

TAG_STRICT = re.compile("eval/tag/(.+)/shapes/strict")
STRICTER, DIVERSITY = "eval/shapes/stricter", "eval/diversity"
REWARD, KL = "reward/mean", "loss/kl"
# Of so many epochs the reward is averaged.
WINDOW = 3
COLUMNS = (
    "variant",
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
    "p, Holm",
    "{baseline} is there after",
)


def by_variant(results: Results, baseline: str) -> list[list[str]]:
    """The head, and a row per variant: means over its seeds, compared with the baseline's."""
    base = results.get(baseline, {})
    tests = {
        variant: paired_test(runs, base)
        for variant, runs in results.items()
        if base and variant != baseline
    }
    adjusted = holm({variant: test.p for variant, test in tests.items()})
    rows = [[column.format(baseline=baseline) for column in COLUMNS]]
    for variant, runs in results.items():
        against = ["–" if base else "no results of it", "–", "–", "–", "–"]
        if variant in tests:
            difference, spent, p = tests[variant]
            ps = (probability(p), probability(adjusted[variant]))
            against = [difference, f"{spent / 1e3:.1f}", *ps, head_start(runs, base)]
        rows.append([*alone(variant, runs), *against])
    return rows


def alone(variant: str, results: dict[int, Result]) -> list[str]:
    """What a row says of ``variant`` without the baseline."""

    def mean(key: str) -> float:
        return statistics.fmean(result.last(key) for result in results.values())

    gain, half = mean_and_half_width([result.gain for result in results.values()])
    return [
        variant,
        str(len(results)),
        start_and_end(results, ACCURACY),
        f"{share(gain, '+')} ± {share(half)}",
        share(mean(STRICTER)),
        share(mean(DIVERSITY)),
        f"{mean(SECONDS):.0f}",
        f"{mean(COST) / 1e3:.1f}",
    ]


def in_training(results: Results, baseline: str) -> list[list[str]]:
    """A row per variant: rewards of the training samples, the distance to the reference, accuracy
    by epoch, and the comparison at equal time.
    """
    rows = [
        [
            "in training",
            f"reward, first → last {WINDOW} epochs",
            f"{KL}, last epoch",
            "strict after epoch",
            f"against {baseline} at equal seconds [95 %]",
        ]
    ]
    base = results.get(baseline, {})
    for variant, runs in results.items():
        first, last = (
            statistics.fmean(row[REWARD] for run in runs.values() for row in run.epochs[part])
            for part in (slice(WINDOW), slice(-WINDOW, None))
        )
        distances = [run.epochs[-1].get(KL) for run in runs.values()]
        curve = zip(*(run.evaluations for run in runs.values()), strict=True)
        accuracies = (
            f"{points[0]['epoch']}: {share(statistics.fmean(point[ACCURACY] for point in points))}"
            for points in curve
        )
        rows.append(
            [
                variant,
                f"{share(first)} → {share(last)}",
                share(statistics.fmean(math.nan if d is None else d for d in distances)),
                ", ".join(accuracies),
                "–" if variant == baseline or not base else _at_equal_time(runs, base),
            ]
        )
    return rows


def _at_equal_time(runs: dict[int, Result], baseline: dict[int, Result]) -> str:
    difference, spent, _ = paired_test(runs, baseline, SECONDS)
    return f"{difference}, at {spent:.0f} s"


def start_and_end(results: dict[int, Result], key: str) -> str:
    """``".485 → .762"``: means over seeds of the first and the last evaluation."""
    start = statistics.fmean(result.evaluations[0][key] for result in results.values())
    return f"{share(start)} → {share(statistics.fmean(r.last(key) for r in results.values()))}"


def by_tag(results: Results) -> list[list[str]]:
    """Strict accuracy of each tag, a row per variant."""
    runs = [result for seeds in results.values() for result in seeds.values()]
    keys = set.intersection(*(set(row) for result in runs for row in result.evaluations))
    tags = {found[1]: key for key in sorted(keys) if (found := TAG_STRICT.fullmatch(key))}
    if not tags:
        return []
    rows = [["strict by tag", *tags]]
    for variant, seeds in results.items():
        rows.append([variant, *(start_and_end(seeds, key) for key in tags.values())])
    return rows


def commands(name: str, results: Results, jobs: int) -> list[str]:
    """What ran the experiment: a command per choice of seeds, with the variants that had it."""
    variants: dict[tuple[int, ...], list[str]] = {}
    for variant, runs in results.items():
        variants.setdefault(tuple(sorted(runs)), []).append(variant)
    start = ["python", "scripts/experiments.py", name, "--variants"]
    return [
        shlex.join([*start, *names, "--seeds", *map(str, seeds), "--jobs", str(jobs)])
        for seeds, names in variants.items()
    ]


def experiment_page(name: str, results: Results, args: argparse.Namespace) -> str:
    """The experiment's page: question, figure, table, how to read it, how to remake it."""
    abouts = [result.about for seeds in results.values() for result in seeds.values()]
    about = abouts[-1]
    ratios = sorted({about["backward_over_forward"] for about in abouts})
    again = ["python", "scripts/experiments_plot.py", name]
    again += ["--results", str(args.results), "--output", str(args.output)]
    return "\n".join(
        [
            f"# {name}\n",
            f"{about['question']}\n",
            f"![Strict accuracy against compute and time]({name}.png)\n",
            *table(by_variant(results, about["baseline"])),
            *table(by_tag(results)),
            *table(in_training(results, about["baseline"])),
            *watched_lines(name, results),
            "Means over seeds; ± and [ ] are 95 % intervals (Student's t over seeds), p is of a "
            "paired t-test over common seeds, and by Holm's method for all of the table; the "
            "intervals are not adjusted. Evaluations count in neither seconds nor "
            "forward-equivalents; seconds grow with what else the machine did. A "
            "forward-equivalent is a sample's pass through the transformer; a backward pass is "
            f"{', '.join(f'{ratio:.3f}' for ratio in ratios)} of them by FLOPs. Two variants are "
            "compared where the cheapest run of both ended; between evaluations curves are lines, "
            "which lie below a curve that flattens, the more so the dearer its epochs. The "
            "first table's last column is the share of a variant's compute that the baseline "
            "needs for the accuracy with which the variant ends, mean (range), where it gets "
            f"there. Bands are of the gain over the start. Machine: {machines(abouts)}.\n",
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
    return abouts[-1].get("watched") or [REWARD, KL, STRICTER, DIVERSITY]


def watched_lines(name: str, results: Results) -> list[str]:
    """The figure of what is watched, and a table of when each alarm was first on."""
    lines = [f"![Watched metrics against compute]({name}-watched.png)", ""]
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
    """A row per variant, a column an alarm that was ever on, the earliest first; and one of what
    was first in a run.  A dash: no run of the variant watched it.
    """
    firsts = {
        variant: [run.first_alarms() for run in runs.values()] for variant, runs in results.items()
    }
    every = [item for runs in firsts.values() for run in runs for item in run.items()]
    if not every:
        return []
    on = sorted((epoch, name) for name, epoch in every if epoch < NO_ALARM_EPOCH)
    columns = [["first epochs of alarms", *firsts]]
    for name in dict.fromkeys(name for _, name in on):
        seen = ([run[name] for run in runs if name in run] for runs in firsts.values())
        columns.append([name, *map(_first_epochs, seen)])
    columns.append(["first of all", *map(_first_of_all, firsts.values())])
    return [list(row) for row in zip(*columns, strict=True)]


def _first_epochs(seen: list[int]) -> str:
    epochs = sorted(epoch for epoch in seen if epoch < NO_ALARM_EPOCH)
    if not epochs:
        return f"0 of {len(seen)}" if seen else "–"
    span = f"{statistics.median(epochs):g} ({epochs[0]} to {epochs[-1]})"
    return f"{len(epochs)} of {len(seen)}: {span}"


def _first_of_all(runs: list[dict[str, int]]) -> str:
    """``"loss/kl 4, eval/diversity 1"``; alarms of the same epoch are named together."""
    names = []
    for run in runs:
        epoch = min(run.values(), default=NO_ALARM_EPOCH)
        if epoch < NO_ALARM_EPOCH:
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
    """Which results are those of the same variant in another experiment."""
    taken = Counter((about["variant"], about["ran_as"]) for about in abouts if "ran_as" in about)
    texts = (
        f"{variant} (seeds: {count}) ran as {ran_as}" for (variant, ran_as), count in taken.items()
    )
    return f" Taken from other experiments: {'; '.join(texts)}." if taken else ""
