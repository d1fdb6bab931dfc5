"""What an evaluation came to: in memory, with its statistics, and in a folder.

A folder of results holds ``settings.json``, written first, which says what its images are drawn
with; ``images/<line>.png``, if they are kept; ``progress/``, the scores of each chunk of lines as
they come, until all are there; and last ``evaluation_results.jsonl`` and ``average_scores.json``.
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_nft.data.prompts import Prompt
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.evaluation.options import DEFAULTS
from diffusion_nft.images import Images, save_png
from diffusion_nft.rewards.combine import RewardError, RewardSet, Scores
from diffusion_nft.runs.lock import LOCK_FILE
from diffusion_nft.runs.run_dir import deciding_options
from diffusion_nft.utils.files import naming, read_lines, read_object, write_atomically

# The metric that tells how many lines an evaluation had.
NUM_SAMPLES = "eval/num_samples"
# Settings that say something of each reward by name, and so may grow where images are kept.
PER_REWARD_SETTINGS = ("rewards", "reward_options", "reward_servers")
SETTINGS_FILE, IMAGES, PROGRESS = "settings.json", "images", "progress"
RESULTS_FILE, AVERAGES_FILE = "evaluation_results.jsonl", "average_scores.json"


@dataclass(frozen=True)
class Evaluation:
    """Scores of N test lines, in line order, and a few images."""

    prompts: list[Prompt]
    scores: dict[str, list[float]]  # "total", each reward and component -> N numbers
    diversity: float
    images: Images  # up to num_images, of this rank's lines
    image_lines: list[int]  # of which of the N
    lines: Sequence[int]  # where the N stand in the test set, from 0

    @property
    def num_unscored(self) -> int:
        """How many lines have no score; they are left out of the means."""
        return sum(map(math.isnan, self.scores["total"]))

    def averages(self) -> dict[str, Any]:
        """What ``average_scores.json`` holds: means and standard errors, also per tag; no NaN.

        Raises RewardError if no line has a score.
        """
        if self.num_unscored == len(self.prompts) > 0:
            raise RewardError(f"none of the {len(self.prompts)} lines evaluated has a score")
        tags = [str(prompt.metadata.get("tag", "")) for prompt in self.prompts]
        summary: dict[str, Any] = {
            "num_samples": len(self.prompts),
            "num_prompts": len({prompt.text for prompt in self.prompts}),
            "num_unscored": self.num_unscored,
            "diversity": self.diversity,
            "mean": self._means(range(len(self.prompts))),
        }
        if all(tags) and tags:
            rows = {tag: [i for i, t in enumerate(tags) if t == tag] for tag in sorted(set(tags))}
            summary["tags"] = {tag: self._means(members) for tag, members in rows.items()}
            summary["mean_over_tags"] = {
                name: _mean_over_tags(
                    [tag[name] for tag in summary["tags"].values() if name in tag]
                )
                for name in summary["mean"]
            }
        return _without_nan(summary)

    def _means(self, rows: Iterable[int]) -> dict[str, dict[str, float]]:
        rows = list(rows)
        texts = [self.prompts[i].text for i in rows]
        means = {
            name: mean_and_error([values[i] for i in rows], texts)
            for name, values in self.scores.items()
        }
        return {name: value for name, value in means.items() if value["count"]}

    def metrics(self) -> dict[str, float]:
        """Flat ``eval/*`` numbers for the log."""
        summary = self.averages()
        flat = {f"eval/{name}": value["mean"] for name, value in summary["mean"].items()}
        for tag, means in summary.get("tags", {}).items():
            parts = {name: value for name, value in means.items() if name != "total"}
            flat |= {f"eval/tag/{tag}/{name}": value["mean"] for name, value in parts.items()}
        flat["eval/diversity"] = self.diversity
        flat[NUM_SAMPLES] = len(self.prompts)
        return flat


def mean_and_error(values: list[float], clusters: list[str]) -> dict[str, float]:
    """Mean, its standard error clustered by ``clusters`` (repeats of a prompt are not independent),
    and how many of ``values`` apply: NaN is left out.

    The error is the usual cluster-robust one of a mean, sqrt(G/(G-1) sum_g (sum_i e_gi)^2) / n for
    G clusters (Liang & Zeger 1986); NaN for a single cluster.
    """
    kept = [(v, c) for v, c in zip(values, clusters, strict=True) if not math.isnan(v)]
    if not kept:
        return {"mean": math.nan, "stderr": math.nan, "count": 0}
    mean = math.fsum(v for v, _ in kept) / len(kept)
    residuals: dict[str, float] = {}
    for value, cluster in kept:
        residuals[cluster] = residuals.get(cluster, 0.0) + value - mean
    count = len(residuals)
    error = math.nan
    if count > 1:
        squares = math.fsum(r * r for r in residuals.values())
        error = math.sqrt(count / (count - 1) * squares) / len(kept)
    return {"mean": mean, "stderr": error, "count": len(kept)}


def _mean_over_tags(tags: list[dict[str, float]]) -> dict[str, float]:
    """Mean of the tags' means, and its standard error from theirs (tags are independent)."""
    mean = math.fsum(tag["mean"] for tag in tags) / len(tags)
    return {
        "mean": mean,
        "stderr": math.sqrt(math.fsum(tag["stderr"] ** 2 for tag in tags)) / len(tags),
    }


def reserve_folder(folder: Path, settings: Mapping[str, Any], dist: Distributed) -> None:
    """Makes ``folder`` the place of the evaluation with these ``settings``, finished or not.

    Raises ValueError, naming the differing ones, if it holds other images or scores, or if the
    ranks differ.  Where the LoRA lies ("lora") may differ if its content ("lora_sha256") does not,
    and where and how fast a reward computes; rewards may be added.
    """
    wanted = json.loads(json.dumps(settings))
    for found in dist.gather_objects(wanted):
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise ValueError(
                    f"ranks differ in {key}: {found.get(key)!r} and {wanted.get(key)!r} (of a run "
                    "that is still training, name a checkpoint instead of the run's directory)"
                )
    path = folder / SETTINGS_FILE
    lines: list[str] = []
    # One rank looks for all: while it writes, the others could see half of it.
    begun = {other.name for other in folder.glob("*")} - {SETTINGS_FILE, LOCK_FILE}
    if dist.is_main and path.exists() and begun:
        # A setting that an earlier version did not have was what is its default now.
        found = {key: DEFAULTS[key] for key in wanted if key in DEFAULTS} | read_object(path)
        lines = [
            f"{key}: {found.get(key)!r} -> {wanted.get(key)!r}"
            for key in sorted(found.keys() | wanted.keys())
            if key not in ("lora", *PER_REWARD_SETTINGS) and found.get(key) != wanted.get(key)
        ]
        old, new = _options(found), _options(wanted)
        lines += [
            f"reward_options.{name}: {old[name]!r} -> {new[name]!r}"
            for name in sorted(old.keys() & new.keys())
            if old[name] != new[name]
        ]
    elif dist.is_main:
        write_json(path, wanted)
    if lines := dist.broadcast_object(lines):
        raise ValueError(
            f"{folder} holds another evaluation:\n  "
            + "\n  ".join(lines)
            + "\ngive another --output_dir, or remove that folder"
        )


def _options(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each reward in ``settings`` the options that decide its scores; none of a served one."""
    options, reward_servers = settings.get("reward_options", {}), settings.get("reward_servers", {})
    own = [name for name in settings.get("rewards", {}) if name not in reward_servers]
    return deciding_options({name: options.get(name, {}) for name in own})


def finished(folder: Path) -> dict[str, Any] | None:
    """What ``average_scores.json`` holds; None if the evaluation in ``folder`` is not finished."""
    path = folder / AVERAGES_FILE
    return {"settings": {}} | read_object(path) if path.is_file() else None


def scored_by(folder: Path) -> dict[str, float]:
    """Reward -> weight of the finished evaluation in ``folder``; none if it is not finished."""
    averages = finished(folder)
    return averages["settings"].get("rewards", {}) if averages else {}


def image_path(folder: Path, line: int) -> Path:
    """The image of test line ``line``."""
    return folder / IMAGES / f"{line:06d}.png"


def has_images(folder: Path, lines: Iterable[int]) -> bool:
    """Whether the image of every one of ``lines`` is there."""
    return all(image_path(folder, line).is_file() for line in lines)


def save_images(images: Images, lines: Iterable[int], folder: Path) -> None:
    """Writes the images of test ``lines``; one that is not finite is written fully transparent."""
    for image, line in zip(images.to_pil(), lines, strict=True):
        save_png(image, image_path(folder, line))


def read_images(folder: Path, lines: Iterable[int]) -> Images:
    """The images that ``save_images`` wrote.  Raises FileNotFoundError if one is missing."""
    pixels, finite = [], []
    for line in lines:
        with Image.open(image_path(folder, line)) as image:
            pixels.append(torch.from_numpy(np.array(image.convert("RGB"))))
            blank = image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)
            finite.append(not blank)
    return Images(torch.stack(pixels).permute(0, 3, 1, 2), torch.tensor(finite))


def _progress_path(folder: Path, lines: range) -> Path:
    return folder / PROGRESS / f"{lines.start:06d}-{lines.stop:06d}.json"


def write_scores(folder: Path, lines: range, scores: Scores, rewards: RewardSet) -> None:
    """Remembers how ``rewards`` scored ``lines``."""
    parts = {name: _without_nan(part.tolist()) for name, part in scores.parts.items()}
    numbers = {"total": scores.total.tolist(), "parts": parts}
    write_json(_progress_path(folder, lines), {"by": _identity(rewards), **numbers})


def read_scores(folder: Path, lines: range, rewards: RewardSet) -> Scores | None:
    """What ``write_scores`` wrote for ``lines`` and such ``rewards``; None if it did not."""
    path = _progress_path(folder, lines)
    found = read_object(path) if path.is_file() else {}
    if found.get("by") != _identity(rewards):
        return None
    parts = {name: _float64(values) for name, values in found["parts"].items()}
    return Scores(_float64(found["total"]), parts)


def _identity(rewards: RewardSet) -> dict[str, Any]:
    """What the scores of ``rewards`` depend on, as JSON gives it back."""
    options = {name: rewards.options.get(name, {}) for name in rewards.weights}
    own = {"weights": rewards.weights, "options": deciding_options(options)}
    return json.loads(json.dumps(own))


def _float64(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)


def read_results(
    folder: Path, prompts: list[Prompt]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Scores and settings that ``write_results`` left in ``folder``.

    Raises FileNotFoundError if it left none, ValueError if they are damaged or not of ``prompts``.
    """
    averages = finished(folder)
    if averages is None or not (folder / RESULTS_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {RESULTS_FILE}: evaluate with --save_images first"
        )
    rows = read_lines(folder / RESULTS_FILE)
    if any(not isinstance(row.get("scores"), dict) for row in rows):
        raise ValueError(f"{folder / RESULTS_FILE} is damaged: a line holds no scores")
    if [row.get("prompt") for row in rows] != [prompt.text for prompt in prompts]:
        raise ValueError(
            f"{folder} holds results of {len(rows)} other prompts than the {len(prompts)} lines to "
            "score: give the same data set and --limit as when they were drawn"
        )
    scores = {
        name: [math.nan if row["scores"][name] is None else row["scores"][name] for row in rows]
        for name in rows[0]["scores"]
    }
    return scores, averages["settings"]


def merge_scores(
    new: Evaluation, scores: dict[str, list[float]], weights: Mapping[str, float]
) -> Evaluation:
    """``new`` joined with the earlier ``scores`` of the same images; the total is by ``weights``,
    of all rewards.
    """
    joined = scores | new.scores
    rows = range(len(new.prompts))
    joined["total"] = [sum(w * joined[name][row] for name, w in weights.items()) for row in rows]
    return replace(new, scores=joined)


def merge_settings(before: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``record`` that say something of each reward, and of ``before`` for the others."""
    scored = record["rewards"]
    return {
        key: {name: value for name, value in before.get(key, {}).items() if name not in scored}
        | {name: value for name, value in record[key].items() if name in scored}
        for key in PER_REWARD_SETTINGS
    }


def write_results(evaluation: Evaluation, folder: Path, *, settings: Mapping[str, Any]) -> None:
    """Writes ``evaluation_results.jsonl`` (one object a sample), and then ``average_scores.json``,
    which says that the evaluation is finished; its progress is no longer needed.
    """
    rows = []
    for i, (line, prompt) in enumerate(zip(evaluation.lines, evaluation.prompts, strict=True)):
        values = {name: numbers[i] for name, numbers in evaluation.scores.items()}
        path = image_path(folder, line)
        row = {
            "sample_id": line,
            "prompt": prompt.text,
            "metadata": prompt.metadata,
            "scores": _without_nan(values),
            "image_path": str(path.relative_to(folder)) if path.is_file() else None,
        }
        rows.append(json.dumps(row) + "\n")
    write_json(folder / SETTINGS_FILE, settings)
    write_atomically(folder / RESULTS_FILE, "".join(rows).encode())
    write_json(folder / AVERAGES_FILE, {"settings": settings, **evaluation.averages()})
    shutil.rmtree(folder / PROGRESS, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Replaces the file ``path`` by ``value`` at once; its folder is made if need be."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def _without_nan(value: Any) -> Any:
    """NaN as None, at any depth: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
