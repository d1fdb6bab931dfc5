"""Writes an HTML report on a run, or a comparison of several runs.

    python scripts/report.py logs/nft/shapes/demo
    python scripts/report.py logs/nft/shapes/demo logs/nft/shapes/full --output compared.html

Writes report.html to the directory of a single run, or to the working directory for several.  Reads
only the run directories, also those of unfinished runs; needs neither a model nor a network.  The
page is self-contained.
"""

import argparse
from pathlib import Path

from diffusion_nft.command_line import command, script_parser, user_path
from diffusion_nft.reports.page import page
from diffusion_nft.reports.runs import read_runs
from diffusion_nft.utils.files import write_atomically
from diffusion_nft.utils.paths import prepare_folder


def parse_flags() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=user_path, metavar="RUN", help="run directory")
    add("--output", type=user_path, help="HTML file")
    args = parser.parse_args()
    args.output = args.output or Path(args.runs[0] if len(args.runs) == 1 else "", "report.html")
    return args


def main() -> None:
    args = parse_flags()
    runs = read_runs(args.runs)
    prepare_folder(args.output.parent)
    data = page(runs).encode()
    write_atomically(args.output, data)
    print(f"{args.output.resolve()}: {len(data) / 1e6:.1f} MB")


if __name__ == "__main__":
    command(main)
