"""Measures the throughput of epochs and the time of each phase, optionally against the baseline.

    python scripts/benchmark.py                                   # the built-in model, on CPUs
    python scripts/benchmark.py --baseline --repeats 5 --set sample.num_groups=4
    torchrun --nproc_per_node=1 scripts/benchmark.py --arch sd3.5-medium --baseline \\
        --set sample.num_groups=2                                 # random weights, on a GPU

Throughput is measured over whole epochs (sampling, rewards, updates) after a warm-up epoch.  Phases
are timed in a further epoch, with a device synchronization after each.  With --baseline, these
epochs alternate with epochs run as in the published code, and the speedup is the ratio of
neighbouring epochs.  Prints a table and JSON.
"""

import argparse
import json
import tempfile

from diffusion_nft.benchmarks.epochs import DEFAULT_PRESET, describe, make_config, measure, table
from diffusion_nft.benchmarks.models import ARCHITECTURES, Setup
from diffusion_nft.command_line import command, positive, script_parser, user_path
from diffusion_nft.distributed.ranks import distributed
from diffusion_nft.evaluation.results import write_json
from diffusion_nft.rewards import parse_option
from diffusion_nft.utils.paths import prepare_folder


def parse_flags() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    names = ["shapes", "pretrained", *ARCHITECTURES]
    add("--arch", choices=names, default="shapes", help="pretrained: the model of the preset")
    add("--preset", help=f"preset in config/nft.py; default: shapes or {DEFAULT_PRESET}")
    setting = {"type": parse_option, "action": "append", "default": [], "metavar": "KEY=VALUE"}
    add("--set", **setting, help="for example train.batch_size=4")
    add("--rewards", help="comma-separated, weight 1; default: those of the preset")
    add("--baseline", action="store_true", help="also measure the published way")
    add("--repeats", type=positive, default=3, help="number of measured epochs")
    add("--output", type=user_path, help="also write the JSON to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_flags()
    with distributed(timeout_minutes=10) as dist, tempfile.TemporaryDirectory() as folder:
        if args.output and dist.is_main:
            prepare_folder(args.output.parent)
        config = make_config(
            args.arch, folder, preset=args.preset, rewards=args.rewards, changes=args.set
        )
        setup = Setup.of(config, dist, args.arch)
        results = {"about": describe(setup)} | measure(setup, args.repeats, args.baseline)
        dist.print_once(f"{json.dumps(results, indent=2)}\n\n{table(results)}")
        if args.output and dist.is_main:
            write_json(args.output, results)


if __name__ == "__main__":
    command(main)
