"""Fetches the weights that the rewards need, and checks those that are there.

    python scripts/download.py rewards               # or all: of every reward
    python scripts/download.py geneval pickscore     # of some
    python scripts/download.py --list                # what there is to fetch, and what is here

Files go to reward_ckpts/, or where DIFFUSION_NFT_REWARD_CKPTS says; models of the Hugging Face hub
go to the hub's cache (HF_HOME), where the rewards look for them.  HF_ENDPOINT names a mirror of the
hub, HTTPS_PROXY a proxy.  A download that was cut off goes on where it stopped.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tabulate import tabulate

from diffusion_nft.command_line import command
from diffusion_nft.data.download import fetch, fetch_from_hub, in_hub_cache
from diffusion_nft.rewards.weights import (
    HUB_MODELS,
    NOTHING_TO_FETCH,
    WEIGHT_FILES,
    HubModel,
    weights_root,
)

GROUP_NAMES = ("rewards", "all")
NAMES = sorted({*WEIGHT_FILES, *HUB_MODELS, *NOTHING_TO_FETCH})


@dataclass(frozen=True)
class Item:
    """One thing that a reward needs; ``fetch`` returns what to tell the user."""

    what: str
    where: str
    present: Callable[[], bool]
    fetch: Callable[[], str]


def items(name: str) -> list[Item]:
    """What the reward ``name`` needs; nothing for one that needs no weights."""
    needed: list[Item] = []
    if name in WEIGHT_FILES:
        file = WEIGHT_FILES[name]
        path = weights_root() / file.file_name
        get = partial(fetch, file.url, path, sha256=file.sha256)
        needed.append(Item(file.file_name, str(path.parent), path.is_file, lambda: str(get())))
    for model in HUB_MODELS.get(name, ()):
        what = f"{model.repo} ({', '.join(model.parts)})"
        here = partial(in_hub_cache, model.repo, model.parts)
        needed.append(Item(what, "hub cache", here, partial(fetch_model, model)))
    return needed


def fetch_model(model: HubModel) -> str:
    """Fetches ``model`` into the hub's cache."""
    return f"{', '.join(model.parts)} of {model.repo} in {fetch_from_hub(model.repo, model.parts)}"


def print_table() -> None:
    """A line for each item: the reward, what, where, whether it is there."""
    from huggingface_hub import constants

    rows = []
    for name in NAMES:
        rows += [
            (name, item.what, item.where, "yes" if item.present() else "no") for item in items(name)
        ] or [(name, f"nothing: {NOTHING_TO_FETCH[name]}", "", "")]
    print(tabulate(rows, ("reward", "what", "where", "present"), tablefmt="plain"))
    print(f"hub cache: {constants.HF_HUB_CACHE}")


def main() -> int:
    """The exit status: 1 if something could not be fetched or is not what it should be."""
    choices = [*GROUP_NAMES, *NAMES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="*", help=", ".join(choices))
    parser.add_argument("--list", action="store_true", help="show what there is, fetch nothing")
    args = parser.parse_args()
    if args.list:
        print_table()
        return 0
    unknown = [name for name in args.name if name not in choices]
    if unknown or not args.name:
        parser.error(f"{', '.join(unknown) or 'nothing'} named; choose from {', '.join(choices)}")
    status = 0
    for name in NAMES if set(GROUP_NAMES) & set(args.name) else args.name:
        needed = items(name)
        if not needed:
            print(f"{name}: nothing to fetch, {NOTHING_TO_FETCH[name]}")
        for item in needed:
            try:
                print(f"{name}: {item.fetch()}", flush=True)
            except OSError as error:
                print(f"{name}: error: {error}", file=sys.stderr, flush=True)
                status = 1
    return status


if __name__ == "__main__":
    command(main)
