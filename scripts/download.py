"""Downloads the weights of the rewards, and verifies those already present.

    python scripts/download.py rewards               # or all: every reward
    python scripts/download.py geneval pickscore     # some rewards
    python scripts/download.py --list                # show the weights and which are present

Files are stored in reward_ckpts/ or DIFFUSION_NFT_REWARD_CKPTS, models of the Hugging Face hub in
the hub's cache (HF_HOME).  HF_ENDPOINT is a mirror of the hub, HTTPS_PROXY a proxy.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from huggingface_hub import constants
from tabulate import tabulate

from diffusion_nft.command_line import command, script_parser
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
    """Weights of the reward ``name``: file or model, place, presence, and a call to fetch it."""
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
    return f"{what} is in {fetch_from_hub(*arguments)} (as published)"


def print_table() -> None:
    rows = []
    for name in NAMES:
        rows += [
            (name, what, where, "yes" if here else "no") for what, where, here, _ in needs(name)
        ] or [(name, f"nothing: {NOTHING_TO_FETCH[name]}", "", "")]
    print(tabulate(rows, ("reward", "what", "where", "present"), tablefmt="plain"))
    print(f"hub cache: {constants.HF_HUB_CACHE}")


def main() -> int:
    """Returns 1 if a download or its verification failed."""
    choices = [*GROUP_NAMES, *NAMES]
    parser = script_parser(__doc__)
    parser.add_argument("name", nargs="*", help=", ".join(choices))
    parser.add_argument("--list", action="store_true", help="show the weights, fetch nothing")
    args = parser.parse_args()
    if args.list:
        print_table()
        return 0
    unknown = [name for name in args.name if name not in choices]
    if unknown or not args.name:
        problem = f"unknown name {unknown[0]!r}" if unknown else "no name given"
        parser.error(f"{problem}; choose from {', '.join(choices)}")
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
