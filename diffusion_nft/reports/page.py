"""Puts a report together: runs in, one HTML page out."""

import base64
import hashlib
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

import diffusion_nft.reports.facts as facts
from diffusion_nft.reports.charts import Bars, Chart, Curve, Point, bars, chart, number, thin
from diffusion_nft.reports.runs import Part, Run

HERE = Path(__file__).resolve().parent
TEMPLATE, STYLE, SCRIPT = "page.html", "page.css", "page.js"
# Images of more bytes are encoded again as WebP, no wider than this many pixels, nor higher than
# WebP can hold.
MAX_BYTES, MAX_WIDTH, MAX_HEIGHT, QUALITY = 200_000, 1600, 16_000, 82
# Prompts that are listed at either end, and at most in all.
ENDS, MOST_PROMPTS = 10, 300
# The colour of what was before training, among bars of after.
BEFORE_COLOUR = -1
# Curves that a reader looks at first, with what they mean; all others are folded away.
TRAINING = {
    "reward/mean": "of the epoch's samples",
    "loss/policy": "",
    "loss/kl": "squared distance to the base model",
    "optim/grad_norm": "before clipping",
    "reward/diversity": "0: all look the same",
    "reward/frac_zero_std": "of prompts: no signal",
    "optim/learning_rate": "",
    "optim/old_policy_decay": "0: follows at once",
}
COST = {
    "time/epoch": "training time, s",
    "cost/forwards": "forward passes (those back are not counted)",
}


@dataclass(frozen=True)
class Figure:
    """An image inside the page."""

    heading: str
    alt: str
    source: str  # a data: address
    width: int
    height: int
    captions: list[str]  # those that the image does not show in full, and all others with them


@dataclass(frozen=True)
class Card:
    """A headline number."""

    name: str
    held_out: bool
    before: str
    after: str
    gain: str
    direction: str  # as Change.direction


def figure(path: Path, heading: str, alt: str) -> Figure:
    """The image in ``path``, encoded again if it is large, and the captions beside it."""
    data, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as image:
        size = image.size
        if len(data) > MAX_BYTES:
            scale = min(1.0, MAX_WIDTH / image.width, MAX_HEIGHT / image.height)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            smaller = io.BytesIO()
            image.convert("RGB").resize(size).save(smaller, format="WEBP", quality=QUALITY)
            data, kind = smaller.getvalue(), "webp"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    beside = path.with_suffix(".txt")
    captions = beside.read_text("utf-8", "replace").splitlines() if beside.is_file() else []
    return Figure(heading, alt, source, *size, captions)


def cards(part: Part) -> list[Card]:
    """The headline numbers of a part: first and last evaluation."""
    found = []
    for name in part.names if part.tests else []:
        change = part.change(name)
        twice = len(part.tests) > 1
        found.append(
            Card(
                name,
                part.is_held_out(name),
                facts.with_error(change.before, change.before_error) if twice else "",
                facts.with_error(change.after, change.after_error),
                facts.with_error(change.gain, change.gain_error, "+") if twice else "",
                change.direction,
            )
        )
    return found


def _joined(pieces: Iterator[list[Point]] | list[list[Point]]) -> list[Point]:
    """The points of all stages, with a gap between one stage and the next."""
    points: list[Point] = []
    for piece in pieces:
        if points and piece:
            points.append((piece[0][0], None, None))
        points += piece
    return points


def evaluation_curve(run: Run, colour: int, name: str, cost: str = "") -> Curve:
    """``eval/name`` with its standard errors over epochs, or over the sum of ``cost`` so far."""

    def at(epoch: int) -> float:
        if not cost:
            return float(epoch)
        return sum(row.get(cost) or 0.0 for row in run.epochs if row["epoch"] <= epoch)

    pieces = (
        [(at(test.epoch), test.value(name), test.error(name)) for test in part.tests]
        for part in run.parts
    )
    return Curve(colour, run.name, _joined(pieces))


def training_curve(run: Run, colour: int, key: str) -> Curve:
    """A metric of training over epochs."""
    pieces = []
    for part in run.parts:
        rows = [row for row in run.epochs if row.get("stage", 0) == part.number and key in row]
        pieces.append(thin([(float(row["epoch"]), row[key], None) for row in rows]))
    return Curve(colour, run.name, _joined(pieces))


def _stage_ends(runs: list[Run]) -> list[float]:
    """Where a stage ends and another begins, if there is one run only: the stages of several would
    not agree.
    """
    if len(runs) > 1:
        return []
    numbers = [part.number for part in runs[0].parts[:-1]]
    ends = ([row["epoch"] for row in runs[0].epochs if row.get("stage") == n] for n in numbers)
    return [float(max(epochs)) for epochs in ends if epochs]


def evaluation_charts(runs: list[Run]) -> list[Chart]:
    """A chart of everything that is evaluated; of several runs the total also against cost."""
    parts = [part for run in runs for part in run.parts]
    names = facts.evaluated_names(parts)
    held_out = {name for name in names if any(part.is_held_out(name) for part in parts)}
    found = [
        chart(
            f"eval/{name}",
            [evaluation_curve(run, i, name) for i, run in enumerate(runs)],
            note="held out" if name in held_out else "",
            marks=_stage_ends(runs),
            dots=True,
        )
        for name in names
    ]
    if len(runs) > 1:
        for key, label in COST.items():
            known = [
                (i, run)
                for i, run in enumerate(runs)
                if run.epochs and all(key in row for row in run.epochs)
            ]
            curves = [evaluation_curve(run, i, "total", key) for i, run in known]
            found.append(chart(f"eval/total by {label}", curves, x_label=label, dots=True))
    return [one for one in found if one]


def training_charts(runs: list[Run]) -> tuple[list[Chart], list[Chart]]:
    """The charts to look at first, and all others."""
    logged = dict.fromkeys(
        key
        for run in runs
        for row in run.epochs
        for key, value in row.items()
        if "/" in key and isinstance(value, int | float)
    )

    def draw(key: str) -> Chart | None:
        curves = [training_curve(run, i, key) for i, run in enumerate(runs)]
        return chart(key, curves, note=TRAINING.get(key, ""), marks=_stage_ends(runs))

    first = [draw(key) for key in TRAINING if key in logged]
    others = [draw(key) for key in sorted(logged) if key not in TRAINING]
    return [one for one in first if one], [one for one in others if one]


def tag_bars(runs: list[Run]) -> list[tuple[str, list[Bars]]]:
    """(heading, charts by tag): before and after of each stage of one run; after, of several."""
    if len(runs) == 1:
        found = []
        for part in runs[0].parts:
            sides = [(0, "after", part.tests[-1:])]
            if len(part.tests) > 1:
                sides.insert(0, (BEFORE_COLOUR, "before", part.tests[:1]))
            found.append((part.title, _bars(part.names, part.tags, sides)))
        return [(heading, charts) for heading, charts in found if charts]
    last = [run.parts[-1] for run in runs]
    names = facts.evaluated_names(last)
    tags = sorted({tag for part in last for tag in part.tags})
    sides = [(i, runs[i].name, part.tests[-1:]) for i, part in enumerate(last)]
    charts = _bars(names, tags, sides)
    return [("", charts)] if charts else []


def _bars(names: list[str], tags: list[str], sides: list[tuple[int, str, list]]) -> list[Bars]:
    found = []
    for name in names if tags else []:
        series = [
            (colour, side, [(test.value(name, tag), test.error(name, tag)) for tag in tags])
            for colour, side, tests in sides
            for test in tests
        ]
        # Diversity and the total are not known by tag.
        if any(value is not None for _, _, pairs in series for value, _ in pairs):
            found.append(bars(f"eval/{name}", tags, series))
    return found


def _before_after(run: Run) -> list[Figure]:
    alt = (
        "Test prompts drawn by the base model and by the trained model from the same noise, side "
        "by side, each pair with its two scores and its prompt"
    )
    return [figure(part.image, part.title, alt) for part in run.parts if part.image.is_file()]


def _samples(run: Run) -> list[Figure]:
    found = []
    for path in run.training_images:
        epoch = int(path.stem.removeprefix("train-"))
        alt = f"Samples that epoch {epoch} was trained on, each with its score and its prompt"
        found.append(figure(path, f"Epoch {epoch}", alt))
    return found


def _prompts(part: Part) -> dict[str, Any] | None:
    """The prompts that gained and lost most, and all of them."""
    found = [
        (prompt, number(before), number(after), after - before, count)
        for prompt, before, after, count in part.by_prompt()
    ]
    rows = [(*row[:3], number(row[3], "+" if row[3] else ""), row[4]) for row in found]
    gained = sum(row[3] > 0 for row in found)
    lost = sum(row[3] < 0 for row in found)
    if not rows:
        return None
    return {
        "title": part.title,
        "gained": gained,
        "lost": lost,
        "ends": rows[: min(ENDS, gained)] + rows[len(rows) - min(ENDS, lost) :],
        "all": rows[:MOST_PROMPTS],
        "count": len(rows),
    }


def _view(run: Run, colour: int) -> dict[str, Any]:
    """What the template shows of one run."""
    return {
        "name": run.name,
        "path": str(run.path),
        "colour": colour,
        "finished": run.finished,
        "summary": facts.summary(run),
        "parts": [(part, cards(part)) for part in run.parts],
        "notices": facts.notices(run),
        "before_after": _before_after(run),
        "prompts": [found for part in run.parts if (found := _prompts(part))],
        "samples": _samples(run),
        "starts": [facts.start_row(start) for start in run.starts],
        "environment": sorted(run.starts[-1].items()) if run.starts else [],
        "config": facts.config_table(run),
    }


def page(runs: list[Run]) -> str:
    """The report on one or several runs as HTML that needs nothing else.

    Everything from the runs is escaped, and the page's policy lets the browser load nothing and run
    no other script than its own.  Raises OSError if an image cannot be read.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (HERE / SCRIPT).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    first, others = training_charts(runs)
    return environment.get_template(TEMPLATE).render(
        title=" · ".join(run.name for run in runs),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        style=Markup((HERE / STYLE).read_text(encoding="utf-8")),
        script=Markup(script),
        runs=[_view(run, i) for i, run in enumerate(runs)],
        several=len(runs) > 1,
        before=BEFORE_COLOUR,
        differences=facts.config_differences(runs),
        warnings=facts.comparison_notices(runs),
        finals=facts.finals(runs),
        evaluation=evaluation_charts(runs),
        training=first,
        others=others,
        tags=tag_bars(runs),
        timing=facts.timing(runs),
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    )
