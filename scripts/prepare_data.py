"""Fetches the published prompt sets into dataset/, and checks those that are there.

    python scripts/prepare_data.py all                  # or: geneval ocr pickscore drawbench
    python scripts/prepare_data.py --list               # what there is to fetch, and what is here
    python scripts/prepare_data.py geneval --generate   # with training prompts of our own

Files that are there are kept, whoever made them.  --generate writes GenEval's train_metadata.jsonl
in the benchmark's grammar and the published mix of tags, apart from the test prompts, instead of
fetching it.  DIFFUSION_NFT_DATA_URL names a mirror of the published dataset/ folder, HTTPS_PROXY a
proxy.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from tabulate import tabulate

from diffusion_nft.command_line import command, user_path
from diffusion_nft.data.download import DownloadError, fetch
from diffusion_nft.data.prompts import (
    DATASET_ROOT,
    PUBLISHED_FILES,
    PUBLISHED_URL,
    Prompt,
    PublishedFile,
    files_of,
    load_prompts,
)
from diffusion_nft.rewards.geneval.training_prompts import generate
from diffusion_nft.rewards.geneval.vocabulary import check_metadata

URL_VARIABLE = "DIFFUSION_NFT_DATA_URL"
NUM_PROMPTS = 60_000
SEED = 0


def prepare(name: str, file: PublishedFile, root: Path) -> str:
    """Sees to it that ``file`` of the set ``name`` is there and sound; returns what was done.

    Raises OSError if it cannot be fetched, ValueError if a line is malformed.
    """
    found = files_of(root / name, file.split)
    if found and not is_published(name, file, root):
        said = f"{found[0]} is yours, kept"
    else:
        said = fetch_published(name, file, root)
    return f"{said}; {len(checked_prompts(root / name, file.split)):,} prompts"


def fetch_published(name: str, file: PublishedFile, root: Path) -> str:
    """Fetches ``file`` of the set ``name`` unless it is there; DownloadError if it is another."""
    base = (os.environ.get(URL_VARIABLE) or PUBLISHED_URL).rstrip("/")
    target = root / name / file.name
    return fetch(f"{base}/{name}/{file.name}", target, f"git:{file.git_blob}")


def is_published(name: str, file: PublishedFile, root: Path) -> bool:
    """Whether ``file`` is there and is the published one."""
    if not (root / name / file.name).is_file():
        return False
    try:
        # Of a file that is there, fetch only compares the hash.
        fetch_published(name, file, root)
    except DownloadError:
        return False
    return True


def checked_prompts(folder: Path, split: str) -> list[Prompt]:
    """The prompts of ``split``; ValueError with file and line if one is malformed."""
    prompts = load_prompts(folder, split)
    if folder.name == "geneval":
        (path,) = files_of(folder, split)
        for number, prompt in enumerate(prompts, start=1):
            try:
                check_metadata(prompt.metadata)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return prompts


def write_training_prompts(root: Path, num_prompts: int, seed: int) -> str:
    """Writes GenEval training prompts of our own unless some are there; returns what was done.

    Raises FileExistsError if there are others.
    """
    folder = root / "geneval"
    target = folder / "train_metadata.jsonl"
    if files_of(folder, "test"):
        test = [prompt.metadata for prompt in checked_prompts(folder, "test")]
        apart = f"apart from the {len(test):,} test prompts"
    else:
        test = []
        apart = (
            "NOT kept apart from the test prompts, for there are none: once test_metadata.jsonl is "
            "there, delete this file and generate it anew"
        )
    lines = generate(num_prompts, seed=seed, test=test)
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    found = files_of(folder, "train")
    if found and (found != [target] or target.read_bytes() != content):
        raise FileExistsError(f"{found[0]} is there and kept: delete it to generate another")
    how = "already there"
    if not found:
        how = "written"
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        part.write_bytes(content)
        os.replace(part, target)
    count = len(checked_prompts(folder, "train"))
    return f"{target} {how}, {count:,} prompts of seed {seed}, {apart}"


def print_table(root: Path) -> None:
    """A line for each published file: the set, where it is or would be, whether it is there."""
    rows = []
    for name, files in PUBLISHED_FILES.items():
        for file in files:
            found = files_of(root / name, file.split)
            path = found[0] if found else root / name / file.name
            kind = "as published" if is_published(name, file, root) else "yours"
            rows.append((name, str(path), kind if found else "no"))
    print(tabulate(rows, ("set", "file", "present"), tablefmt="plain"))


def parse_args() -> argparse.Namespace:
    """The command line; exits with status 2 if it makes no sense."""
    choices = ["all", *PUBLISHED_FILES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="*", help=", ".join(choices))
    parser.add_argument("--list", action="store_true", help="show what there is, fetch nothing")
    parser.add_argument(
        "--output_dir",
        type=user_path,
        default=DATASET_ROOT,
        help="default: the repository's dataset/",
    )
    parser.add_argument(
        "--generate", action="store_true", help="write GenEval training prompts, do not fetch them"
    )
    parser.add_argument("--num_prompts", type=int, help=f"of --generate; default: {NUM_PROMPTS:,}")
    parser.add_argument("--seed", type=int, help=f"of --generate; default: {SEED}")
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()
    if args.list:
        return args
    unknown = [name for name in args.name if name not in choices]
    if unknown or not args.name:
        parser.error(f"{', '.join(unknown) or 'nothing'} named; choose from {', '.join(choices)}")
    if "all" in args.name:
        args.name = list(PUBLISHED_FILES)
    if args.generate and "geneval" not in args.name:
        parser.error("--generate writes training prompts of geneval, which is not named")
    if not args.generate and (args.num_prompts, args.seed) != (None, None):
        parser.error("--num_prompts and --seed belong to --generate")
    args.num_prompts = NUM_PROMPTS if args.num_prompts is None else args.num_prompts
    args.seed = SEED if args.seed is None else args.seed
    return args


def main() -> int:
    """The exit status: 1 if something is missing, malformed or not what was asked for."""
    args = parse_args()
    root = args.output_dir
    if args.list:
        print_table(root)
        return 0
    status = 0
    for name in args.name:
        # Tests first: generated training prompts are kept apart from them.
        for file in sorted(PUBLISHED_FILES[name], key=lambda file: file.split):
            trains_geneval = name == "geneval" and file.split == "train"
            try:
                if args.generate and trains_geneval:
                    said = write_training_prompts(root, args.num_prompts, args.seed)
                else:
                    said = prepare(name, file, root)
                print(f"{name}: {said}", flush=True)
            except (OSError, ValueError) as error:
                hint = ""
                if trains_geneval and isinstance(error, DownloadError):
                    where = "" if root == DATASET_ROOT else f" --output_dir {root}"
                    hint = (
                        "; `python scripts/prepare_data.py geneval --generate"
                        f"{where}` writes training prompts without it"
                    )
                print(f"{name}: error: {error}{hint}", file=sys.stderr, flush=True)
                status = 1
    return status


if __name__ == "__main__":
    command(main)
