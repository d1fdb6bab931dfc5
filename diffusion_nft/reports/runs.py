"""Reads what a run directory holds, for scripts/report.py; needs no model."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusion_nft.evaluation.results import (
    AVERAGES_FILE,
    NUM_SAMPLES,
    RESULTS_FILE,
    mean_and_error,
)
from diffusion_nft.rewards import IMAGE_STATISTICS
from diffusion_nft.runs.environment import ENVIRONMENTS_FILE
from diffusion_nft.runs.run_dir import CONFIG_FILE
from diffusion_nft.tracking.metrics import METRICS_FILE, read_metrics
from diffusion_nft.tracking.summary import comparable, images_file
from diffusion_nft.utils.files import read_lines, read_object
from diffusion_nft.validation.flat import unflatten

Row = dict[str, Any]
# Standard errors that a change must exceed to be called one.
MIN_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Change:
    """A number before and after, each with its standard error; None where it is not known."""

    before: float | None
    before_error: float | None
    after: float | None
    after_error: float | None
    gain_error: float | None = None  # of the mean of the differences line by line

    @property
    def gain(self) -> float | None:
        """After minus before."""
        if self.before is None or self.after is None:
            return None
        return self.after - self.before

    @property
    def direction(self) -> str:
        """``"up"`` or ``"down"`` where the gain is larger than two standard errors, else
        ``"level"``, also where the error is not known."""
        gain, error = self.gain, self.gain_error
        if gain is None or not error or abs(gain) <= MIN_STANDARD_ERRORS * error:
            return "level"
        return "up" if gain > 0 else "down"


@dataclass(frozen=True)
class Test:
    """One evaluation: its line of metrics.jsonl, and the folder of its results if that is there."""

    row: Row
    folder: Path

    @property
    def epoch(self) -> int:
        """Epochs finished when it was made."""
        return self.row["epoch"]

    @cached_property
    def averages(self) -> Row:
        """``average_scores.json``; empty without one."""
        path = self.folder / AVERAGES_FILE
        return read_object(path) if path.is_file() else {}

    @cached_property
    def lines(self) -> list[Row]:
        """The objects of ``evaluation_results.jsonl``, one a test line; none without one."""
        return read_lines(self.folder / RESULTS_FILE)

    def value(self, name: str, tag: str = "") -> float | None:
        """The mean of ``name``, such as "shapes/strict", over all lines or those of ``tag``."""
        return self.row.get(f"eval/tag/{tag}/{name}" if tag else f"eval/{name}")

    def error(self, name: str, tag: str = "") -> float | None:
        """The standard error of ``value``, clustered by prompt."""
        means = self.averages.get("tags", {}).get(tag, {}) if tag else self.averages.get("mean", {})
        return means.get(name, {}).get("stderr")


@dataclass(frozen=True)
class Part:
    """A stage of a run, or the whole of a run without stages (number 0)."""

    number: int
    dataset: str
    rewards: dict[str, float]
    held_out: list[str]
    tests: list[Test]  # those that compare with the last one
    image: Path

    @property
    def title(self) -> str:
        """``"Stage 2"``; empty if the run has no stages."""
        return f"Stage {self.number}" if self.number else ""

    @cached_property
    def names(self) -> list[str]:
        """What was evaluated: total, rewards and components, diversity; a total that is the only
        reward is left out."""
        row = self.tests[-1].row if self.tests else {}
        keys = [key.removeprefix("eval/") for key in row if key.startswith("eval/")]
        keys = [key for key in keys if not key.startswith("tag/") and f"eval/{key}" != NUM_SAMPLES]
        twins = [name for name, weight in self.rewards.items() if weight == 1]
        if len(self.rewards) == 1 and twins and twins[0] in keys:
            keys.remove("total")
        return sorted(keys, key=lambda key: (key == "diversity", key != "total"))

    @cached_property
    def tags(self) -> list[str]:
        """The tags of the test lines, in alphabetical order."""
        row = self.tests[-1].row if self.tests else {}
        return sorted({key.split("/")[2] for key in row if key.startswith("eval/tag/")})

    def is_held_out(self, name: str) -> bool:
        """Whether ``name`` is of a reward that is not trained on."""
        return name.split("/")[0] in self.held_out

    def change(self, name: str, tag: str = "") -> Change:
        """First and last evaluation; there must be one."""
        first, last = self.tests[0], self.tests[-1]
        change = Change(
            first.value(name, tag),
            first.error(name, tag),
            last.value(name, tag),
            last.error(name, tag),
        )
        if tag or name == "diversity" or first is last:
            return change
        return replace(change, gain_error=_paired_error(first.lines, last.lines, name))

    def by_prompt(self) -> list[tuple[str, float, float, int]]:
        """(prompt, mean total before, mean total after, lines) of each prompt, most gained first;
        none where the two evaluations are not of the same lines.
        """
        if len(self.tests) < 2:
            return []
        scores: dict[str, list[tuple[float, float]]] = {}
        for prompt, old, new in _pairs(self.tests[0].lines, self.tests[-1].lines, "total"):
            scores.setdefault(prompt, []).append((old, new))
        rows = []
        for prompt, pairs in scores.items():
            before, after = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            rows.append((prompt, before, after, len(pairs)))
        return sorted(rows, key=lambda row: (row[1] - row[2], row[0]))


@dataclass(frozen=True)
class Run:
    """A run directory: its configuration, starts, metrics and parts."""

    path: Path
    name: str
    config: Row  # flat, as config.json
    starts: list[Row]
    rows: list[Row]  # of metrics.jsonl
    parts: list[Part]  # those that have begun; at least one

    @property
    def epochs(self) -> list[Row]:
        """The lines that training wrote, one an epoch."""
        return [row for row in self.rows if "reward/mean" in row]

    @property
    def done(self) -> int:
        """Epochs finished."""
        return self.rows[-1]["epoch"] if self.rows else 0

    @property
    def planned(self) -> int:
        """Epochs that the configuration asks for."""
        total = self.config["num_epochs"]
        lengths = [value for key, value in self.config.items() if _is_stage_length(key)]
        return min(total, sum(lengths)) if lengths else total

    @property
    def finished(self) -> bool:
        """Whether all planned epochs are made."""
        return self.done >= self.planned

    @property
    def model(self) -> str:
        """The base model."""
        return self.config["pretrained.model"]

    @cached_property
    def training_images(self) -> list[Path]:
        """The first, a middle and the last grid of training samples that were saved."""
        found = sorted((self.path / "images").glob(f"train-{'[0-9]' * 6}.png"))
        chosen = sorted({0, len(found) // 2, len(found) - 1}) if found else []
        return [found[i] for i in chosen]


def _is_stage_length(key: str) -> bool:
    return key.startswith("stages.") and key.endswith(".num_epochs")


def read_run(path: Path) -> Run:
    """The run in the directory ``path``, finished or not.

    Raises ValueError if it is no run directory or one of its files is damaged.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{path} is no run directory: it holds no {CONFIG_FILE}")
    config = read_object(file)
    if missing := {"num_epochs", "pretrained.model"} - config.keys():
        raise ValueError(f"{file} is no configuration of a run: it lacks {', '.join(missing)}")
    rows = read_metrics(path / METRICS_FILE)
    numbers = sorted({row.get("stage", 0) for row in rows})
    if not numbers:
        numbers = [int(any(map(_is_stage_length, config)))]
    parts = [_read_part(path, config, rows, number) for number in numbers]
    name = str(config.get("run_name") or path.resolve().name)
    return Run(path, name, config, read_lines(path / ENVIRONMENTS_FILE), rows, parts)


def read_runs(paths: list[Path]) -> list[Run]:
    """The runs in ``paths``, under names that differ: the paths themselves where they would not.

    Raises ValueError as ``read_run``, and for a directory that is given twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a run directory is given twice")
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    return [replace(run, name=str(run.path)) if names.count(run.name) > 1 else run for run in runs]


def _read_part(path: Path, config: Row, rows: list[Row], number: int) -> Part:
    own = {
        key.removeprefix(f"stages.{number}."): value
        for key, value in config.items()
        if key.startswith(f"stages.{number}.")
    }
    rewards = unflatten(own).get("reward_fn") or unflatten(config).get("reward_fn", {})
    folder = path / "eval" / (f"stage-{number}" if number else "")
    tests = [
        Test(row, folder / f"epoch-{row['epoch']:06d}")
        for row in comparable(
            [row for row in rows if "eval/total" in row and row.get("stage", 0) == number]
        )
    ]
    merged = config | own
    watched = [IMAGE_STATISTICS] if config.get("monitor.image_statistics") else []
    return Part(
        number,
        merged.get("dataset", ""),
        rewards,
        [
            name
            for name in (*merged.get("eval.held_out_rewards", []), *watched)
            if name not in rewards
        ],
        tests,
        path / images_file(number),
    )


def _pairs(before: list[Row], after: list[Row], name: str) -> list[tuple[str, float, float]]:
    """(prompt, old score, new score) of the test lines that ``name`` applies to; none unless both
    evaluations are of the same prompts."""
    if [row["prompt"] for row in before] != [row["prompt"] for row in after]:
        return []
    pairs = [
        (new["prompt"], old["scores"].get(name), new["scores"].get(name))
        for old, new in zip(before, after, strict=True)
    ]
    return [(p, old, new) for p, old, new in pairs if old is not None and new is not None]


def _paired_error(before: list[Row], after: list[Row], name: str) -> float | None:
    """Standard error of the mean difference line by line, clustered by prompt; None if unknown."""
    pairs = _pairs(before, after, name)
    prompts = [prompt for prompt, _, _ in pairs]
    if len(set(prompts)) < 2:
        return None
    return mean_and_error([new - old for _, old, new in pairs], prompts)["stderr"]
