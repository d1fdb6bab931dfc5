"""Geometry of the charts in a report: curves and bars as numbers that a template can draw."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

# Kept of a longer curve, as means of equal stretches: more than the pixels of a chart can show.
MAX_POINTS = 400
# The y axis spans at least this share of its largest value.
MIN_RELATIVE_RANGE = 0.2
WIDTH, HEIGHT = 420.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 14.0, 10.0, 34.0
# In bars: the tag's name above, then a bar for each series.
BAR_HEIGHT, NAME_HEIGHT, GAP = 13.0, 18.0, 10.0
VALUE_WIDTH = 64.0  # right of the bars, for the number

# (x, y, standard error of y); no y is a gap.
Point = tuple[float, float | None, float | None]


@dataclass(frozen=True)
class Curve:
    """A named curve; ``number`` chooses its colour and dashes."""

    number: int
    name: str
    points: list[Point]

    @property
    def known(self) -> list[tuple[float, float, float]]:
        """The points that have a y; an unknown error is 0."""
        return [(x, y, error or 0.0) for x, y, error in self.points if y is not None]


@dataclass(frozen=True)
class Drawn:
    """A curve in the chart's coordinates."""

    number: int
    name: str
    path: str
    dots: list[tuple[float, float]]
    whiskers: list[tuple[float, float, float]]  # (x, top, bottom)


@dataclass(frozen=True)
class Chart:
    """A chart of curves, ready to draw; ``data`` is what the inline script reads."""

    title: str
    note: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[Drawn]
    marks: list[float]
    summary: str
    data: str


@dataclass(frozen=True)
class Bar:
    """One bar, from the zero line to its value, in the chart's coordinates."""

    number: int
    name: str
    x: float
    y: float
    width: float
    text: str
    whisker: tuple[float, float] | None


@dataclass(frozen=True)
class Bars:
    """Groups of horizontal bars."""

    title: str
    zero: float
    height: float
    groups: list[tuple[str, float, list[Bar]]]  # (name, its baseline, bars)
    summary: str


def number(value: float | None, sign: str = "") -> str:
    """``value`` in three or four figures or as a whole number; "–" for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if value == int(value) and abs(value) < 1e15 and (isinstance(value, int) or abs(value) >= 1e4):
        return f"{int(value):{sign},}"
    size = abs(value)
    if size >= 1e9 or size < 1e-3:
        return f"{value:{sign}.3g}"
    if size >= 10:
        return f"{value:{sign},.0f}" if size >= 1e4 else f"{value:{sign}.4g}"
    return f"{value:{sign}.3f}" if size >= 0.0995 else f"{value:{sign}.4f}"


def thin(points: list[Point]) -> list[Point]:
    """At most MAX_POINTS points: means over equal stretches of a longer curve, without errors."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / MAX_POINTS)
    thinned: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        values = [y for _, y, _ in stretch if y is not None]
        y = math.fsum(values) / len(values) if values else None
        thinned.append((math.fsum(x for x, _, _ in stretch) / len(stretch), y, None))
    return thinned


def ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """About ``count`` round numbers from ``low`` to ``high``, which is higher, and their texts."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.85)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    values = [i * step for i in range(first, last + 1)]
    if step < 1e-4 or max(map(abs, values), default=0.0) >= 1e5:
        return [(value, f"{value:.3g}") for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(value, f"{value + 0.0:.{decimals}f}") for value in values]


def limits(values: Sequence[float]) -> tuple[float, float]:
    """A range around ``values``, with room; it begins at zero where that is not far away, and is
    not so narrow that a small change looks large.
    """
    low, high = min(values), max(values)
    if 0 <= low < high / 2:
        return 0.0, high * 1.05
    narrowest = MIN_RELATIVE_RANGE * max(abs(low), abs(high)) or 1.0
    room = max((high - low) * 0.08, (narrowest - (high - low)) / 2)
    return low - room, high + room


def chart(
    title: str,
    curves: list[Curve],
    *,
    note: str = "",
    x_label: str = "epoch",
    marks: Sequence[float] = (),
    dots: bool = False,
) -> Chart | None:
    """The chart of ``curves``; None if none of them has a known point.

    ``marks`` are x of vertical lines; ``dots`` marks every point, with its error.
    """
    curves = [curve for curve in curves if curve.known]
    if not curves:
        return None
    known = [point for curve in curves for point in curve.known]
    x_low, x_high = min(x for x, _, _ in known), max(x for x, _, _ in known)
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = limits([y + side * error for _, y, error in known for side in (-1, 1)])

    def at_x(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def at_y(y: float) -> float:
        return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    def draw(curve: Curve) -> Drawn:
        path, pen = [], "M"
        for x, y, _ in curve.points:
            if y is not None:
                path.append(f"{pen}{at_x(x):.1f} {at_y(y):.1f}")
            pen = "M" if y is None else "L"
        # A point alone is no line: a dot shows it.
        shown = curve.known if dots or len(curve.known) == 1 else []
        return Drawn(
            curve.number,
            curve.name,
            "".join(path),
            [(at_x(x), at_y(y)) for x, y, _ in shown],
            [(at_x(x), at_y(y + error), at_y(y - error)) for x, y, error in shown if error],
        )

    data = {
        "box": [LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM],
        "range": [x_low, x_high, y_low, y_high],
        "x": x_label,
        "curves": [
            {
                "n": curve.number,
                "name": curve.name,
                "points": [[_short(v) for v in point] for point in curve.known],
            }
            for curve in curves
        ],
    }
    return Chart(
        title,
        note,
        x_label,
        [(at_x(value), text) for value, text in ticks(x_low, x_high, 5) if _whole(value, x_label)],
        [(at_y(value), text) for value, text in ticks(y_low, y_high, 5)],
        [draw(curve) for curve in curves],
        [at_x(mark) for mark in marks if x_low < mark < x_high],
        "; ".join(_said(curve, x_label) for curve in curves),
        json.dumps(data, separators=(",", ":")),
    )


def _whole(value: float, x_label: str) -> bool:
    return x_label != "epoch" or value == round(value)


def _short(value: float) -> float:
    """Five figures: what hovering shows, in few bytes."""
    return float(f"{value:.5g}")


def _said(curve: Curve, x_label: str) -> str:
    (x0, y0, _), (x1, y1, _) = curve.known[0], curve.known[-1]
    ends = f"{number(y0)} at {x_label} {number(x0)}"
    if x1 != x0:
        ends = f"from {ends} to {number(y1)} at {x_label} {number(x1)}"
    return f"{curve.name} {ends}"


def bars(
    title: str,
    groups: list[str],
    series: list[tuple[int, str, list[tuple[float | None, float | None]]]],
) -> Bars:
    """A bar of each of ``series`` in each of ``groups``.

    ``series``: (number of its colour, name, (value, standard error) of each group).
    """
    known = [(v, error or 0.0) for _, _, pairs in series for v, error in pairs if v is not None]
    ends = [v + side * error for v, error in known for side in (-1, 1)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    scale = (WIDTH - VALUE_WIDTH) / ((high - low) or 1.0)
    drawn, y = [], 0.0
    for i, group in enumerate(groups):
        baseline, y = y + NAME_HEIGHT - 5, y + NAME_HEIGHT
        members = []
        for colour, name, pairs in series:
            value, error = pairs[i]
            width = abs(value or 0.0) * scale
            start = (min(value or 0.0, 0.0) - low) * scale
            whisker = None
            if value is not None and error:
                whisker = ((value - error - low) * scale, (value + error - low) * scale)
            members.append(Bar(colour, name, start, y, width, number(value), whisker))
            y += BAR_HEIGHT
        drawn.append((group, baseline, members))
        y += GAP
    said = (
        f"{group}: " + ", ".join(f"{bar.name} {bar.text}" for bar in members)
        for group, _, members in drawn
    )
    return Bars(title, -low * scale, y, drawn, "; ".join(said))
