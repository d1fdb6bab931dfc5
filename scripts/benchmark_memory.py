"""Estimates the GPU memory of an SD3 model by micro-batch; needs neither a GPU nor weights.

    python scripts/benchmark_memory.py                                  # SD3.5-Medium, 512 pixels
    python scripts/benchmark_memory.py --resolution 1024 --precision bf16 --sizes 1 2 4

Prints JSON and a Markdown table.  Not included: the CUDA context, workspaces of cuBLAS and cuDNN,
fragmentation of the allocator, and rewards.
"""

import argparse
import json
import tempfile

from diffusion_nft.benchmarks.epochs import make_config
from diffusion_nft.benchmarks.memory import WITH_TEXT_ENCODERS, estimate, table
from diffusion_nft.benchmarks.models import ARCHITECTURES
from diffusion_nft.command_line import command, positive, script_parser, user_path
from diffusion_nft.evaluation.results import write_json
from diffusion_nft.utils.paths import prepare_folder


def parse_flags() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--arch", choices=list(ARCHITECTURES), default=WITH_TEXT_ENCODERS)
    add("--resolution", type=int, default=512, help="pixels")
    add("--rank", type=int, default=32, help="of the LoRA")
    add("--precision", choices=("fp16", "bf16"), default="fp16", help="mixed_precision")
    add("--sizes", type=positive, nargs="+", default=[1, 2, 4, 8, 16], help="of micro-batches")
    add("--output", type=user_path, help="also write the JSON to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_flags()
    if args.output:
        prepare_folder(args.output.parent)
    changes = [
        ("resolution", args.resolution),
        ("train.lora_rank", args.rank),
        ("mixed_precision", args.precision),
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(args.arch, folder, changes=changes)
        results = estimate(config, args.arch, args.sizes)
    print(f"{json.dumps(results, indent=2)}\n\n{table(results)}")
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    command(main)
