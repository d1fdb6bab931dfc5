"""Results of an evaluation, their statistics, and the folder in which they are stored.

The folder has ``settings.json``, written first; ``images/<line>.png``, if kept; ``progress/``, the
scores of finished chunks of lines until all are finished; and ``evaluation_results.jsonl`` and
``average_scores.json``, written last.
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

# Metric for the number of test lines of an evaluation.
NUM_SAMPLES = "eval/num_samples"
# Settings by reward; rewards may be added to an evaluation with saved images.
PER_REWARD_SETTINGS = ("rewards", "reward_options", "reward_servers")
SETTINGS_FILE, IMAGES, PROGRESS = "settings.json", "images", "progress"
RESULTS_FILE, AVERAGES_FILE = "evaluation_results.jsonl", "average_scores.json"


@dataclass(frozen=True)
class Evaluation:
    """Scores of N test lines, in line order, and some images."""

    prompts: list[Prompt]
    scores: dict[str, list[float]]  # "total", each reward and component -> N numbers
    diversity: float
    images: Images  # up to num_images, of this rank's lines
    image_lines: list[int]  # indices of ``images`` among the N lines
    lines: Sequence[int]  # line numbers in the test set, from 0

    @property
    def num_unscored(self) -> int:
        """Number of lines without a score, which are excluded from the means."""
        return sum(map(math.isnan, self.scores["total"]))

    def averages(self) -> dict[str, Any]:
        """Contents of ``average_scores.json``: means and errors, also per tag, without NaN.

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
        """Flat ``eval/*`` metrics."""
        summary = self.averages()
        flat = {f"eval/{name}": value["mean"] for name, value in summary["mean"].items()}
        for tag, means in summary.get("tags", {}).items():
            parts = {name: value for name, value in means.items() if name != "total"}
            flat |= {f"eval/tag/{tag}/{name}": value["mean"] for name, value in parts.items()}
        flat["eval/diversity"] = self.diversity
        flat[NUM_SAMPLES] = len(self.prompts)
        return flat


def mean_and_error(values: list[float], clusters: list[str]) -> dict[str, float]:
    """Mean of ``values`` except NaN, its standard error by ``clusters``, and their count.

    As samples of the same prompt are not independent, the error is cluster-robust:
    sqrt(G/(G-1) sum_g (sum_i e_gi)^2) / n for G clusters (Liang & Zeger 1986); NaN for one cluster.
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
    """Mean of the means of the tags, and its standard error for independent tags."""
    mean = math.fsum(tag["mean"] for tag in tags) / len(tags)
    return {
        "mean": mean,
        "stderr": math.sqrt(math.fsum(tag["stderr"] ** 2 for tag in tags)) / len(tags),
    }


def reserve_folder(folder: Path, settings: Mapping[str, Any], dist: Distributed) -> None:
    """Reserves ``folder`` for the evaluation with these ``settings``, finished or not.

    Raises ValueError with the differing settings if the folder holds another evaluation or the
    ranks differ.  The path of the LoRA ("lora") may differ if its content ("lora_sha256") does not,
    and so may reward options that only affect device and speed.  Rewards may be added.
    """
    wanted = json.loads(json.dumps(settings))
    for found in dist.gather_objects(wanted):
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise ValueError(
                    f"ranks differ in {key}: {found.get(key)!r} and {wanted.get(key)!r} (for a "
                    "run that is still training, give a checkpoint, not the run directory)"
                )
    path = folder / SETTINGS_FILE
    lines: list[str] = []
    # One rank reads, as the others could see a half-written file.
    begun = {other.name for other in folder.glob("*")} - {SETTINGS_FILE, LOCK_FILE}
    if dist.is_main and path.exists() and begun:
        # Settings that an earlier version did not have were at their present defaults.
        defaults = {key: DEFAULTS[key] for key in wanted if key in DEFAULTS}
        old, new = _determining(defaults | read_object(path)), _determining(wanted)
        added = {key for key in old.keys() ^ new.keys() if key.startswith("reward_options.")}
        lines = [
            f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
            for key in sorted((old.keys() | new.keys()) - added)
            if old.get(key) != new.get(key)
        ]
    elif dist.is_main:
        write_json(path, wanted)
    if lines := dist.broadcast_object(lines):
        raise ValueError(
            f"{folder} holds another evaluation:\n  "
            + "\n  ".join(lines)
            + "\nuse another --output_dir or remove that folder"
        )


def _determining(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that determine images and scores, with ``reward_options.NAME`` of each reward
    that is not scored by a server.
    """
    options, reward_servers = settings.get("reward_options", {}), settings.get("reward_servers", {})
    own = {n: options.get(n, {}) for n in settings.get("rewards", {}) if n not in reward_servers}
    kept = {
        key: value for key, value in settings.items() if key not in ("lora", *PER_REWARD_SETTINGS)
    }
    return kept | {f"reward_options.{name}": o for name, o in deciding_options(own).items()}


def finished(folder: Path) -> dict[str, Any] | None:
    """Contents of ``average_scores.json``; None if the evaluation in ``folder`` is not finished."""
    path = folder / AVERAGES_FILE
    return {"settings": {}} | read_object(path) if path.is_file() else None


def image_path(folder: Path, line: int) -> Path:
    return folder / IMAGES / f"{line:06d}.png"


def has_images(folder: Path, lines: Iterable[int]) -> bool:
    """True if the images of all ``lines`` exist."""
    return all(image_path(folder, line).is_file() for line in lines)


def save_images(images: Images, lines: Iterable[int], folder: Path) -> None:
    """Writes the images of test ``lines``; non-finite images are fully transparent."""
    for image, line in zip(images.to_pil(), lines, strict=True):
        save_png(image, image_path(folder, line))


def read_images(folder: Path, lines: Iterable[int]) -> Images:
    """Reads the images of ``save_images``.  Raises FileNotFoundError if one is missing."""
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
    """Writes the scores of ``lines`` by ``rewards``."""
    parts = {name: _without_nan(part.tolist()) for name, part in scores.parts.items()}
    numbers = {"total": scores.total.tolist(), "parts": parts}
    write_json(_progress_path(folder, lines), {"by": _identity(rewards), **numbers})


def read_scores(folder: Path, lines: range, rewards: RewardSet) -> Scores | None:
    """Reads the scores of ``write_scores`` for ``lines`` and equal ``rewards``, if any."""
    path = _progress_path(folder, lines)
    found = read_object(path) if path.is_file() else {}
    if found.get("by") != _identity(rewards):
        return None
    parts = {name: _float64(values) for name, values in found["parts"].items()}
    return Scores(_float64(found["total"]), parts)


def _identity(rewards: RewardSet) -> dict[str, Any]:
    """Weights and options that determine the scores of ``rewards``, as read from JSON."""
    options = {name: rewards.options.get(name, {}) for name in rewards.weights}
    own = {"weights": rewards.weights, "options": deciding_options(options)}
    return json.loads(json.dumps(own))


def _float64(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)


def read_results(
    folder: Path, prompts: list[Prompt]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Reads the scores and settings of ``write_results``.

    Raises FileNotFoundError if they are missing, ValueError if damaged or for other prompts.
    """
    averages = finished(folder)
    if averages is None or not (folder / RESULTS_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {RESULTS_FILE}: evaluate with --save_images first"
        )
    rows = read_lines(folder / RESULTS_FILE)
    if any(not isinstance(row.get("scores"), dict) for row in rows):
        raise ValueError(f"{folder / RESULTS_FILE} is damaged: a line has no scores")
    if [row.get("prompt") for row in rows] != [prompt.text for prompt in prompts]:
        raise ValueError(
            f"{folder} holds results of {len(rows)} other prompts than the {len(prompts)} lines to "
            "score: use the data set and --limit of the images"
        )
    scores = {
        name: [math.nan if row["scores"][name] is None else row["scores"][name] for row in rows]
        for name in rows[0]["scores"]
    }
    return scores, averages["settings"]


def merge_scores(
    new: Evaluation, scores: dict[str, list[float]], weights: Mapping[str, float]
) -> Evaluation:
    """``new`` with the earlier ``scores`` of the same images, and the total by ``weights``."""
    joined = scores | new.scores
    rows = range(len(new.prompts))
    joined["total"] = [sum(w * joined[name][row] for name, w in weights.items()) for row in rows]
    return replace(new, scores=joined)


def merge_settings(before: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by reward: those of ``record`` for its rewards, else those of ``before``."""
    scored = record["rewards"]
    return {
        key: {name: value for name, value in before.get(key, {}).items() if name not in scored}
        | {name: value for name, value in record[key].items() if name in scored}
        for key in PER_REWARD_SETTINGS
    }


def write_results(evaluation: Evaluation, folder: Path, *, settings: Mapping[str, Any]) -> None:
    """Writes ``evaluation_results.jsonl`` (one object per sample), then ``average_scores.json``,
    which marks the evaluation as finished; removes ``progress/``.
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
    """Writes ``value`` to ``path`` atomically; creates the folder if needed."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def _without_nan(value: Any) -> Any:
    """``value`` with None for NaN at any depth, as JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
