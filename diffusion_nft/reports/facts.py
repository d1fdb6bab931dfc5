"""Tables of a report, and warnings and notes on its runs."""

import json
import math
import statistics
from collections.abc import Callable, Iterator

from diffusion_nft.evaluation.results import NUM_SAMPLES
from diffusion_nft.reports.charts import number
from diffusion_nft.reports.runs import Part, Run, Score, sorted_names
from diffusion_nft.runs.run_dir import differences
from diffusion_nft.tracking.monitor import ALARM, is_image_statistic

# Number of first and of last epochs whose means are compared.
WINDOW = 5
# Limits of warnings: share of groups with equal scores, share of diversity lost.
MAX_FLAT_GROUPS, MAX_LOST_DIVERSITY = 0.5, 0.2
# Maximum decimals of a number with an error; smaller errors have an exponent.
MAX_DECIMALS = 5
# Metrics for which null means a non-finite number; for others it may mean "not applicable".
FINITE_METRICS = ("loss/", "reward/mean", "reward/std", "reward/x0_rms", "eval/total")
NON_PHASE_METRICS = ("time/epoch", "time/eval", "time/images_per_second", "time/peak_memory_gb")
# Keys that are not compared.
NAMES = ("save_dir", "run_name")

# (label, one text per run).
Table = list[tuple[str, list[str]]]


def rewards_text(part: Part) -> str:
    """``"pickscore + 0.5 × ocr"``."""
    weights = part.rewards.items()
    return " + ".join(n if w == 1 else f"{w:g} × {n}" for n, w in weights) or "none"


def overview(runs: list[Run]) -> Table:
    return [
        ("Model", [run.config["pretrained.model"] for run in runs]),
        ("Data", [" → ".join(dict.fromkeys(part.dataset for part in run.parts)) for run in runs]),
        ("Reward", [" → ".join(dict.fromkeys(map(rewards_text, run.parts))) for run in runs]),
        ("Algorithm", [str(run.config.get("algorithm", "–")) for run in runs]),
        ("Seed", [str(run.config.get("seed", "–")) for run in runs]),
        ("Epochs", [f"{run.done:,} of {run.planned:,}" for run in runs]),
        ("Optimizer steps", [f"{run.rows[-1]['step']:,}" if run.rows else "–" for run in runs]),
        ("State", ["finished" if run.finished else "not finished" for run in runs]),
    ]


def config_table(run: Run) -> Table:
    """Every configuration key with its value as JSON."""
    return [(key, [_json(value)]) for key, value in sorted(run.config.items())]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def config_differences(runs: list[Run]) -> Table:
    """Differing configuration keys with their value in each run, and "yes" (first) or "no" for keys
    that alter training or not.
    """
    rows = []
    for key in sorted(set().union(*(run.config for run in runs)) - set(NAMES)):
        values = [_json(run.config[key]) if key in run.config else "–" for run in runs]
        if len(set(values)) > 1:
            rows.append((key, [*values, "yes" if differences({key: 0}, {key: 1}) else "no"]))
    return sorted(rows, key=lambda row: row[1][-1] == "no")


def with_error(score: Score, sign: str = "") -> str:
    """``"0.760 ± 0.042"``, with two digits of the error; only the number without an error."""
    value, error = score
    if value is None or not error or not math.isfinite(error):
        return number(value, sign)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals > MAX_DECIMALS:
        return f"{number(value, sign)} ± {error:.2g}"
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"


def finals(runs: list[Run]) -> Table:
    """Final metrics of each run, or of its last stage."""

    def evaluated(part: Part, name: str) -> str:
        if not part.tests or part.tests[-1].score(name)[0] is None:
            return "–"
        change = part.change(name)
        before = f"{number(change.before[0])} → " if len(part.tests) > 1 else ""
        return before + with_error(change.after)

    last = [run.parts[-1] for run in runs]
    names = sorted_names(name for part in last for name in part.names)
    rows = [(f"eval/{name}", [evaluated(part, name) for part in last]) for name in names]
    for key in ("reward/mean", "reward/diversity", "loss/kl"):
        rows.append((key, [number(r.epochs[-1].get(key)) if r.epochs else "–" for r in runs]))
    return rows


def timing(runs: list[Run]) -> Table:
    """Seconds by phase, speed and cost of each run."""

    def row(
        label: str, key: str, reduce: Callable[[list[float]], float], unit: str = ""
    ) -> tuple[str, list[str]]:
        values = (run.values(key) for run in runs)
        return label, [f"{number(reduce(known))}{unit}" if known else "–" for known in values]

    def phase(key: str) -> tuple[str, list[str]]:
        label, texts = row(key.removeprefix("time/").capitalize(), key, math.fsum, " s")
        for i, run in enumerate(runs):
            if (own := sum(run.values(key))) and (whole := sum(run.values("time/epoch"))):
                texts[i] += f" ({own / whole:.0%})"
        return label, texts

    keys = dict.fromkeys(key for run in runs for epoch in run.epochs for key in epoch)
    rows = [phase(key) for key in keys if key.startswith("time/") and key not in NON_PHASE_METRICS]
    rows += [
        row("All epochs", "time/epoch", math.fsum, " s"),
        row("Evaluations, not part of the epochs", "time/eval", math.fsum, " s"),
        row("Time per epoch, median", "time/epoch", statistics.median, " s"),
        row("Images per second, median", "time/images_per_second", statistics.median),
        row("Forward passes (cost/forwards)", "cost/forwards", math.fsum),
        row("Backward passes (cost/backwards)", "cost/backwards", math.fsum),
        row("Peak GPU memory", "time/peak_memory_gb", max, " GB"),
    ]
    return [(label, texts) for label, texts in rows if set(texts) != {"–"}]


def comparison_warnings(runs: list[Run]) -> Iterator[str]:
    """Reasons why metrics of the runs are not comparable."""
    parts = [run.parts[-1] for run in runs if run.parts[-1].tests]
    counts = {part.tests[-1].row.get(NUM_SAMPLES) for part in parts} - {None}
    if len({part.dataset for part in parts}) > 1 or len(counts) > 1:
        yield "The runs were evaluated on different test lines: eval/* is not comparable."
    if len({rewards_text(part) for part in parts}) > 1:
        yield "The runs have different rewards: reward/mean and eval/total are not comparable."


def warnings(run: Run) -> Iterator[str]:
    yield from _alarms(run)
    skipped = [row for row in run.epochs if row.get("optim/skipped_steps")]
    if skipped:
        count = skipped[-1]["optim/skipped_steps"]
        yield (
            f"{count} optimizer {'step was' if count == 1 else 'steps were'} skipped for a "
            f"non-finite gradient, the first by epoch {skipped[0]['epoch']}."
        )
    lost: dict[str, list[int]] = {}
    for row in run.rows:
        for key, value in row.items():
            if value is None and key.startswith(FINITE_METRICS):
                lost.setdefault(key, []).append(row["epoch"])
    for key, epochs in lost.items():
        plural = "s" if len(epochs) > 1 else ""
        yield f"{key} was not finite in {len(epochs)} epoch{plural}, first {epochs[0]}."
    _, flat = _ends(run, "reward/frac_zero_std")
    if flat >= MAX_FLAT_GROUPS:
        yield (
            f"In the last {WINDOW} epochs, all images of a prompt scored the same for {flat:.0%} "
            "of the prompts (reward/frac_zero_std), which have no training signal."
        )
    first, last = _ends(run, "reward/diversity")
    if last < (1 - MAX_LOST_DIVERSITY) * first:
        yield (
            f"Images of a prompt became similar: reward/diversity fell from {number(first)} to "
            f"{number(last)} (means over {WINDOW} epochs)."
        )
    for part in run.parts:
        if len(part.tests) > 1:
            yield from _losses(part)


def _ends(run: Run, key: str) -> tuple[float, float]:
    """Means of ``key`` over the first and last WINDOW epochs; NaN if the run is too short."""
    values = run.values(key)
    if len(values) < 2 * WINDOW:
        return math.nan, math.nan
    return statistics.fmean(values[:WINDOW]), statistics.fmean(values[-WINDOW:])


def _alarms(run: Run) -> Iterator[str]:
    rows = [row for row in run.rows if row.get("monitor/alarms")]
    if rows:
        first, last = rows[0], rows[-1]
        factor = last["monitor/kl_factor"]
        raised = f"; the weight of the KL term is multiplied by {factor:g}" if factor > 1 else ""
        names = [key.removeprefix(ALARM) for key in first if key.startswith(ALARM) and first[key]]
        yield (
            f"{last['monitor/alarms']:g} alarm(s) of the monitor, the first, of "
            f"{', '.join(names)}, in epoch {first['epoch']}{raised}."
        )


def _losses(part: Part) -> Iterator[str]:
    """Warnings on scores that decreased, and on a better total before the end."""
    where = f"{part.title}: " if part.title else ""
    for name in part.names:
        change = part.change(name)
        if change.direction == "down" and not is_image_statistic(name):
            kind = "held-out " if part.is_held_out(name) else ""
            yield f"{where}{kind}eval/{name} decreased in training: {with_error(change.gain)}."
    totals = [(t.row["eval/total"], t.row["epoch"]) for t in part.tests]
    known = [(total, epoch) for total, epoch in totals if total is not None]
    last = totals[-1][0]
    best, epoch = max(known, key=lambda pair: pair[0], default=(last, 0))
    if last is not None and best > last:
        yield (
            f"{where}the best eval/total, {number(best)}, was at epoch {epoch}, not at the end "
            f"({number(last)})."
        )


def notes(run: Run) -> Iterator[str]:
    """Notes on interruptions and differences between starts."""
    if not run.finished:
        yield f"Not finished: {run.done:,} of {run.planned:,} epochs."
    if len(run.starts) > 1:
        yield f"Started {len(run.starts)} times."
    for key in ("git_revision", "torch", "device", "world_size"):
        values = dict.fromkeys(str(start.get(key)) for start in run.starts)
        if len(values) > 1:
            yield f"{key} changed between starts: {' → '.join(values)}."
    if any(start.get("git_dirty") for start in run.starts):
        yield "Started from a working tree with uncommitted changes."


def starts(run: Run) -> Table:
    """Time, device, processes, versions, revision and command of each start."""
    return [
        (
            start.get("time", "–"),
            [
                start.get("device", "–"),
                start.get("world_size", "–"),
                f"{start.get('python', '–')} / {start.get('torch', '–')}",
                (start.get("git_revision") or "–")[:10]
                + (" + changes" if start.get("git_dirty") else ""),
                start.get("command", "–"),
            ],
        )
        for start in run.starts
    ]


def environment(run: Run) -> Table:
    return [
        (key, ["–" if value is None else value]) for key, value in sorted(run.starts[-1].items())
    ]
