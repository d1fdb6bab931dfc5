"""The HTML page of a report."""

import base64
import hashlib
import io
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

import diffusion_nft.reports.facts as facts
from diffusion_nft.reports.charts import Bars, Chart, Curve, Point, number, thin
from diffusion_nft.reports.runs import Part, Run, Test, sorted_names

HERE = Path(__file__).resolve().parent
# Images with more bytes are converted to WebP with at most this size in pixels.
MAX_BYTES, MAX_WIDTH, MAX_HEIGHT, QUALITY = 200_000, 1600, 16_000, 82
# Maximum number of prompts in the lists of largest gains and losses, and in the full list.
ENDS, MAX_PROMPTS = 10, 300
# Colour index of values before training.
BEFORE_COLOUR = -1
# Curves shown first, with notes; all others are folded.
TRAINING = {
    "reward/mean": "of the epoch's samples",
    "loss/policy": "",
    "loss/kl": "squared distance to the base model",
    "optim/grad_norm": "before clipping",
    "reward/diversity": "0: identical images",
    "reward/frac_zero_std": "share of prompts without signal",
    "optim/learning_rate": "",
    "optim/old_policy_decay": "0: copy of the policy",
}
COST = {
    "time/epoch": "training time, s",
    "cost/forwards": "forward passes (without backward passes)",
}


def figure(path: Path) -> dict[str, Any]:
    """Template values of an image, converted if large, with its captions if they are truncated."""
    data, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        if len(data) > MAX_BYTES:
            scale = min(1.0, MAX_WIDTH / width, MAX_HEIGHT / height)
            width, height = max(1, round(width * scale)), max(1, round(height * scale))
            smaller = io.BytesIO()
            image.convert("RGB").resize((width, height)).save(smaller, "WEBP", quality=QUALITY)
            data, kind = smaller.getvalue(), "webp"
    captions = path.with_suffix(".txt")
    texts = captions.read_text("utf-8", "replace").splitlines() if captions.is_file() else []
    return {
        "source": f"data:image/{kind};base64,{base64.b64encode(data).decode()}",
        "width": width,
        "height": height,
        "captions": texts,
    }


def cards(part: Part) -> list[dict[str, Any]]:
    """Template values of the first and last evaluation of a part."""
    found = []
    for name in part.names:
        change = part.change(name)
        card = {"name": name, "held_out": part.is_held_out(name), "direction": change.direction}
        card["after"] = facts.with_error(change.after)
        if len(part.tests) > 1:
            card["before"] = facts.with_error(change.before)
            card["gain"] = facts.with_error(change.gain, "+")
        found.append(card)
    return found


def _join(pieces: Iterable[list[Point]]) -> list[Point]:
    """The points of all stages, with gaps in between."""
    points: list[Point] = []
    for piece in pieces:
        if points and piece:
            points.append((piece[0][0], None, None))
        points += piece
    return points


def evaluation_curve(run: Run, name: str, cost: str = "") -> Curve:
    """``eval/name`` with standard errors over epochs, or over the cumulative ``cost``."""

    def at(epoch: int) -> float:
        if not cost:
            return float(epoch)
        return sum(row.get(cost) or 0.0 for row in run.epochs if row["epoch"] <= epoch)

    pieces = (
        [(at(test.row["epoch"]), *test.score(name)) for test in part.tests] for part in run.parts
    )
    return Curve(run.colour, run.name, _join(pieces))


def training_curve(run: Run, key: str) -> Curve:
    pieces = []
    for part in run.parts:
        rows = [row for row in run.epochs if row.get("stage", 0) == part.number and key in row]
        pieces.append(thin([(float(row["epoch"]), row[key], None) for row in rows]))
    return Curve(run.colour, run.name, _join(pieces))


def _stage_ends(runs: list[Run]) -> tuple[float, ...]:
    """Last epochs of all stages but the last; none for several runs."""
    if len(runs) > 1:
        return ()
    numbers = [part.number for part in runs[0].parts[:-1]]
    ends = ([row["epoch"] for row in runs[0].epochs if row.get("stage") == n] for n in numbers)
    return tuple(float(max(epochs)) for epochs in ends if epochs)


def _chart(title: str, curves: list[Curve], **options: Any) -> list[Chart]:
    """The chart of the ``curves`` with known points; empty if there are none."""
    known = [curve for curve in curves if curve.known]
    return [Chart(title, known, **options)] if known else []


def evaluation_charts(runs: list[Run]) -> list[Chart]:
    """One chart per evaluated score; for several runs, also of the total over cost."""
    parts = [part for run in runs for part in run.parts]
    found = []
    for name in sorted_names(name for part in parts for name in part.names):
        curves = [evaluation_curve(run, name) for run in runs]
        note = "held out" if any(part.is_held_out(name) for part in parts) else ""
        found += _chart(f"eval/{name}", curves, note=note, marks=_stage_ends(runs), dots=True)
    for key, label in COST.items() if len(runs) > 1 else ():
        curves = [
            evaluation_curve(run, "total", key)
            for run in runs
            if run.epochs and all(key in row for row in run.epochs)
        ]
        found += _chart(f"eval/total by {label}", curves, x_label=label, dots=True)
    return found


def training_charts(runs: list[Run]) -> tuple[list[Chart], list[Chart]]:
    """The charts shown first, and all others."""
    logged = {
        key
        for run in runs
        for row in run.epochs
        for key, value in row.items()
        if "/" in key and isinstance(value, int | float)
    }
    first, others = [], []
    for key in [*TRAINING, *sorted(logged - TRAINING.keys())]:
        curves = [training_curve(run, key) for run in runs]
        chart = _chart(key, curves, note=TRAINING.get(key, ""), marks=_stage_ends(runs))
        (first if key in TRAINING else others).extend(chart)
    return first, others


def tag_bars(runs: list[Run]) -> list[tuple[str, list[Bars]]]:
    """(heading, charts by tag): before and after each stage of a single run, or the final scores of
    several runs.
    """
    if len(runs) > 1:
        last = [(run, run.parts[-1]) for run in runs]
        ends = [(run.colour, run.name, part.tests[-1]) for run, part in last if part.tests]
        found = [("", _bars([part for _, part in last], ends))]
    else:
        found = []
        for part in runs[0].parts:
            before = [(BEFORE_COLOUR, "before", test) for test in part.tests[:-1][:1]]
            after = [(0, "after", test) for test in part.tests[-1:]]
            found.append((part.title, _bars([part], before + after)))
    return [(heading, charts) for heading, charts in found if charts]


def _bars(parts: list[Part], tests: list[tuple[int, str, Test]]) -> list[Bars]:
    """One chart per score by tag; ``tests``: (colour, name, test)."""
    tags, found = sorted({tag for part in parts for tag in part.tags}), []
    for name in sorted_names(name for part in parts for name in part.names):
        series = [
            (colour, side, [test.score(name, tag) for tag in tags]) for colour, side, test in tests
        ]
        # Diversity and the total are not evaluated by tag.
        if any(value is not None for _, _, scores in series for value, _ in scores):
            found.append(Bars(f"eval/{name}", tags, series))
    return found


def prompts(part: Part) -> dict[str, Any]:
    """Template values of the prompts with the largest gains and losses, and of all prompts."""
    rows = [
        (prompt, count, number(before), number(after), number(after - before, "+"))
        for prompt, before, after, count in part.by_prompt
    ]
    gained = sum(after > before for _, before, after, _ in part.by_prompt)
    lost = sum(after < before for _, before, after, _ in part.by_prompt)
    return {
        "gained": gained,
        "lost": lost,
        "ends": rows[: min(ENDS, gained)] + rows[len(rows) - min(ENDS, lost) :],
        "all": rows[:MAX_PROMPTS],
        "count": len(rows),
    }


def page(runs: list[Run]) -> str:
    """The report on one or several runs as a self-contained HTML page.

    All text from the runs is escaped, and the security policy of the page allows no requests and
    only the script of the page.  Raises OSError if an image cannot be read.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    training, others = training_charts(runs)
    return environment.get_template("page.html").render(
        title=" · ".join(run.name for run in runs),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        runs=runs,
        several=len(runs) > 1,
        facts=facts,
        cards=cards,
        prompts=prompts,
        figure=figure,
        number=number,
        before=BEFORE_COLOUR,
        evaluation=evaluation_charts(runs),
        training=training,
        others=others,
        tags=tag_bars(runs),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
