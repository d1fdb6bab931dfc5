"""The prompts and rewards of a configuration."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from diffusion_nft.data.prompts import (
    Prompt,
    changed_prompts,
    evaluated_lines,
    hash_splits,
    load_prompts,
    split_file,
)
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.rewards import IMAGE_STATISTICS, Reward, check_prompts
from diffusion_nft.rewards.combine import build_rewards


def reward_weights(config: ConfigDict) -> tuple[dict[str, float], dict[str, float]]:
    """Reward name -> weight for training and for evaluation, which adds held-out rewards and
    those of ``monitor.image_statistics`` with weight 0.
    """
    trained = config.reward_fn.to_dict()
    watched = (IMAGE_STATISTICS,) if config.monitor.image_statistics else ()
    held_out = [name for name in (*config.eval.held_out_rewards, *watched) if name not in trained]
    return trained, trained | dict.fromkeys(held_out, 0.0)


def load_checked_prompts(config: ConfigDict) -> tuple[list[Prompt], list[Prompt], list[int]]:
    """The training prompts of ``config``, the evaluated test prompts, and their line numbers in
    the test set.

    Raises ValueError or OSError if they cannot be read or a reward cannot score them, ImportError
    if a reward's package is missing.
    """
    train = load_prompts(config.dataset, "train")
    test, lines = evaluated_lines(config.dataset, config.eval.num_prompts)
    trained, evaluated = reward_weights(config)
    for split, names, prompts, places in (
        ("train", trained, train, None),
        ("test", evaluated, test, lines),
    ):
        try:
            check_prompts(
                names,
                [prompt.text for prompt in prompts],
                [prompt.metadata for prompt in prompts],
                options=config.reward_options.to_dict(),
                reward_servers=config.reward_servers.to_dict(),
                lines=places,
            )
        except ValueError as error:
            raise ValueError(f"{split_file(config.dataset, split)}: {error}") from error
    return train, test, lines


def hash_prompts(datasets: Iterable[str], dist: Distributed) -> dict[str, dict[str, str]]:
    """``hash_splits`` of ``datasets``; ValueError on every rank if the files of ranks differ."""
    own = hash_splits(datasets)
    first, *others = dist.gather_objects(own)
    for rank, theirs in enumerate(others, start=1):
        for dataset, split in changed_prompts(first, theirs):
            raise ValueError(
                f"dataset = {dataset!r}: the {split} prompts of rank {rank} differ from those of "
                "rank 0; all nodes need the same files"
            )
    return own


def build_named(config: ConfigDict, names: Iterable[str], dist: Distributed) -> dict[str, Reward]:
    """``build_rewards`` of ``names`` with the options and servers of ``config``.  The first rank of
    each node builds them first, as it may download weights.
    """
    with dist.main_first():
        return build_rewards(
            names,
            dist.device,
            options=config.reward_options.to_dict(),
            reward_servers=config.reward_servers.to_dict(),
            timeout=config.reward_server_timeout_seconds,
        )
