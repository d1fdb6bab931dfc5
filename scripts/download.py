"""Fetches the weights that the rewards need, and checks those that are there.

    python scripts/download.py rewards               # or all: of every reward
    python scripts/download.py geneval pickscore     # of some
    python scripts/download.py --list                # what there is to fetch, and what is here

Files go to reward_ckpts/, or where DIFFUSION_NFT_REWARD_CKPTS says; models of the Hugging Face hub
go to the hub's cache (HF_HOME), where the rewards look for them.  HF_ENDPOINT names a mirror of the
hub, HTTPS_PROXY a proxy.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from huggingface_hub import constants
from tabulate import tabulate

from diffusion_nft.command_line import command
from diffusion_nft.data.download import fetch, fetch_from_hub, in_hub_cache
from diffusion_nft.rewards.weights import (
    HUB_MODELS,
    NOTHING_TO_FETCH,
    WEIGHT_FILES,
    weights_root,
)

GROUP_NAMES = ("rewards", "all")
NAMES = sorted({*WEIGHT_FILES, *HUB_MODELS, *NOTHING_TO_FETCH})


def needs(name: str) -> Iterator[tuple[str, str, bool, Callable[[], str]]]:
    """What the reward ``name`` needs, where, whether it is there, and a call that fetches it."""
    root = weights_root()
    if name in WEIGHT_FILES:
        file = WEIGHT_FILES[name]
        path = root / file.file_name
        if file.repo:
            get = partial(from_hub, file.file_name, file.repo, [file.file_name], root)
        else:
            get = partial(fetch, file.url, path, f"sha256:{file.sha256}")
        yield file.file_name, str(root), path.is_file(), get
    for model in HUB_MODELS.get(name, ()):
        get = partial(from_hub, model.repo, model.repo, model.files)
        yield model.repo, "hub cache", in_hub_cache(model.repo, model.files), get


def from_hub(what: str, *arguments: Any) -> str:
    """``fetch_from_hub``, returning a line for the user."""
    return f"{what} is in {fetch_from_hub(*arguments)} (as published)"


def print_table() -> None:
    """A line for each need: the reward, what, where, whether it is there."""
    rows = []
    for name in NAMES:
        rows += [
            (name, what, where, "yes" if here else "no") for what, where, here, _ in needs(name)
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
        if name in NOTHING_TO_FETCH:
            print(f"{name}: nothing to fetch, {NOTHING_TO_FETCH[name]}")
        for *_, get in needs(name):
            try:
                print(f"{name}: {get()}", flush=True)
            except OSError as error:
                print(f"{name}: error: {error}", file=sys.stderr, flush=True)
                status = 1
    return status


if __name__ == "__main__":
    command(main)
