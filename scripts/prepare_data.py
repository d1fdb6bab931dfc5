"""Downloads the published prompt sets to dataset/, and checks those already present.

    python scripts/prepare_data.py all                  # or: geneval ocr pickscore drawbench
    python scripts/prepare_data.py --list               # show the files and which are present
    python scripts/prepare_data.py geneval --generate   # generate the training prompts

Existing files are kept.  --generate writes GenEval's train_metadata.jsonl with the grammar of the
benchmark and the published mix of tags, without the test prompts, instead of downloading it.
DIFFUSION_NFT_DATA_URL is a mirror of the published dataset/ folder, HTTPS_PROXY a proxy.
"""

import argparse
import sys
from pathlib import Path

from tabulate import tabulate

from diffusion_nft.command_line import command, positive, script_parser, user_path
from diffusion_nft.data.download import DownloadError
from diffusion_nft.data.prompts import (
    DATASET_ROOT,
    PUBLISHED_FILES,
    PublishedFile,
    files_of,
    load_prompts,
)
from diffusion_nft.data.published import fetch_published, is_published
from diffusion_nft.rewards.geneval.training_prompts import checked_prompts, write_training_prompts

NUM_PROMPTS, SEED = 60_000, 0


def prepare(name: str, file: PublishedFile, root: Path) -> str:
    """Downloads ``file`` of the set ``name`` unless its split is present; returns a message.

    Raises OSError if the download fails, ValueError if a line is malformed.
    """
    found = files_of(root / name, file.split)
    if found and not is_published(name, file, root):
        message = f"{found[0]} is yours, kept"
    else:
        message = fetch_published(name, file, root)
    read = checked_prompts if name == "geneval" else load_prompts
    return f"{message}; {len(read(root / name, file.split)):,} prompts"


def print_table(root: Path) -> None:
    rows = []
    for name, files in PUBLISHED_FILES.items():
        for file in files:
            found = files_of(root / name, file.split)
            path = found[0] if found else root / name / file.name
            kind = "as published" if is_published(name, file, root) else "yours"
            rows.append((name, path, kind if found else "no"))
    print(tabulate(rows, ("set", "file", "present"), tablefmt="plain"))


def parse_args() -> argparse.Namespace:
    choices = ["all", *PUBLISHED_FILES]
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("name", nargs="*", help=", ".join(choices))
    add("--list", action="store_true", help="show the files, fetch nothing")
    add("--output_dir", type=user_path, default=DATASET_ROOT, help="default: dataset/")
    add("--generate", action="store_true", help="generate GenEval's training prompts")
    add("--num_prompts", type=positive, default=NUM_PROMPTS, help="with --generate; %(default)s")
    add("--seed", type=int, default=SEED, help="with --generate; %(default)s")
    args = parser.parse_args()
    args.output_dir = args.output_dir.resolve()
    unknown = [name for name in args.name if name not in choices]
    if unknown or (not args.name and not args.list):
        problem = f"unknown name {unknown[0]!r}" if unknown else "no name given"
        parser.error(f"{problem}; choose from {', '.join(choices)}")
    if "all" in args.name:
        args.name = list(PUBLISHED_FILES)
    if args.generate and "geneval" not in args.name:
        parser.error("--generate is for geneval only")
    if not args.generate and (args.num_prompts, args.seed) != (NUM_PROMPTS, SEED):
        parser.error("--num_prompts and --seed need --generate")
    return args


def main() -> int:
    """Returns 1 if a file is missing, malformed or was generated differently."""
    args = parse_args()
    root = args.output_dir
    if args.list:
        print_table(root)
        return 0
    status = 0
    for name in args.name:
        # Test prompts first: generated training prompts exclude them.
        for file in sorted(PUBLISHED_FILES[name], key=lambda file: file.split):
            trains_geneval = name == "geneval" and file.split == "train"
            try:
                if args.generate and trains_geneval:
                    message = write_training_prompts(root / name, args.num_prompts, args.seed)
                else:
                    message = prepare(name, file, root)
                print(f"{name}: {message}", flush=True)
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
