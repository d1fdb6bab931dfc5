"""Suites of test sets, tables of their results, and published results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_nft.evaluation.results import SETTINGS_FILE, finished
from diffusion_nft.runs.environment import ENVIRONMENTS_FILE
from diffusion_nft.utils.files import read_lines, read_object
from diffusion_nft.utils.tables import markdown_table


@dataclass(frozen=True)
class Column:
    """Column of a table: a mean metric times ``scale``; ``over_tags``: averaged over tags."""

    title: str
    dataset: str
    metric: str
    digits: int
    scale: float = 1.0
    over_tags: bool = False

    def value(self, averages: Mapping[str, Any]) -> tuple[float, float | None] | None:
        """Scaled mean and standard error; None without the metric."""
        means = averages.get("mean_over_tags" if self.over_tags else "mean", {})
        if self.metric not in means:
            return None
        found = means[self.metric]
        error = found["stderr"]
        return found["mean"] * self.scale, None if error is None else error * self.scale


@dataclass(frozen=True)
class Suite:
    """Test sets, and default settings of their evaluation."""

    settings: dict[str, Any]
    columns: tuple[Column, ...]
    references: dict[str, tuple[float | None, ...]]  # row -> values in the order of the columns

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(column.dataset for column in self.columns))


SUITES: dict[str, Suite] = {
    # The tables of arXiv 2509.16117, with their scales: PickScore is 26 times the reward, and
    # UnifiedReward 5 times.  The overall GenEval score is the mean of six tags.
    "paper": Suite(
        settings={"eval.seed": 42, "resolution": 512, "eval.num_steps": 40, "eval.solver": "flow"},
        columns=(
            Column("GenEval", "geneval", "geneval/accuracy", 3, over_tags=True),
            Column("OCR", "ocr", "ocr", 3),
            Column("PickScore", "drawbench", "pickscore", 2, scale=26.0),
            Column("CLIPScore", "drawbench", "clipscore", 3),
            Column("HPSv2.1", "drawbench", "hpsv2", 3),
            Column("Aesthetic", "drawbench", "aesthetic", 2),
            Column("ImageReward", "drawbench", "imagereward", 2),
            Column("UnifiedReward", "drawbench", "unifiedreward", 2, scale=5.0),
        ),
        # For Flow-GRPO, only the score that each model was trained on.
        references={
            "base, no guidance": (0.24, 0.12, 20.51, 0.237, 0.204, 5.13, -0.58, 2.02),
            "base, guidance 4.5": (0.63, 0.59, 22.34, 0.285, 0.279, 5.36, 0.85, 3.03),
            "Flow-GRPO on GenEval": (0.95, None, None, None, None, None, None, None),
            "Flow-GRPO on OCR": (None, 0.92, None, None, None, None, None, None),
            "Flow-GRPO on PickScore": (None, None, 23.50, None, None, None, None, None),
            "NFT on GenEval": (0.98, 0.36, 21.92, 0.271, 0.251, 5.33, 0.68, 2.91),
            "NFT on OCR": (0.54, 0.97, 21.63, 0.281, 0.246, 5.19, 0.37, 2.81),
            "NFT on PickScore": (0.53, 0.64, 24.03, 0.270, 0.315, 6.17, 1.29, 3.40),
            "NFT on several rewards": (0.94, 0.91, 23.80, 0.293, 0.331, 6.01, 1.49, 3.49),
        },
    ),
    # The built-in model; references measured on two CPU cores with seed 42 (docs/evaluation.md).
    "shapes": Suite(
        settings={
            "eval.seed": 42,
            "pretrained.model": "shapes",
            "resolution": 48,
            "eval.num_steps": 10,
            "eval.solver": "flow",
        },
        columns=(
            Column("strict", "shapes", "shapes/strict", 3),
            Column("strict, mean of tags", "shapes", "shapes/strict", 3, over_tags=True),
            Column("stricter rule", "shapes", "shapes/stricter", 3),
            Column("score", "shapes", "shapes", 3),
        ),
        references={
            "base, seed 42": (0.485, 0.485, 0.467, 0.783),
            "after make demo, seed 42": (0.762, 0.762, 0.742, 0.927),
        },
    ),
}


@dataclass(frozen=True)
class Row:
    """Evaluations of a model: contents of ``average_scores.json`` by test set."""

    name: str
    averages: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    environment: dict[str, str]  # of all starts

    @property
    def reward_settings(self) -> dict[str, Any]:
        """Options and servers of the rewards, if any."""
        settings = [averages.get("settings", {}) for averages in self.averages.values()]
        return {
            f"{name}: {title}": value
            for title, key in (("options", "reward_options"), ("servers", "reward_servers"))
            for one in settings
            for name, value in one.get(key, {}).items()
        }


def read_rows(folder: Path, suite: Suite) -> list[Row]:
    """The models with a finished evaluation in ``folder``, which has one folder per model."""
    rows = []
    for model in sorted(path for path in folder.glob("*") if path.is_dir()):
        done = {name: finished(model / name) for name in suite.datasets}
        averages = {name: result for name, result in done.items() if result}
        if averages:
            starts = read_lines(model / ENVIRONMENTS_FILE)
            environment = {
                key: ", ".join(dict.fromkeys(str(start.get(key)) for start in starts))
                for key in dict.fromkeys(key for start in starts for key in start)
            }
            settings = read_object(model / SETTINGS_FILE)
            rows.append(Row(model.name, averages, settings, environment))
    return rows


def as_json(suite: Suite, rows: Sequence[Row]) -> dict[str, Any]:
    """The contents of ``as_markdown``, and all other means."""
    titles = [column.title for column in suite.columns]
    return {
        "references": {
            name: dict(zip(titles, values, strict=True))
            for name, values in suite.references.items()
        },
        "models": [
            {
                "name": row.name,
                "values": {
                    column.title: dict(zip(("mean", "stderr"), value, strict=True))
                    for column in suite.columns
                    if (value := column.value(row.averages.get(column.dataset, {})))
                },
                "settings": row.settings,
                "environment": row.environment,
                "averages": row.averages,
            }
            for row in rows
        ],
    }


def result_table(suite: Suite, rows: Sequence[Row]) -> str:
    """Markdown table with one row per reference and model."""
    lines = [
        [
            f"reference: {name}",
            *(
                "" if value is None else f"{value:.{column.digits}f}"
                for column, value in zip(suite.columns, values, strict=True)
            ),
        ]
        for name, values in suite.references.items()
    ]
    lines += [[row.name, *(_cell(column, row) for column in suite.columns)] for row in rows]
    return markdown_table(["", *(column.title for column in suite.columns)], lines)


def as_markdown(suite: Suite, rows: Sequence[Row]) -> str:
    """The table, followed by tables of all settings and versions."""
    counts = [
        f"- {row.name}: "
        + ", ".join(
            f"{name} {averages['num_samples']} lines of {averages['num_prompts']} prompts"
            for name, averages in row.averages.items()
        )
        for row in rows
    ]
    parts = [
        result_table(suite, rows),
        "± is the standard error of the mean, clustered by prompt.  Rows whose names end in "
        "<N>lines are for a fixed random subset of N lines of each test set.",
        "\n".join(counts),
        *(
            _comparison(rows, part)
            for part in ("settings", "reward_settings", "environment")
            if any(getattr(row, part) for row in rows)
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _cell(column: Column, row: Row) -> str:
    value = column.value(row.averages.get(column.dataset, {}))
    if value is None:
        return ""
    mean, error = value
    shown = f"{mean:.{column.digits}f}"
    return shown if error is None else f"{shown} ± {error:.{column.digits}f}"


def _comparison(rows: Sequence[Row], part: str) -> str:
    """A table with one row per key and one column per model."""
    columns = [getattr(row, part) for row in rows]
    keys = dict.fromkeys(key for column in columns for key in column)
    lines = [[key, *(str(column.get(key, "")) for column in columns)] for key in keys]
    return markdown_table([part, *(row.name for row in rows)], lines)
