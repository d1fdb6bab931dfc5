"""Measures the time of an epoch by number of prompts, images per prompt, resolution and ranks.

    python scripts/benchmark_scaling.py --output scaling.json --figure scaling.png
    python scripts/benchmark_scaling.py --axes groups resolution --repeats 5

Each point is the fastest of --repeats epochs of scripts/benchmark.py, with all other sizes fixed.
The exponent is the slope of a least-squares line through the logarithms (1: proportional, 0:
constant).  Uses the built-in model; for resolutions sd3.5-tiny, the SD3.5 architecture with small
random weights.  The figure needs matplotlib (the extra "plots").
"""

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path

from diffusion_nft.benchmarks.scaling import AXES, draw, measure
from diffusion_nft.command_line import command, positive, script_parser, user_path
from diffusion_nft.evaluation.results import write_json
from diffusion_nft.utils.paths import prepare_folder


def parse_flags() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    add("--repeats", type=positive, default=3, help="epochs at each size")
    add("--ranks", type=positive, nargs="+", default=list(AXES["ranks"].sizes), help="processes")
    add("--output", type=user_path, help="also write the JSON to this file")
    add("--figure", type=user_path, help="plot the curves to this PNG")
    args = parser.parse_args()
    if len(set(args.ranks)) < 2 and "ranks" in args.axes:
        parser.error("--ranks: an exponent needs at least two different numbers")
    return args


def main() -> None:
    args = parse_flags()
    if args.figure and not importlib.util.find_spec("matplotlib"):
        raise ImportError("--figure needs matplotlib: pip install 'diffusion-nft[plots]'")
    for path in filter(None, (args.output, args.figure)):
        prepare_folder(path.parent)
    sizes = {name: axis.sizes for name, axis in AXES.items()} | {"ranks": args.ranks}
    with tempfile.TemporaryDirectory() as folder:
        curves = {
            name: measure(name, sizes[name], args.repeats, Path(folder)) for name in args.axes
        }
    print(json.dumps(curves, indent=2))
    for name, curve in curves.items():
        fits = ", ".join(f"{part} {k:.2f}" for part, k in curve["exponents"].items())
        print(f"{name} {curve['sizes']}: exponents {fits}")
    if args.output:
        write_json(args.output, curves)
    if args.figure:
        draw(curves, args.figure)


if __name__ == "__main__":
    command(main)
