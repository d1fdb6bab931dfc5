"""Draws and tabulates what scripts/experiments.py left in --results, and nothing else.

    python scripts/experiments_plot.py fast negatives

Of each experiment: --output/NAME.png, held-out strict accuracy against compute and time, the mean
over seeds with its 95 % band; and --output/NAME.md, a table with paired tests against the
experiment's baseline at equal compute.  Intervals are Student's t over seeds.  What an experiment
watches besides, such as the reward, is in --output/NAME-watched.png; alarms of the monitor are
tabulated.
Needs the extra "plots".
"""

import argparse
import math
import statistics
from pathlib import Path

from diffusion_nft.command_line import command, user_path
from diffusion_nft.experiments.comparison import (
    ACCURACY,
    COST,
    SECONDS,
    Result,
    Results,
    mean_and_half_width,
    read,
)
from diffusion_nft.experiments.tables import experiment_page, watched
from diffusion_nft.rewards import IMAGE_STATISTICS
from diffusion_nft.utils.files import write_atomically
from diffusion_nft.utils.paths import prepare_folder

AXES = {COST: "training compute, thousands of forward-equivalents", SECONDS: "training time, s"}
# Okabe and Ito's colours, which the colour-blind can tell apart; markers tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
MANY_VARIANTS = 3  # Beside so many the lines of single runs can be told apart.
LINES = ("-", "--", ":")  # one for each round through the colours


def curve(results: dict[int, Result], key: str) -> tuple[list[float], list[float], list[float]]:
    """(mean of ``key``, mean of strict accuracy, half the interval of its gain over the start) at
    each evaluation.
    """
    points = list(zip(*(result.evaluations for result in results.values()), strict=True))
    x = [statistics.fmean(row[key] for row in rows) for rows in points]
    means = [statistics.fmean(row[ACCURACY] for row in rows) for rows in points]
    gains = [
        [row[ACCURACY] - start[ACCURACY] for row, start in zip(rows, points[0], strict=True)]
        for rows in points
    ]
    return x, means, [mean_and_half_width(values)[1] for values in gains]


def draw(results: Results, path: Path) -> None:
    """Two panels with the curves of all variants.  Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, (key, label) in zip(panels, AXES.items(), strict=True):
        for number, (variant, seeds) in enumerate(results.items()):
            colour = COLOURS[number % len(COLOURS)]
            x, means, halves = curve(seeds, key)
            x = [value / 1e3 for value in x] if key == COST else x
            low = [max(mean - half, 0) for mean, half in zip(means, halves, strict=True)]
            high = [min(mean + half, 1) for mean, half in zip(means, halves, strict=True)]
            panel.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            marker = MARKERS[number % len(MARKERS)]
            text = f"{variant} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"
            line = LINES[number // len(COLOURS) % len(LINES)]
            panel.plot(x, means, line, color=colour, marker=marker, markersize=5, label=text)
        panel.set_xlabel(label)
        panel.set_xlim(left=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out strict accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    figure.savefig(path, dpi=150)


def draw_watched(results: Results, path: Path) -> None:
    """A panel a watched metric, against compute: the mean over seeds, and beside few variants each
    run as a thin line.  Raises ImportError without matplotlib.
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
            colour = COLOURS[number % len(COLOURS)]
            by_epoch: dict[int, list[tuple[float, float]]] = {}
            for result in seeds.values():
                rows = [row for row in result.rows if row.get(name) is not None]
                points = [(row[COST] / 1e3, row[name]) for row in rows]
                if points and len(results) <= MANY_VARIANTS:
                    panel.plot(*zip(*points, strict=True), color=colour, alpha=0.35, linewidth=0.7)
                for row, point in zip(rows, points, strict=True):
                    by_epoch.setdefault(row["epoch"], []).append(point)
            means = [
                [statistics.fmean(values) for values in zip(*by_epoch[epoch], strict=True)]
                for epoch in sorted(by_epoch)
            ]
            x, y = zip(*means, strict=True) if means else ((), ())
            line = LINES[number // len(COLOURS) % len(LINES)]
            panel.plot(x, y, line, color=colour, linewidth=1.6, label=variant)
        panel.set_title(
            f"{name} (brightness)" if name == f"eval/{IMAGE_STATISTICS}" else name, fontsize=9
        )
        panel.set_xlabel("forward-equivalents, thousands", fontsize=8)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    ncols = min(len(results), columns)
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)
    figure.savefig(path, dpi=150)


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="of experiments that have results")
    add("--results", type=user_path, default=Path("docs/results"))
    add("--output", type=user_path, default=Path("docs", "figures"))
    return parser.parse_args()


def main() -> None:
    """Draws, prints and writes."""
    args = parse_flags()
    found = {name: read(args.results / name) for name in args.names}
    prepare_folder(args.output)
    for name, results in found.items():
        try:
            text = experiment_page(name, results, args)
            draw(results, args.output / f"{name}.png")
            draw_watched(results, args.output / f"{name}-watched.png")
        except ImportError as error:
            raise ImportError(
                f"{error.name} is missing: pip install 'diffusion-nft[plots]'"
            ) from error
        write_atomically(args.output / f"{name}.md", text.encode())
        print(f"{text}\n{args.output / name}.md and .png")


if __name__ == "__main__":
    command(main)
