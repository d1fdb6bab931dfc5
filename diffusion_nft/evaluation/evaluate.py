"""Evaluation of a test set: one sample per line, with scores independent of the number of ranks.

Lines are split into fixed chunks by line number, which are distributed over the ranks, so that the
batch of an image is always the same.  Noise depends on (seed, line number).  Means are taken in
float64 in line order.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict

from diffusion_nft.data.prompts import Prompt, draw_lines
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.evaluation.options import EvalOptions
from diffusion_nft.evaluation.results import (
    Evaluation,
    finished,
    has_images,
    merge_scores,
    merge_settings,
    read_images,
    read_results,
    read_scores,
    reserve_folder,
    save_images,
    write_results,
    write_scores,
)
from diffusion_nft.images import THUMBNAIL, Images, diversity, thumbnails
from diffusion_nft.models import Model
from diffusion_nft.models.sampling import Sampler
from diffusion_nft.randomness import generator
from diffusion_nft.rewards.combine import RewardSet, Scores
from diffusion_nft.rewards.worker import ScoringWorker, gather_scores

_MODEL_BASED = ("imagereward", "pickscore", "aesthetic", "unifiedreward", "clipscore", "hpsv2")

# Rewards of a test set if none are chosen.
DEFAULT_REWARDS: dict[str, tuple[str, ...]] = {
    "geneval": ("geneval",),
    "ocr": ("ocr",),
    "pickscore": _MODEL_BASED,
    "drawbench": _MODEL_BASED,
    "shapes": ("shapes",),
}


@dataclass(frozen=True)
class Task:
    """Evaluation of one test set, with its results in ``folder``."""

    dataset: str
    prompts: list[Prompt]
    lines: list[int]  # line numbers of the prompts in the test set
    weights: dict[str, float]  # of the rewards
    folder: Path


def choose_rewards(
    dataset: str, chosen: str, skipped: str, run: Mapping[str, Any]
) -> dict[str, float]:
    """Reward -> weight of a stand-alone evaluation of ``dataset``.

    ``chosen`` and ``skipped`` are comma-separated names.  If none are chosen: the defaults of the
    data set, else the rewards of the flat configuration ``run``.  Weights are those of the run (0
    for held-out rewards), so that "total" is the total of training, else 1.  Raises ValueError if
    no reward is left or a skipped reward is not among them.
    """
    held_out = run.get("eval.held_out_rewards", ())
    trained = [key.removeprefix("reward_fn.") for key in run if key.startswith("reward_fn.")]
    default = DEFAULT_REWARDS.get(Path(dataset).name, (*trained, *held_out))
    names = chosen.split(",") if chosen else default
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
            else f"dataset {dataset!r} has no default rewards: choose with --reward"
        )
    return weights


def evaluate(
    model: Model,
    prompts: list[Prompt],
    rewards: RewardSet,
    config: ConfigDict,
    *,
    dist: Distributed,
    lines: Sequence[int] | None = None,
    num_images: int = 0,
    folder: Path | None = None,
) -> Evaluation:
    """Samples and scores every line of ``prompts`` with the model's active adapter.

    ``config`` has ``resolution``, ``sample.negative_prompt`` and ``eval.{seed, solver, num_steps,
    guidance_scale, batch_size, resolution}``.  ``lines``: line number of each prompt in
    the test set, which determines its noise (default: its index).  ``num_images``: number of images
    to return per rank.  ``folder``: folder for all images and the scores of finished chunks; those
    left there by an interrupted call are reused (``complete`` checks that the settings are the
    same).  Raises RewardError on every rank if a reward fails on any.
    """
    seed, batch_size = config.eval.seed, config.eval.batch_size
    places = range(len(prompts)) if lines is None else lines
    sampler = Sampler.for_evaluation(config)
    mine = _chunks(len(prompts), batch_size, dist)[dist.rank]
    drawn = {
        chunk
        for chunk in mine
        if folder is not None and has_images(folder, [places[i] for i in chunk])
    }
    undrawn = [i for chunk in mine if chunk not in drawn for i in chunk]
    # Encode all texts first and keep them on the host: offloaded text encoders are moved only once.
    unique = {(prompts[i].text, prompts[i].negative): prompts[i] for i in undrawn}
    row = {key: i for i, key in enumerate(unique)}
    embedded = sampler.encode(model, list(unique.values()))

    def draw(chunk: range) -> Images:
        numbers = [places[i] for i in chunk]
        if folder is not None and chunk in drawn:
            return read_images(folder, numbers).to(dist.device)
        generators = [generator(seed, "eval", number) for number in numbers]
        rows = [row[prompts[i].text, prompts[i].negative] for i in chunk]
        cond = embedded.select(rows).to(model.device)
        images = model.decode(sampler(model, cond, generators)[0])
        if folder is not None:
            saved.append(saver.submit(save_images, images, numbers, folder))
        return images

    saved: list[Future[None]] = []
    # Images are saved in a separate thread, without waiting for their scores.
    with ThreadPoolExecutor(1) as saver:
        result = _collect(draw, rewards, prompts, places, folder, batch_size, dist, num_images)
    for future in saved:
        future.result()
    if folder is not None:
        dist.barrier()  # until all ranks have saved their images
    return result


def complete(
    task: Task,
    options: EvalOptions,
    record: Mapping[str, Any],
    dist: Distributed,
    *,
    model: Callable[[], Model],
    keep_images: bool,
) -> None:
    """Completes the evaluation of ``task`` in its folder, and writes its results.

    ``record``: all settings that determine the images, and ``PER_REWARD_SETTINGS``.  ``model`` is
    called, and rewards are built, only if images or scores are missing; scores of earlier rewards
    are kept.  Raises ValueError if the folder holds other images, and the errors of ``evaluate``.
    """
    folder, prompts, lines = task.folder, task.prompts, task.lines
    reserve_folder(folder, record, dist)
    # From one rank, as a network file system may show different states to others.
    done, drawn = dist.broadcast_object((finished(folder), has_images(folder, lines)))
    before = done["settings"] if done else {}
    earlier = before.get("rewards", {})
    missing = {name: weight for name, weight in task.weights.items() if name not in earlier}
    if not missing and (drawn or not keep_images):
        dist.log(f"already finished: {folder}")
        return
    record = {**record, **merge_settings(before, {**record, "rewards": missing})}
    if drawn:
        size = options.config.eval.batch_size
        scorer = options.rewards(missing, dist)
        result = rescore(prompts, lines, scorer, folder, batch_size=size, dist=dist)
        if earlier:
            result = merge_scores(result, read_results(folder, prompts)[0], record["rewards"])
    else:
        scorer, kept = options.rewards(record["rewards"], dist), folder if keep_images else None
        result = evaluate(
            model(), prompts, scorer, options.config, dist=dist, lines=lines, folder=kept
        )
    if dist.is_main:
        write_results(result, folder, settings=record)
    dist.barrier()


def rescore(
    prompts: list[Prompt],
    lines: Sequence[int],
    rewards: RewardSet,
    folder: Path,
    *,
    batch_size: int,
    dist: Distributed,
) -> Evaluation:
    """Scores the images that ``evaluate`` saved in ``folder`` for the same ``lines``.

    Scores of finished chunks are saved there until ``write_results``.  Raises FileNotFoundError if
    an image is missing.
    """

    def read(chunk: range) -> Images:
        return read_images(folder, [lines[i] for i in chunk]).to(dist.device)

    return _collect(read, rewards, prompts, lines, folder, batch_size, dist, num_images=0)


def _chunks(num_lines: int, size: int, dist: Distributed) -> list[list[range]]:
    """The fixed chunks of lines, by rank."""
    chunks = [range(start, min(start + size, num_lines)) for start in range(0, num_lines, size)]
    return [chunks[rank :: dist.world_size] for rank in range(dist.world_size)]


def _collect(
    images_of: Callable[[range], Images],
    rewards: RewardSet,
    prompts: list[Prompt],
    places: Sequence[int],
    folder: Path | None,
    batch_size: int,
    dist: Distributed,
    num_images: int,
) -> Evaluation:
    """Scores the images of this rank's chunks in the background and gathers the evaluation."""

    def score(images: Images, chunk: range) -> Scores:
        if folder is not None and (known := read_scores(folder, chunk, rewards)):
            return known
        chosen = [prompts[line] for line in chunk]
        scores = rewards(
            images,
            [p.text for p in chosen],
            [p.metadata for p in chosen],
            [f"line {places[line] + 1}" for line in chunk],
        )
        # If some images failed, a later call scores the chunk again.
        if folder is not None and not scores.reasons:
            write_scores(folder, chunk, scores, rewards)
        return scores

    by_rank = _chunks(len(prompts), batch_size, dist)
    mine = [line for chunk in by_rank[dist.rank] for line in chunk]
    shown = {mine[i] for i in draw_lines([prompts[line] for line in mine], num_images)}
    thumbs, kept, kept_lines = [], [], []
    with (
        dist.progress("evaluate: images drawn", len(mine)) as drawn,
        dist.progress("evaluate: images scored", len(mine)) as scored,
        ScoringWorker(dist.device, scored.update) as worker,
    ):
        for chunk in by_rank[dist.rank]:
            images = images_of(chunk)
            drawn.update(len(chunk))
            if not worker.submit(score, images, chunk):
                break
            thumbs.append(thumbnails(images))
            if chosen := [line for line in chunk if line in shown]:
                kept.append(images[[line - chunk.start for line in chosen]].to("cpu"))
                kept_lines += chosen
        no_thumbs = torch.zeros(0, 3 * THUMBNAIL**2)
        scores, all_thumbs = gather_scores(
            dist, worker.results, torch.cat([no_thumbs, *thumbs]), rewards.max_unscored
        )
    order = torch.tensor([line for part in by_rank for chunk in part for line in chunk]).argsort()
    named = {"total": scores.total, **scores.parts}
    return Evaluation(
        prompts=prompts,
        scores={name: values[order].tolist() for name, values in named.items()},
        diversity=diversity(all_thumbs[order], [prompt.text for prompt in prompts]),
        images=Images.concatenate(kept),
        image_lines=kept_lines,
        lines=places,
    )
