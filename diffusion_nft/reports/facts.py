"""What a report says of runs beside curves: tables, and what deserves a second look."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from diffusion_nft.evaluation.results import NUM_SAMPLES
from diffusion_nft.reports.charts import number
from diffusion_nft.reports.runs import Part, Row, Run
from diffusion_nft.runs.run_dir import differences
from diffusion_nft.tracking.monitor import ALARM, is_image_statistic

# Means over this many epochs at the start and at the end are compared.
WINDOW = 5
# From these on a number is worth a warning.
MAX_FRAC_ZERO_STD = 0.5
MAX_DIVERSITY_LOSS = 0.2
# Of a number with a standard error; smaller errors are written with an exponent.
MAX_DECIMALS = 5
# A null here is a number that was not finite; elsewhere it may mean "does not apply".
FINITE_METRICS = ("loss/", "reward/mean", "reward/std", "reward/x0_rms", "eval/total")
NON_PHASE_METRICS = ("time/epoch", "time/eval", "time/images_per_second", "time/peak_memory_gb")
# Where a run lies and what it is called is no setting to compare.
NAMES = ("save_dir", "run_name")

# A label, and a text for each run.
Table = list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Notice:
    """Something to look at; ``warning``, or a mere note."""

    run: str
    warning: bool
    text: str


def rewards_text(part: Part) -> str:
    """``"pickscore + 0.5 × ocr"``."""
    weights = part.rewards.items()
    return " + ".join(n if w == 1 else f"{w:g} × {n}" for n, w in weights) or "none"


def summary(run: Run) -> list[tuple[str, str]]:
    """What was trained, on what, how far: (label, text)."""
    data = dict.fromkeys(part.dataset for part in run.parts)
    rewards = dict.fromkeys(map(rewards_text, run.parts))
    facts = [
        ("Model", run.model),
        ("Data", " → ".join(data)),
        ("Reward", " → ".join(rewards)),
        ("Algorithm", str(run.config.get("algorithm", "–"))),
        ("Seed", str(run.config.get("seed", "–"))),
        ("Epochs", f"{run.done:,} of {run.planned:,}"),
    ]
    if run.rows:
        facts.append(("Optimizer steps", f"{run.rows[-1]['step']:,}"))
    return facts


def show(value: object) -> str:
    """A configuration value as JSON; a dash for an absent key."""
    return "–" if value is MISSING_VALUE else json.dumps(value, ensure_ascii=False)


MISSING_VALUE = object()


def config_table(run: Run) -> list[tuple[str, str]]:
    """Every key with its value."""
    return [(key, show(value)) for key, value in sorted(run.config.items())]


def config_differences(runs: list[Run]) -> list[tuple[str, bool, list[str]]]:
    """(key, whether it alters the trained numbers, its value in each run), those that do first."""
    keys = sorted(set().union(*(run.config for run in runs)) - set(NAMES))
    rows = []
    for key in keys:
        values = [show(run.config.get(key, MISSING_VALUE)) for run in runs]
        if len(set(values)) > 1:
            rows.append((key, bool(differences({key: 0}, {key: 1})), values))
    return sorted(rows, key=lambda row: not row[1])


def with_error(value: float | None, error: float | None, sign: str = "") -> str:
    """``"0.760 ± 0.042"``, to two figures of the error; without an error the number alone."""
    if value is None or not error or not math.isfinite(error):
        return number(value, sign)
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals > MAX_DECIMALS:
        return f"{number(value, sign)} ± {error:.2g}"
    return f"{value:{sign}.{decimals}f} ± {error:.{decimals}f}"


def evaluated_names(parts: list[Part]) -> list[str]:
    """What any of ``parts`` evaluated, the total first and diversity last."""
    names = dict.fromkeys(name for part in parts for name in part.names)
    return sorted(names, key=lambda name: (name == "diversity", name != "total"))


def finals(runs: list[Run]) -> Table:
    """The last numbers of each run side by side; of a run in stages, those of its last stage."""

    def evaluated(name: str) -> list[str]:
        texts = []
        for part in (run.parts[-1] for run in runs):
            if not part.tests or part.tests[-1].value(name) is None:
                texts.append("–")
                continue
            change = part.change(name)
            after = with_error(change.after, change.after_error)
            texts.append(f"{number(change.before)} → {after}" if len(part.tests) > 1 else after)
        return texts

    def last(key: str) -> list[str]:
        return [number(run.epochs[-1].get(key)) if run.epochs else "–" for run in runs]

    names = evaluated_names([run.parts[-1] for run in runs])
    rows = [(f"eval/{name}", evaluated(name)) for name in names]
    rows += [(key, last(key)) for key in ("reward/mean", "reward/diversity", "loss/kl")]
    return rows


def timing(runs: list[Run]) -> Table:
    """Seconds by phase, speed and cost of each run; rows that no run knows are left out."""

    def total(run: Run, key: str) -> float | None:
        values = [row[key] for row in run.rows if row.get(key) is not None]
        return math.fsum(values) if values else None

    def sums(key: str) -> list[str]:
        return [number(total(run, key)) for run in runs]

    def seconds(key: str) -> list[str]:
        texts = []
        for run in runs:
            own, whole = total(run, key), total(run, "time/epoch")
            share = f" ({own / whole:.0%})" if own and whole and key != "time/eval" else ""
            texts.append("–" if own is None else f"{number(own)} s{share}")
        return texts

    def pick(key: str, choose: Callable[[list[float]], float], unit: str = "") -> list[str]:
        found = ([row[key] for row in run.rows if row.get(key) is not None] for run in runs)
        return [f"{number(choose(values))}{unit}" if values else "–" for values in found]

    phases = dict.fromkeys(
        key for run in runs for row in run.epochs for key in row if key.startswith("time/")
    )
    rows = [
        (key.removeprefix("time/").capitalize(), seconds(key))
        for key in phases
        if key not in NON_PHASE_METRICS
    ]
    rows += [
        ("All epochs", seconds("time/epoch")),
        ("Evaluations, not in the epochs", seconds("time/eval")),
        ("One epoch, median", pick("time/epoch", statistics.median, " s")),
        ("Images per second, median", pick("time/images_per_second", statistics.median)),
        ("Forward passes (cost/forwards)", sums("cost/forwards")),
        ("Backward passes (cost/backwards)", sums("cost/backwards")),
        ("Most GPU memory", pick("time/peak_memory_gb", max, " GB")),
    ]
    return [(label, texts) for label, texts in rows if set(texts) != {"–"}]


def notices(run: Run) -> list[Notice]:
    """What deserves a second look; warnings first."""
    warnings = [*_alarms(run), *_skipped(run), *_non_finite(run), *_zero_std_groups(run)]
    warnings += _diversity(run)
    warnings += [text for part in run.parts for text in _evaluations(part)]
    notes = [*_unfinished(run), *_restarts(run)]
    return [Notice(run.name, True, t) for t in warnings] + [
        Notice(run.name, False, t) for t in notes
    ]


def comparison_notices(runs: list[Run]) -> list[Notice]:
    """What makes the runs hard to compare."""
    parts = [run.parts[-1] for run in runs if run.parts[-1].tests]
    texts = []
    counts = {part.tests[-1].row.get(NUM_SAMPLES) for part in parts} - {None}
    if len({part.dataset for part in parts}) > 1 or len(counts) > 1:
        texts.append("The runs were evaluated on different test lines: eval/* does not compare.")
    if len({rewards_text(part) for part in parts}) > 1:
        texts.append("The runs have different rewards: reward/mean and eval/total do not compare.")
    return [Notice("", True, text) for text in texts]


def _skipped(run: Run) -> list[str]:
    rows = [row for row in run.epochs if row.get("optim/skipped_steps")]
    if not rows:
        return []
    count = rows[-1]["optim/skipped_steps"]
    return [
        f"{count} optimizer {'step was' if count == 1 else 'steps were'} skipped for a non-finite "
        f"gradient, the first by epoch {rows[0]['epoch']}."
    ]


def _non_finite(run: Run) -> list[str]:
    found: dict[str, list[int]] = {}
    for row in run.rows:
        for key, value in row.items():
            if value is None and key.startswith(FINITE_METRICS):
                found.setdefault(key, []).append(row["epoch"])
    return [
        f"{key} was not finite in {len(epochs)} epoch{'s' * (len(epochs) > 1)}, first {epochs[0]}."
        for key, epochs in found.items()
    ]


def _ends(run: Run, key: str) -> tuple[float, float] | None:
    """Means of ``key`` over the first and the last WINDOW epochs; None of a run too short."""
    values = [row[key] for row in run.epochs if row.get(key) is not None]
    if len(values) < 2 * WINDOW:
        return None
    return statistics.fmean(values[:WINDOW]), statistics.fmean(values[-WINDOW:])


def _zero_std_groups(run: Run) -> list[str]:
    ends = _ends(run, "reward/frac_zero_std")
    if ends is None or ends[1] < MAX_FRAC_ZERO_STD:
        return []
    return [
        f"In the last {WINDOW} epochs all images of a prompt scored the same for {ends[1]:.0%} "
        "of the prompts (reward/frac_zero_std): those teach nothing."
    ]


def _diversity(run: Run) -> list[str]:
    ends = _ends(run, "reward/diversity")
    if ends is None or ends[1] >= (1 - MAX_DIVERSITY_LOSS) * ends[0]:
        return []
    return [
        f"Images of a prompt became alike: reward/diversity fell from {number(ends[0])} to "
        f"{number(ends[1])} (means of {WINDOW} epochs)."
    ]


def _alarms(run: Run) -> list[str]:
    rows = [row for row in run.rows if row.get("monitor/alarms")]
    if not rows:
        return []
    factor = rows[-1]["monitor/kl_factor"]
    raised = f"; the KL term's weight was raised {factor:g} times" if factor > 1 else ""
    which = [name.removeprefix(ALARM) for name in rows[0] if name.startswith(ALARM)]
    first = ", ".join(name for name in which if rows[0][ALARM + name])
    return [
        f"{rows[-1]['monitor/alarms']:g} alarm(s) of the monitor, the first, of "
        f"{first or 'what the run printed'}, in epoch {rows[0]['epoch']}{raised}."
    ]


def _evaluations(part: Part) -> list[str]:
    if len(part.tests) < 2:
        return []
    where = f"{part.title}: " if part.title else ""
    texts = []
    for name in part.names:
        change = part.change(name)
        if change.direction == "down" and not is_image_statistic(name):
            kind = "held-out " if part.is_held_out(name) else ""
            gain = with_error(change.gain, change.gain_error)
            texts.append(f"{where}{kind}eval/{name} fell by training: {gain}.")
    known = [test for test in part.tests if test.value("total") is not None]
    best = max(known, key=lambda test: test.row["eval/total"], default=None)
    last = part.tests[-1].value("total")
    if best and last is not None and best.row["eval/total"] > last:
        texts.append(
            f"{where}the best eval/total, {number(best.value('total'))}, was at epoch "
            f"{best.epoch}, not at the end ({number(last)})."
        )
    return texts


def _unfinished(run: Run) -> list[str]:
    if run.finished:
        return []
    return [f"Not finished: {run.done:,} of {run.planned:,} epochs."]


def _restarts(run: Run) -> list[str]:
    """Restarts, and what was not the same in all starts."""
    texts = []
    if len(run.starts) > 1:
        texts.append(f"Started {len(run.starts)} times.")
    for key in ("git_revision", "torch", "device", "world_size"):
        values = dict.fromkeys(str(start.get(key)) for start in run.starts)
        if len(values) > 1:
            texts.append(f"{key} changed between starts: {' → '.join(values)}.")
    if any(start.get("git_dirty") for start in run.starts):
        texts.append("Started from a working tree with changes that are not committed.")
    return texts


def start_row(start: Row) -> list[str]:
    """Time, device, processes, versions, revision and command of a start."""
    revision = str(start.get("git_revision") or "–")[:10]
    return [
        str(start.get("time", "–")),
        str(start.get("device", "–")),
        str(start.get("world_size", "–")),
        f"{start.get('python', '–')} / {start.get('torch', '–')}",
        f"{revision}{' + changes' if start.get('git_dirty') else ''}",
        str(start.get("command", "–")),
    ]
