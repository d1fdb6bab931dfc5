"""One HTML file that shows a run, or compares several.

    python scripts/report.py logs/nft/shapes/demo
    python scripts/report.py logs/nft/shapes/demo logs/nft/shapes/full --output compared.html

Reads run directories only, of runs in stages and of runs that are not finished as well; needs no
model and no network.  The file opens offline and brings its pictures, curves and style along.
"""

import argparse
from pathlib import Path

from diffusion_nft.command_line import command, user_path
from diffusion_nft.reports.page import page
from diffusion_nft.reports.runs import read_runs
from diffusion_nft.utils.files import write_atomically
from diffusion_nft.utils.paths import prepare_folder


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=user_path, metavar="RUN", help="a run directory")
    add("--output", type=user_path, default=Path("report.html"), help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    """Reads, writes, and says where the report is."""
    args = parse_flags()
    prepare_folder(args.output.parent)
    data = page(read_runs(args.runs)).encode()
    write_atomically(args.output, data)
    print(f"{args.output}: {len(data) / 1e6:.1f} MB")


if __name__ == "__main__":
    command(main)
