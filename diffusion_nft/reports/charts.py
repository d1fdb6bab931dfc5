"""Charts of a report: scales, ticks and texts.  page.html draws them as SVG."""

import json
import math
from dataclasses import dataclass
from functools import cached_property

# Maximum number of points of a curve; longer curves are averaged over equal intervals.
MAX_POINTS = 400
# Minimum span of the y axis, as a share of its largest value.
MIN_RANGE = 0.2
# SVG units: size of a chart, and edges of its plot.
WIDTH, HEIGHT = 420.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 406.0, 10.0, 196.0
# SVG units: width of the longest bar, heights of a group title, a bar and a gap.
BAR_WIDTH = 356.0
TITLE, BAR_HEIGHT, GAP = 18, 13, 10

# (x, y, standard error of y); y is None in a gap.
Point = tuple[float, float | None, float | None]


def number(value: float | None, sign: str = "") -> str:
    """``value`` with three or four significant digits, or as an integer; "–" for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    size = abs(value)
    if isinstance(value, int) or 1e4 <= size < 1e15:
        return f"{value:{sign},.0f}"
    if 1e-3 <= size < 10:
        return f"{value:{sign}.{3 if size >= 0.0995 else 4}f}"
    return f"{value:{sign}.4g}"


def thin(points: list[Point]) -> list[Point]:
    """``points``, averaged over equal intervals if there are more than MAX_POINTS."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points
    thinned: list[Point] = []
    for start in range(0, len(points), size):
        interval = points[start : start + size]
        values = [y for _, y, _ in interval if y is not None]
        y = math.fsum(values) / len(values) if values else None
        thinned.append((math.fsum(x for x, _, _ in interval) / len(interval), y, None))
    return thinned


def ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
    """About ``count`` round numbers from ``low`` to ``high`` with their texts."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.85)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    values = [i * step for i in range(first, last + 1)]
    if step < 1e-4 or max(map(abs, values), default=0.0) >= 1e5:
        return [(value, f"{value:.3g}") for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(value, f"{value + 0.0:.{decimals}f}") for value in values]


def limits(values: list[float]) -> tuple[float, float]:
    """Axis limits for ``values`` with a margin, from zero if close, at least MIN_RANGE wide."""
    low, high = min(values), max(values)
    if 0 <= low < high / 2:
        return 0.0, high * 1.05
    narrowest = MIN_RANGE * max(abs(low), abs(high)) or 1.0
    room = max((high - low) * 0.08, (narrowest - (high - low)) / 2)
    return low - room, high + room


@dataclass(frozen=True)
class Curve:
    """A named curve; ``colour`` is an index of colours and dashes."""

    colour: int
    name: str
    points: list[Point]

    @cached_property
    def known(self) -> list[tuple[float, float, float]]:
        """The points with a y; unknown errors are 0."""
        return [(x, y, error or 0.0) for x, y, error in self.points if y is not None]

    def summary(self, x_label: str) -> str:
        (x0, y0, _), (x1, y1, _) = self.known[0], self.known[-1]
        text = f"{number(y0)} at {x_label} {x0:,.7g}"
        if x1 != x0:
            text = f"from {text} to {number(y1)} at {x_label} {x1:,.7g}"
        return f"{self.name} {text}"


@dataclass(frozen=True)
class Chart:
    """Curves over a common x, each with at least one known point.

    ``at_x`` and ``at_y`` return SVG coordinates, ``summary`` the text for screen readers.
    """

    title: str
    curves: list[Curve]
    note: str = ""
    x_label: str = "epoch"
    marks: tuple[float, ...] = ()  # x of vertical lines
    dots: bool = False  # mark every point, with its error

    @cached_property
    def x_range(self) -> tuple[float, float]:
        xs = [x for curve in self.curves for x, _, _ in curve.known]
        low, high = min(xs), max(xs)
        return (low, high) if low < high else (low - 0.5, high + 0.5)

    @cached_property
    def y_range(self) -> tuple[float, float]:
        known = [point for curve in self.curves for point in curve.known]
        return limits([end for _, y, error in known for end in (y - error, y + error)])

    def at_x(self, x: float) -> float:
        low, high = self.x_range
        return round(LEFT + (x - low) / (high - low) * (RIGHT - LEFT), 1)

    def at_y(self, y: float) -> float:
        low, high = self.y_range
        return round(TOP + (high - y) / (high - low) * (BOTTOM - TOP), 1)

    @property
    def x_ticks(self) -> list[tuple[float, str]]:
        """Ticks of the x axis; integers only for epochs."""
        found = ticks(*self.x_range)
        return [tick for tick in found if self.x_label != "epoch" or tick[0] == round(tick[0])]

    @property
    def y_ticks(self) -> list[tuple[float, str]]:
        return ticks(*self.y_range)

    def path(self, curve: Curve) -> str:
        """SVG path of ``curve``, interrupted at gaps."""
        steps, pen = [], "M"
        for x, y, _ in curve.points:
            if y is not None:
                steps.append(f"{pen}{self.at_x(x)} {self.at_y(y)}")
            pen = "M" if y is None else "L"
        return "".join(steps)

    def dotted(self, curve: Curve) -> list[tuple[float, float, float]]:
        """Points of ``curve`` to mark with a dot, including a single one without a line."""
        return curve.known if self.dots or len(curve.known) == 1 else []

    @property
    def summary(self) -> str:
        return "; ".join(curve.summary(self.x_label) for curve in self.curves)

    @property
    def data(self) -> str:
        """JSON for page.js; numbers have five significant digits."""
        data = {
            "box": [LEFT, TOP, RIGHT, BOTTOM],
            "range": self.x_range,
            "x": self.x_label,
            "curves": [
                {
                    "name": curve.name,
                    "points": [[float(f"{v:.5g}") for v in point] for point in curve.known],
                }
                for curve in self.curves
            ],
        }
        return json.dumps(data, separators=(",", ":"))


@dataclass(frozen=True)
class Bars:
    """Horizontal bars: one per series in each group; methods as in ``Chart``."""

    title: str
    groups: list[str]
    # (colour, name, (value, standard error) by group)
    series: list[tuple[int, str, list[tuple[float | None, float | None]]]]

    def at_y(self, group: int, bar: int = 0) -> int:
        """SVG coordinate of the top of a bar, by indices."""
        return group * (TITLE + BAR_HEIGHT * len(self.series) + GAP) + TITLE + BAR_HEIGHT * bar

    @cached_property
    def _range(self) -> tuple[float, float]:
        known = [(v, e or 0.0) for _, _, pairs in self.series for v, e in pairs if v is not None]
        ends = [0.0, *(end for value, error in known for end in (value - error, value + error))]
        return min(ends), max(ends)

    def at_x(self, value: float) -> float:
        low, high = self._range
        return round((value - low) / ((high - low) or 1.0) * BAR_WIDTH, 1)

    @property
    def summary(self) -> str:
        return "; ".join(
            f"{group}: " + ", ".join(f"{name} {number(ps[i][0])}" for _, name, ps in self.series)
            for i, group in enumerate(self.groups)
        )
