"""Tables of experiments by variant, tag and alarm, and the Markdown page of an experiment."""

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
from diffusion_nft.utils.tables import markdown_table

TAG_STRICT = re.compile("eval/tag/(.+)/shapes/strict")
STRICTER, DIVERSITY = "eval/shapes/stricter", "eval/diversity"
REWARD, KL = "reward/mean", "loss/kl"
# Number of epochs over which the reward is averaged.
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


Table = list[list[str]]  # the first row is the header


def by_variant(results: Results, baseline: str) -> Table:
    """One row per variant: means over seeds, and the comparison with the baseline."""
    base = results.get(baseline, {})
    tests = {
        variant: paired_test(runs, base)
        for variant, runs in results.items()
        if base and variant != baseline
    }
    adjusted = holm({variant: test.p for variant, test in tests.items()})
    rows = [[column.format(baseline=baseline) for column in COLUMNS]]
    for variant, runs in results.items():
        gain, half = mean_and_half_width([run.gain for run in runs.values()])
        stricter, diversity, seconds, cost = (
            statistics.fmean(run.last(key) for run in runs.values())
            for key in (STRICTER, DIVERSITY, SECONDS, COST)
        )
        against = ["–" if base else "no results", "–", "–", "–", "–"]
        if variant in tests:
            difference, spent, p = tests[variant]
            ps = (probability(p), probability(adjusted[variant]))
            against = [difference, f"{spent / 1e3:.1f}", *ps, head_start(runs, base)]
        rows.append(
            [
                variant,
                str(len(runs)),
                start_and_end(runs, ACCURACY),
                f"{share(gain, '+')} ± {share(half)}",
                share(stricter),
                share(diversity),
                f"{seconds:.0f}",
                f"{cost / 1e3:.1f}",
                *against,
            ]
        )
    return rows


def in_training(results: Results, baseline: str) -> Table:
    """One row per variant: rewards in training, distance to the reference, accuracy by epoch, and
    the comparison with the baseline at equal time.
    """
    head = ["in training", f"reward, first → last {WINDOW} epochs", f"{KL}, last epoch"]
    rows = [[*head, "strict after epoch", f"against {baseline} at equal seconds [95 %]"]]
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
        against = "–"
        if base and variant != baseline:
            difference, spent, _ = paired_test(runs, base, SECONDS)
            against = f"{difference}, at {spent:.0f} s"
        rows.append(
            [
                variant,
                f"{share(first)} → {share(last)}",
                share(statistics.fmean(math.nan if d is None else d for d in distances)),
                ", ".join(accuracies),
                against,
            ]
        )
    return rows


def start_and_end(results: dict[int, Result], key: str) -> str:
    """``".485 → .762"``: means over seeds in the first and last evaluation."""
    start = statistics.fmean(result.evaluations[0][key] for result in results.values())
    return f"{share(start)} → {share(statistics.fmean(r.last(key) for r in results.values()))}"


def by_tag(results: Results) -> Table:
    """Strict accuracy by tag, one row per variant; empty without tags."""
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
    """The commands that run the experiment, one per set of seeds."""
    variants: dict[tuple[int, ...], list[str]] = {}
    for variant, runs in results.items():
        variants.setdefault(tuple(sorted(runs)), []).append(variant)
    start = ["python", "scripts/experiments.py", name, "--variants"]
    return [
        shlex.join([*start, *names, "--seeds", *map(str, seeds), "--jobs", str(jobs)])
        for seeds, names in variants.items()
    ]


def experiment_page(name: str, results: Results, args: argparse.Namespace) -> str:
    """Markdown page of an experiment: question, figures, tables, explanations and commands."""
    abouts = _abouts(results)
    about = abouts[-1]
    baseline = about["baseline"]
    ratios = sorted({about["backward_over_forward"] for about in abouts})
    again = ["python", "scripts/experiments_plot.py", name]
    again += ["--results", str(args.results), "--output", str(args.output)]
    tables = (by_variant(results, baseline), by_tag(results), in_training(results, baseline))
    parts = [
        f"# {name}",
        about["question"],
        f"![Strict accuracy against compute and time]({name}.png)",
        *(markdown_table(head, rows) for head, *rows in filter(None, tables)),
        f"![Watched metrics against compute]({name}-watched.png)",
        *alarms_section(results),
        "Means over seeds; ± and [ ] are 95 % intervals (Student's t over seeds), p is from a "
        "paired t-test over common seeds, also adjusted by Holm's method for the table; the "
        "intervals are not adjusted. Seconds and forward-equivalents do not include "
        "evaluations; seconds depend on the load of the machine. A forward-equivalent is a "
        "forward pass of one sample through the transformer; a backward pass is "
        f"{', '.join(f'{ratio:.3f}' for ratio in ratios)} of them by FLOPs. Two variants are "
        "compared at the end of the cheapest run of both. Curves are interpolated linearly between "
        "evaluations, which underestimates a concave curve, more so with expensive epochs. "
        "The last column of the first table is the share of a variant's compute that the baseline "
        "needs to reach the variant's final accuracy: mean (range), and the number of seeds in "
        f"which it does. Bands are for the gain. Machine: {machines(abouts)}.",
        f"    {shlex.join(again)}",
        "makes figures and tables from the results, which were made by (to repeat finished runs, "
        "use another --results)",
        "\n".join(f"    {line}" for line in commands(name, results, about["machine"]["jobs"])),
        f"at revision {revisions(abouts)}.{elsewhere(abouts)}",
    ]
    return "\n\n".join(parts) + "\n"


def _abouts(results: Results) -> list[dict[str, Any]]:
    return [result.about for seeds in results.values() for result in seeds.values()]


def watched(results: Results) -> list[str]:
    """Metrics plotted in addition to strict accuracy."""
    return _abouts(results)[-1].get("watched") or [REWARD, KL, STRICTER, DIVERSITY]


def alarms_section(results: Results) -> list[str]:
    """The table of first alarms with its explanation; empty if no run had alarms."""
    table = alarms(results)
    if not table:
        return []
    head, *rows = table
    if len(head) == 2:
        return ["No alarm of the monitor was on in the runs that had one."]
    return [
        markdown_table(head, rows),
        "Alarms: number of runs in which the alarm was on, of those that had it; median (range) of "
        "its first epochs. Not every epoch has an evaluation.",
    ]


def alarms(results: Results) -> Table:
    """One row per variant; one column per alarm that was on, earliest first, and one for the first
    alarms of the runs.  A dash if no run of the variant had the alarm.
    """
    firsts = {
        variant: [run.first_alarms() for run in runs.values()] for variant, runs in results.items()
    }
    every = [item for runs in firsts.values() for run in runs for item in run.items()]
    if not every:
        return []
    on = sorted((epoch, name) for name, epoch in every if epoch < NO_ALARM_EPOCH)
    names = list(dict.fromkeys(name for _, name in on))
    table = [["first epochs of alarms", *names, "first of all"]]
    for variant, runs in firsts.items():
        seen = ([run[name] for run in runs if name in run] for name in names)
        table.append([variant, *map(_first_epochs, seen), _first_of_all(runs)])
    return table


def _first_epochs(seen: list[int]) -> str:
    epochs = sorted(epoch for epoch in seen if epoch < NO_ALARM_EPOCH)
    if not epochs:
        return f"0 of {len(seen)}" if seen else "–"
    span = f"{statistics.median(epochs):g} ({epochs[0]} to {epochs[-1]})"
    return f"{len(epochs)} of {len(seen)}: {span}"


def _first_of_all(runs: list[dict[str, int]]) -> str:
    """``"loss/kl 4, eval/diversity 1"``, with "+" between alarms of the same epoch."""
    names = []
    for run in runs:
        epoch = min(run.values(), default=NO_ALARM_EPOCH)
        if epoch < NO_ALARM_EPOCH:
            names.append(" + ".join(name for name, when in run.items() if when == epoch))
    counts = ", ".join(f"{name} {count}" for name, count in Counter(names).most_common())
    return counts or ("none" if any(runs) else "–")


def machines(abouts: list[dict[str, Any]]) -> str:
    """The unique machines of the runs."""
    places = (about["machine"] for about in abouts)
    texts = (
        f"{place['cpu']} with {place['cores']} cores, {place['device']}, "
        f"{place['threads']} thread(s) per run, {place['jobs']} run(s) simultaneously"
        for place in places
    )
    return "; ".join(dict.fromkeys(texts))


def revisions(abouts: list[dict[str, Any]]) -> str:
    """Git revisions, most common first; a star marks uncommitted changes."""
    names = [about["git_revision"][:9] + "*" * about["git_dirty"] for about in abouts]
    text = ", ".join(name for name, _ in Counter(names).most_common())
    return f"{text} (* with uncommitted changes)" if "*" in text else text


def elsewhere(abouts: list[dict[str, Any]]) -> str:
    """A sentence on the results copied from other experiments."""
    taken = Counter((about["variant"], about["ran_as"]) for about in abouts if "ran_as" in about)
    texts = (
        f"{variant} (seeds: {count}) ran as {ran_as}" for (variant, ran_as), count in taken.items()
    )
    return f" Taken from other experiments: {'; '.join(texts)}." if taken else ""
