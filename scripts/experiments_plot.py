"""Makes figures and tables from the results of scripts/experiments.py.

    python scripts/experiments_plot.py fast negatives

Writes for each experiment, to --output: NAME.png, held-out strict accuracy against compute and time
(mean over seeds with a 95 % band); NAME-watched.png, other metrics such as the reward; and NAME.md,
tables with paired tests against the baseline at equal compute, and the alarms of the monitor.
Intervals are Student's t over seeds.  Needs the extra "plots".
"""

import argparse
from pathlib import Path

from diffusion_nft.command_line import command, script_parser, user_path
from diffusion_nft.experiments.comparison import read
from diffusion_nft.experiments.plots import draw, draw_watched
from diffusion_nft.experiments.tables import experiment_page
from diffusion_nft.utils.files import write_atomically
from diffusion_nft.utils.paths import prepare_folder


def parse_flags() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="experiments with results")
    add("--results", type=user_path, default=Path("docs/results"))
    add("--output", type=user_path, default=Path("docs", "figures"))
    return parser.parse_args()


def main() -> None:
    args = parse_flags()
    found = {name: read(args.results / name) for name in args.names}
    prepare_folder(args.output)
    for name, results in found.items():
        try:
            text = experiment_page(name, results, args)
            draw(results, args.output / f"{name}.png")
            draw_watched(results, args.output / f"{name}-watched.png")
        except ImportError as error:
            raise ImportError(
                f"{error.name} is missing: pip install 'diffusion-nft[plots]'"
            ) from error
        write_atomically(args.output / f"{name}.md", text.encode())
        print(f"{text}\n{args.output / name}.md and .png")


if __name__ == "__main__":
    command(main)
