"""Evaluation: every line of a test set is one sample; the same numbers on any number of ranks.

Test lines are cut into fixed chunks by line number and the chunks dealt to the ranks, so a picture
is always made beside the same neighbours; its noise is keyed by (seed, line number).  Means are
taken in float64 in line order.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion_nft.data import Prompt
from diffusion_nft.distributed import Distributed
from diffusion_nft.pictures import to_pil
from diffusion_nft.randomness import generator
from diffusion_nft.rewards.combine import RewardSet, Scores
from diffusion_nft.rollout import (
    THUMBNAIL,
    Background,
    Sampler,
    diversity,
    gather_scores,
    thumbnails,
)

_MODEL_BASED = ("imagereward", "pickscore", "aesthetic", "unifiedreward", "clipscore", "hpsv2")

# The metric that tells how many lines an evaluation had.
NUM_SAMPLES = "eval/num_samples"
RESULTS_FILE, AVERAGES_FILE = "evaluation_results.jsonl", "average_scores.json"

# What a test set is usually scored by.
DEFAULT_REWARDS: dict[str, tuple[str, ...]] = {
    "geneval": ("geneval",),
    "ocr": ("ocr",),
    "pickscore": _MODEL_BASED,
    "drawbench": _MODEL_BASED,
    "shapes": ("shapes",),
}


def choose_rewards(
    dataset: str, chosen: str, skipped: str, run: Mapping[str, Any]
) -> dict[str, float]:
    """Reward -> weight of a stand-alone evaluation of ``dataset``.

    ``chosen`` and ``skipped`` are comma-separated names; none chosen: the usual ones of the data
    set, else those of the flat configuration ``run``.  Weights are the run's where it has them (0
    for what it held out), so that "total" is what training logged, else 1.  Raises ValueError if
    nothing is left or a skipped one is not there.
    """
    held_out = run.get("eval.rewards", ())
    trained = [key.removeprefix("reward_fn.") for key in run if key.startswith("reward_fn.")]
    usual = DEFAULT_REWARDS.get(Path(dataset).name, (*trained, *held_out))
    names = chosen.split(",") if chosen else usual
    without = skipped.split(",") if skipped else []
    if unknown := [reward for reward in without if reward not in names]:
        raise ValueError(f"--skip_rewards {unknown[0]!r} is not among {', '.join(names)}")
    weights = {
        name: run.get(f"reward_fn.{name}", 0.0 if name in held_out else 1.0)
        for name in names
        if name not in without
    }
    if not weights:
        raise ValueError(
            "--skip_rewards leaves no reward"
            if names
            else f"dataset {dataset!r} has no usual rewards: choose with --reward"
        )
    return weights


@dataclass(frozen=True)
class Evaluation:
    """Scores of N test lines, in line order, and a few pictures of the first lines."""

    prompts: list[Prompt]
    scores: dict[str, list[float]]  # "total", each reward and component -> N numbers
    diversity: float
    pictures: Tensor  # [<= num_pictures, 3, H, W], rank 0's share of the first lines
    picture_lines: list[int]

    def averages(self) -> dict[str, Any]:
        """What ``average_scores.json`` holds: means and standard errors, also per tag; no NaN."""
        tags = [str(prompt.metadata.get("tag", "")) for prompt in self.prompts]
        summary: dict[str, Any] = {
            "num_samples": len(self.prompts),
            "num_prompts": len({prompt.text for prompt in self.prompts}),
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


def evaluate(
    model: Any,
    prompts: list[Prompt],
    rewards: RewardSet,
    sampler: Sampler,
    *,
    seed: int,
    batch_size: int,
    dist: Distributed,
    num_pictures: int = 0,
    image_dir: Path | None = None,
) -> Evaluation:
    """Samples and scores every line of ``prompts`` with the model's active adapter.

    ``image_dir``: where to write every picture as ``<line>.png``.  Raises RewardError on every rank
    if a reward fails on any.
    """

    # All at once, kept on the host: offloaded text encoders come to the device only once.
    mine = _chunks(len(prompts), batch_size, dist)[dist.rank]
    texts = dict.fromkeys(prompts[line].text for chunk in mine for line in chunk)
    row = {text: i for i, text in enumerate(texts)}
    embedded = model.encode_cached(list(row))

    def draw(lines: range) -> Tensor:
        generators = [generator(seed, "eval", line) for line in lines]
        rows = torch.tensor([row[prompts[line].text] for line in lines])
        cond = embedded.select(rows).to(model.device)
        return model.decode(sampler(model, cond, generators)[0])

    return _score_lines(draw, prompts, rewards, batch_size, dist, num_pictures, image_dir)


def rescore(
    prompts: list[Prompt],
    rewards: RewardSet,
    image_dir: Path,
    *,
    batch_size: int,
    dist: Distributed,
) -> Evaluation:
    """Scores the pictures that an earlier ``evaluate`` wrote into ``image_dir``.

    Raises FileNotFoundError if the picture of a line is missing.
    """

    def read(lines: range) -> Tensor:
        return torch.stack([read_picture(picture_path(image_dir, line)) for line in lines])

    return _score_lines(read, prompts, rewards, batch_size, dist, num_pictures=0, image_dir=None)


def read_results(
    folder: Path, prompts: list[Prompt]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Scores and settings that ``write_results`` left in ``folder``.

    Raises FileNotFoundError if it left none, ValueError if they are not of ``prompts``.
    """
    if not (folder / RESULTS_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {RESULTS_FILE}: evaluate with --save_images first"
        )
    lines = (folder / RESULTS_FILE).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    if [row["prompt"] for row in rows] != [prompt.text for prompt in prompts]:
        raise ValueError(
            f"{folder} holds results of {len(rows)} other prompts than the {len(prompts)} lines to "
            "score: give the same data set and --limit as when they were drawn"
        )
    scores = {
        name: [math.nan if row["scores"][name] is None else row["scores"][name] for row in rows]
        for name in rows[0]["scores"]
    }
    averages = json.loads((folder / AVERAGES_FILE).read_text(encoding="utf-8"))
    return scores, averages["settings"]


def beside(
    new: Evaluation,
    weights: Mapping[str, float],
    scores: dict[str, list[float]],
    settings: dict[str, Any],
) -> tuple[Evaluation, dict[str, Any]]:
    """``new``, scored with ``weights``, joined with the earlier ``scores`` of the same pictures.

    Returns the joined evaluation, whose total is of all rewards, and the settings that the pictures
    were drawn with.
    """
    weights = settings["rewards"] | dict(weights)
    joined = scores | new.scores
    lines = range(len(new.prompts))
    joined["total"] = [sum(w * joined[name][line] for name, w in weights.items()) for line in lines]
    return replace(new, scores=joined), settings | {"rewards": weights}


def _chunks(num_lines: int, size: int, dist: Distributed) -> list[list[range]]:
    """The fixed chunks of lines, dealt to the ranks: a list for each."""
    chunks = [range(start, min(start + size, num_lines)) for start in range(0, num_lines, size)]
    return [chunks[rank :: dist.world_size] for rank in range(dist.world_size)]


def _score_lines(
    pictures_of: Callable[[range], Tensor],
    prompts: list[Prompt],
    rewards: RewardSet,
    batch_size: int,
    dist: Distributed,
    num_pictures: int,
    image_dir: Path | None,
) -> Evaluation:
    """Deals fixed chunks of lines to the ranks, scores in the background, restores the order."""
    by_rank = _chunks(len(prompts), batch_size, dist)
    mine = by_rank[dist.rank]
    thumbs, kept, kept_lines = [], [], []

    def score(images: Tensor, lines: range) -> Scores:
        if image_dir is not None:
            save_pictures(images, lines, image_dir)
        texts = [prompts[line].text for line in lines]
        return rewards(images, texts, [prompts[line].metadata for line in lines])

    with Background(dist.device) as background:
        for chunk in tqdm(mine, desc="evaluate", disable=not dist.is_main, leave=False):
            images = pictures_of(chunk)
            if not background.submit(score, images, chunk):
                break
            thumbs.append(thumbnails(images))
            first = max(0, min(num_pictures - chunk.start, len(chunk)))
            kept.append(images[:first].cpu())
            kept_lines += chunk[:first]
        no_thumbs = torch.zeros(0, 3 * THUMBNAIL**2)
        scores, all_thumbs = gather_scores(
            dist, background.results, torch.cat([no_thumbs, *thumbs])
        )
    order = torch.tensor([line for part in by_rank for chunk in part for line in chunk]).argsort()
    named = {"total": scores.total, **scores.parts}
    return Evaluation(
        prompts=prompts,
        scores={name: values[order].tolist() for name, values in named.items()},
        diversity=diversity(all_thumbs[order], [prompt.text for prompt in prompts]),
        pictures=torch.cat(kept) if kept else torch.zeros(0, 3, 1, 1),
        picture_lines=kept_lines,
    )


def save_pictures(images: Tensor, lines: Iterable[int], folder: Path) -> None:
    """Writes ``images: [B, 3, H, W]`` as ``<line>.png`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture, line in zip(to_pil(images), lines, strict=True):
        picture.save(picture_path(folder, line))


def read_picture(path: Path) -> Tensor:
    """The PNG ``path`` as float32 ``[3, H, W]`` in [0, 1]."""
    with Image.open(path) as picture:
        values = np.array(picture.convert("RGB"))
    return torch.from_numpy(values).permute(2, 0, 1).to(torch.float32) / 255


def picture_path(folder: Path, line: int) -> Path:
    """The file of test line ``line``."""
    return folder / f"{line:06d}.png"


def _without_nan(value: Any) -> Any:
    """NaN as None, at any depth: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def write_results(
    evaluation: Evaluation, folder: Path, *, image_dir: Path | None, settings: dict
) -> None:
    """Writes ``evaluation_results.jsonl`` (one object a sample) and ``average_scores.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RESULTS_FILE, "w", encoding="utf-8") as file:
        for line, prompt in enumerate(evaluation.prompts):
            values = {name: numbers[line] for name, numbers in evaluation.scores.items()}
            row = {
                "sample_id": line,
                "prompt": prompt.text,
                "metadata": prompt.metadata,
                "scores": _without_nan(values),
                "image_path": str(picture_path(image_dir, line).relative_to(folder))
                if image_dir
                else None,
            }
            file.write(json.dumps(row) + "\n")
    text = json.dumps({"settings": settings, **evaluation.averages()}, indent=2)
    (folder / AVERAGES_FILE).write_text(text + "\n", encoding="utf-8")
