"""Reads run directories for a report."""

from collections.abc import Iterable
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
# (value, standard error), each None if unknown.
Score = tuple[float | None, float | None]
# Minimum gain, in standard errors, that counts as a change.
MIN_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Change:
    """A score before and after training.

    The error of the gain is that of the mean difference per test line, clustered by prompt.
    """

    before: Score
    after: Score
    gain: Score

    @property
    def direction(self) -> str:
        """``"up"``, ``"down"``, or ``"level"`` if the gain is within its error or has none."""
        gain, error = self.gain
        if gain is None or not error or abs(gain) <= MIN_STANDARD_ERRORS * error:
            return "level"
        return "up" if gain > 0 else "down"


@dataclass(frozen=True)
class Test:
    """One evaluation: its row in metrics.jsonl, and the folder of its results, if it exists."""

    row: Row
    folder: Path

    @cached_property
    def averages(self) -> Row:
        path = self.folder / AVERAGES_FILE
        return read_object(path) if path.is_file() else {}

    @cached_property
    def lines(self) -> list[Row]:
        return read_lines(self.folder / RESULTS_FILE)

    def score(self, name: str, tag: str = "") -> Score:
        """Mean of ``name``, such as "shapes/strict", over all test lines or those of ``tag``."""
        value = self.row.get(f"eval/tag/{tag}/{name}" if tag else f"eval/{name}")
        means = self.averages.get("tags", {}).get(tag, {}) if tag else self.averages.get("mean", {})
        return value, means.get(name, {}).get("stderr")


@dataclass(frozen=True)
class Part:
    """A stage of a run; number 0 is a run without stages."""

    number: int
    dataset: str
    rewards: dict[str, float]
    held_out: list[str]
    tests: list[Test]  # comparable with the last one
    image: Path

    @property
    def title(self) -> str:
        return f"Stage {self.number}" if self.number else ""

    @cached_property
    def _evaluated(self) -> list[str]:
        row = self.tests[-1].row if self.tests else {}
        return [key.removeprefix("eval/") for key in row if key.startswith("eval/")]

    @cached_property
    def names(self) -> list[str]:
        """Evaluated scores: total, rewards and components, diversity.  Excludes a total that equals
        the only reward.
        """
        left_out = {NUM_SAMPLES.removeprefix("eval/")}
        if list(self.rewards.values()) == [1] and set(self.rewards) <= set(self._evaluated):
            left_out.add("total")
        names = [name for name in self._evaluated if not name.startswith("tag/")]
        return sorted_names(name for name in names if name not in left_out)

    @cached_property
    def tags(self) -> list[str]:
        """Sorted tags of the test lines."""
        return sorted({name.split("/")[1] for name in self._evaluated if name.startswith("tag/")})

    def is_held_out(self, name: str) -> bool:
        """True if ``name`` is of a reward that is not trained on."""
        return name.split("/")[0] in self.held_out

    def change(self, name: str) -> Change:
        """Change from the first to the last evaluation, which must exist."""
        first, last = self.tests[0], self.tests[-1]
        before, after = first.score(name), last.score(name)
        if before[0] is None or after[0] is None:
            return Change(before, after, (None, None))
        pairs = _pairs(first.lines, last.lines, name)
        prompts = [prompt for prompt, _, _ in pairs]
        error = None
        if first is not last and len(set(prompts)) > 1:
            error = mean_and_error([new - old for _, old, new in pairs], prompts)["stderr"]
        return Change(before, after, (after[0] - before[0], error))

    @cached_property
    def by_prompt(self) -> list[tuple[str, float, float, int]]:
        """(prompt, mean total before, mean total after, number of test lines), by descending gain.
        Empty if the lines of the two evaluations differ.
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
    config: Row  # flat, as in config.json
    starts: list[Row]
    rows: list[Row]  # of metrics.jsonl
    parts: list[Part]  # at least one
    colour: int = 0

    @cached_property
    def epochs(self) -> list[Row]:
        """The rows of training, one per epoch."""
        return [row for row in self.rows if "reward/mean" in row]

    def values(self, key: str) -> list[float]:
        """The known values of a metric."""
        return [row[key] for row in self.rows if row.get(key) is not None]

    @property
    def done(self) -> int:
        """Number of finished epochs."""
        return self.rows[-1]["epoch"] if self.rows else 0

    @property
    def planned(self) -> int:
        """Number of epochs in the configuration."""
        total = self.config["num_epochs"]
        lengths = [value for key, value in self.config.items() if _is_stage_length(key)]
        return min(total, sum(lengths)) if lengths else total

    @property
    def finished(self) -> bool:
        return self.done >= self.planned

    @property
    def training_images(self) -> list[Path]:
        """The first, middle and last grid of training samples."""
        found = sorted((self.path / "images").glob(f"train-{'[0-9]' * 6}.png"))
        chosen = sorted({0, len(found) // 2, len(found) - 1}) if found else []
        return [found[i] for i in chosen]


def sorted_names(names: Iterable[str]) -> list[str]:
    """Unique ``names`` of scores, with the total first and diversity last."""
    return sorted(dict.fromkeys(names), key=lambda name: (name == "diversity", name != "total"))


def _is_stage_length(key: str) -> bool:
    return key.startswith("stages.") and key.endswith(".num_epochs")


def read_run(path: Path) -> Run:
    """Reads the run in the directory ``path``.

    Raises ValueError if it is not a run directory or a file is damaged.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        raise ValueError(f"{path} is not a run directory: it has no {CONFIG_FILE}")
    config = read_object(file)
    if missing := {"num_epochs", "pretrained.model"} - config.keys():
        raise ValueError(f"{file} is not the configuration of a run: no {', '.join(missing)}")
    rows = read_metrics(path / METRICS_FILE)
    numbers = sorted({row.get("stage", 0) for row in rows})
    if not numbers:
        numbers = [int(any(map(_is_stage_length, config)))]
    parts = [_read_part(path, config, rows, number) for number in numbers]
    name = str(config.get("run_name") or path.resolve().name)
    return Run(path, name, config, read_lines(path / ENVIRONMENTS_FILE), rows, parts)


def read_runs(paths: list[Path]) -> list[Run]:
    """Reads the runs in ``paths``; runs with equal names are named by their paths.

    Raises the errors of ``read_run``, and ValueError for a repeated directory.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a run directory is given twice")
    runs = [replace(read_run(path), colour=i) for i, path in enumerate(paths)]
    names = [run.name for run in runs]
    return [replace(run, name=str(run.path)) if names.count(run.name) > 1 else run for run in runs]


def _read_part(path: Path, config: Row, rows: list[Row], number: int) -> Part:
    prefix = f"stages.{number}."
    own = {k.removeprefix(prefix): value for k, value in config.items() if k.startswith(prefix)}
    merged = config | own
    rewards = dict(unflatten(own).get("reward_fn") or unflatten(config).get("reward_fn", {}))
    folder = path / "eval" / (f"stage-{number}" if number else "")
    tests = [row for row in rows if "eval/total" in row and row.get("stage", 0) == number]
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
        [Test(row, folder / f"epoch-{row['epoch']:06d}") for row in comparable(tests)],
        path / images_file(number),
    )


def _pairs(before: list[Row], after: list[Row], name: str) -> list[tuple[str, float, float]]:
    """(prompt, old score, new score) of the test lines with the score ``name``; empty if the
    prompts of the two evaluations differ.
    """
    if [row["prompt"] for row in before] != [row["prompt"] for row in after]:
        return []
    pairs = [
        (new["prompt"], old["scores"].get(name), new["scores"].get(name))
        for old, new in zip(before, after, strict=True)
    ]
    return [(p, old, new) for p, old, new in pairs if old is not None and new is not None]
