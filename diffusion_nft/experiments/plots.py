"""Figures of experiments: strict accuracy and other metrics."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_nft.experiments.comparison import (
    ACCURACY,
    COST,
    SECONDS,
    Result,
    Results,
    mean_and_half_width,
)
from diffusion_nft.experiments.tables import watched
from diffusion_nft.rewards import IMAGE_STATISTICS

AXES = {COST: "training compute, forward-equivalents", SECONDS: "training time, s"}
# The colour-blind safe palette of Okabe and Ito.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":")  # by repetition of the colours
MAX_VARIANTS_WITH_RUNS = 3  # with more variants, single runs are not drawn


def curve(results: dict[int, Result], key: str) -> tuple[list[float], list[float], list[float]]:
    """Mean of ``key``, mean of strict accuracy, and half-width of the interval of its gain, at each
    evaluation.
    """
    runs = [result.evaluations for result in results.values()]
    x, accuracies = (
        np.array([[row[name] for row in rows] for rows in runs]) for name in (key, ACCURACY)
    )
    gains = accuracies - accuracies[:, :1]
    halves = [mean_and_half_width(column)[1] for column in gains.T.tolist()]
    return x.mean(0).tolist(), accuracies.mean(0).tolist(), halves


def draw(results: Results, path: Path) -> None:
    """Plots strict accuracy against compute and time.  Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, (key, label) in zip(panels, AXES.items(), strict=True):
        for number, (variant, seeds) in enumerate(results.items()):
            x, means, halves = curve(seeds, key)
            low, high = np.clip([np.subtract(means, halves), np.add(means, halves)], 0, 1)
            style = _style(number)
            panel.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
            text = f"{variant} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"
            marker = MARKERS[number % len(MARKERS)]
            panel.plot(x, means, **style, marker=marker, markersize=5, label=text)
        panel.set_xlim(left=0)
        _finish(panel, label)
    panels[0].set_ylabel("held-out strict accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    figure.savefig(path, dpi=150)


def draw_watched(results: Results, path: Path) -> None:
    """Plots each watched metric against compute: the mean over seeds, and with few variants also
    the single runs as thin lines.  Raises ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    names, columns = watched(results), 4
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(10.5, 2.6 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel in panels[len(names) :]:
        panel.remove()
    for name, panel in zip(names, panels, strict=False):
        for number, (variant, seeds) in enumerate(results.items()):
            style = _style(number)
            by_epoch: dict[int, list[tuple[float, float]]] = defaultdict(list)
            for result in seeds.values():
                rows = [row for row in result.rows if row.get(name) is not None]
                points = [(row[COST], row[name]) for row in rows]
                if points and len(results) <= MAX_VARIANTS_WITH_RUNS:
                    thin = {"color": style["color"], "alpha": 0.35, "linewidth": 0.7}
                    panel.plot(*zip(*points, strict=True), **thin)
                for row, point in zip(rows, points, strict=True):
                    by_epoch[row["epoch"]].append(point)
            means = [np.mean(by_epoch[epoch], axis=0) for epoch in sorted(by_epoch)]
            panel.plot(*np.reshape(means, (-1, 2)).T, **style, linewidth=1.6, label=variant)
        brightness = " (brightness)" if name == f"eval/{IMAGE_STATISTICS}" else ""
        panel.set_title(f"{name}{brightness}", fontsize=9)
        panel.tick_params(labelsize=8)
        _finish(panel, "forward-equivalents", fontsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    ncols = min(len(results), columns)
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)
    figure.savefig(path, dpi=150)


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
    }


def _finish(panel: Any, label: str, **font: Any) -> None:
    from matplotlib.ticker import EngFormatter

    panel.set_xlabel(label, **font)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
