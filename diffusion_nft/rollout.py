"""An epoch's samples: latents, images and scores, from the old policy and any solver."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ml_collections import ConfigDict
from torch import Tensor

from diffusion_nft.advantages import statistics
from diffusion_nft.data.prompts import Prompt, shard
from diffusion_nft.distributed.preemption import requested
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.images import THUMBNAIL, Images, diversity, thumbnails
from diffusion_nft.models import Model
from diffusion_nft.models.embeddings import Conditioning
from diffusion_nft.models.sampling import Sampler
from diffusion_nft.randomness import generator
from diffusion_nft.rewards.combine import RewardError, RewardSet, Scores
from diffusion_nft.rewards.worker import ScoringWorker, gather_scores
from diffusion_nft.solvers import Trajectory

# Images per row of the logged grids.
GRID_COLUMNS = 4


@dataclass(frozen=True)
class Rollout:
    """An epoch's N samples: the scores of all, the latents of the n on this rank."""

    scores: Scores  # of all N samples, in order
    diversity: float
    indices: range  # of this rank's samples
    x0: Tensor  # [n, C, h, w]
    cond: Conditioning  # of this rank's prompts, one row each
    cond_rows: list[int]  # row of ``cond`` per sample
    x0_rms: float  # root mean square of all scored latents
    sigmas: Tensor  # [S]: distinct non-zero noise levels visited by the solver; empty if n is 0
    images: Images  # up to num_images of this rank's, for the log
    shown: list[int]  # indices of these images
    trajectory: Trajectory | None = None  # xs [S + 1, n, C, h, w]; only if requested


def rollout_metrics(rollout: Rollout, r: Tensor, group_size: int) -> dict[str, float | Tensor]:
    """``reward/*`` of an epoch; ``r: [N]``: optimality probabilities of its samples."""
    stats = statistics(rollout.scores.total, group_size)
    values: dict[str, float | Tensor] = {
        "reward/mean": stats.mean,
        "reward/std": stats.std,
        "reward/frac_zero_std": stats.frac_zero_std,
        "reward/diversity": rollout.diversity,
        "reward/x0_rms": rollout.x0_rms,
    }
    for name, scores in rollout.scores.parts.items():
        values[f"reward/{name}"] = float(scores.nanmean())
    return values | {"reward/optimality": r}


def shown_samples(indices: range, group_size: int, number: int) -> list[int]:
    """Up to ``number`` of a rank's samples for a grid of GRID_COLUMNS columns, from as many prompts
    as the grid has rows: each prompt fills one or more rows if this rank has enough of its samples.
    """
    groups: dict[int, list[int]] = {}
    for i in indices:
        groups.setdefault(i // group_size, []).append(i)
    lines, more = divmod(math.ceil(number / GRID_COLUMNS), max(len(groups), 1))
    shares = [GRID_COLUMNS * (lines + (k < more)) for k in range(len(groups))]
    parts = (group[:share] for group, share in zip(groups.values(), shares, strict=True))
    return [i for part in parts for i in part][:number]


def generate_rollouts(
    model: Model,
    prompts: list[Prompt],
    rewards: RewardSet,
    config: ConfigDict,
    *,
    epoch: int,
    dist: Distributed,
    num_images: int,
    trajectories: bool = False,
    ahead: Sequence[Prompt] = (),
) -> Rollout:
    """Samples ``num_image_per_prompt`` images of each prompt with the model's active adapter.

    Sample i of the epoch belongs to group ``i // num_image_per_prompt``; its noise is keyed by
    (seed, epoch, i).  Each rank samples a contiguous, near-equal share, and scores in a background
    thread.  ``trajectories``: also return the solver's intermediate latents.  ``ahead``: prompts of
    the next epoch, encoded while the last images are scored, unless text encoders are offloaded.
    Raises RewardError on every rank if a reward fails on any, Preempted on every rank if a stop was
    requested on any.
    """
    size = config.sample.num_image_per_prompt
    indices = shard(len(prompts) * size, dist.rank, dist.world_size)
    sampler = Sampler.for_rollouts(config)
    first = indices.start // size
    groups_here = slice(first, -(-indices.stop // size) if indices else first)
    cond = sampler.encode(model, prompts[groups_here]).to(model.device)
    cond_rows = [i // size - first for i in indices]
    shown = shown_samples(indices, size, num_images)
    latents, chains, thumbs, kept, sigmas = [], [], [], [], torch.zeros(0)
    with (
        dist.progress("images drawn", len(indices)) as drawn,
        dist.progress("images scored", len(indices)) as scored,
        ScoringWorker(dist.device, scored.update) as worker,
    ):
        for start in range(0, len(indices), config.sample.batch_size):
            rows = indices[start : start + config.sample.batch_size]
            batch = [prompts[i // size] for i in rows]
            texts = [prompt.text for prompt in batch]
            generators = [generator(config.seed, epoch, i, "rollout") for i in rows]
            here = cond.select(cond_rows[start : start + len(rows)])
            if trajectories:
                chain, sigmas = sampler.trajectory(model, here, generators)
                chains.append(chain)
                x0 = chain.xs[-1]
            else:
                x0, sigmas = sampler(model, here, generators)
            images = model.decode(x0)
            drawn.update(len(rows))
            metadata = [prompt.metadata for prompt in batch]
            names = [f"sample {i} of epoch {epoch}" for i in rows]
            if not worker.submit(rewards, images, texts, metadata, names):
                break
            latents.append(x0)
            thumbs.append(thumbnails(images))
            if chosen := [i - rows.start for i in rows if i in shown]:
                kept.append(images[chosen].to("cpu"))
        # Offloaded encoders would compete with the reward models for the device's memory.
        early = config.perf.embed_cache_gb and not config.perf.offload_text_encoders
        if early and not requested():
            sampler.encode(model, ahead[groups_here])
        empty = torch.zeros(0, 3 * THUMBNAIL**2)
        scores, all_thumbs = gather_scores(
            dist, worker.results, torch.cat([empty, *thumbs]), rewards.max_unscored
        )
    shape = model.latent_shape(sampler.size)
    x0 = torch.cat(latents) if latents else torch.zeros(0, *shape)
    has_score = ~scores.total.isnan()
    if not has_score.any():
        raise RewardError(f"none of the {len(has_score)} images has a score: {scores.reasons[0]}")
    mine = x0[has_score[indices.start : indices.stop].to(x0.device)]
    squares = dist.sum_numbers({"x0": mine.double().square().sum()})
    num_values = int(has_score.sum()) * math.prod(shape)
    groups = [i // size for i in range(len(prompts) * size)]
    trajectory = None
    if chains:
        trajectory = Trajectory(*(torch.cat(parts, dim=1) for parts in zip(*chains, strict=True)))
    return Rollout(
        scores=scores,
        diversity=diversity(all_thumbs, groups),
        indices=indices,
        x0=x0,
        x0_rms=math.sqrt(squares["x0"] / num_values),
        cond=cond,
        cond_rows=cond_rows,
        sigmas=sigmas,
        images=Images.concatenate(kept),
        shown=shown,
        trajectory=trajectory,
    )
