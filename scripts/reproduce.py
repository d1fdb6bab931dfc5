"""Evaluates a model on all test sets of a suite and prints a table with the published results.

    torchrun --nproc_per_node=8 scripts/reproduce.py --lora_hf_path OWNER/NAME
    torchrun --nproc_per_node=8 scripts/reproduce.py --guidance_scale 4.5   # the base model
    python scripts/reproduce.py --suite shapes --checkpoint_path logs/nft/shapes/demo

The suite "paper" is GenEval, OCR, and six reward models on DrawBench, at 512 pixels with 40 steps;
"shapes" is for the built-in model.  All images are kept; rerunning the same command continues an
interrupted evaluation.  table.md and table.json in --output_dir show all models evaluated to it,
with settings and versions.
"""

import argparse
import functools
from pathlib import Path

from diffusion_nft.command_line import command, script_parser
from diffusion_nft.data.prompts import draw_lines
from diffusion_nft.distributed.ranks import check_shared, distributed
from diffusion_nft.evaluation.evaluate import Task, complete
from diffusion_nft.evaluation.options import (
    EvalOptions,
    add_evaluation_flags,
    add_model_flags,
    resolve_options,
)
from diffusion_nft.evaluation.results import (
    PER_REWARD_SETTINGS,
    read_images,
    read_results,
    reserve_folder,
    write_json,
)
from diffusion_nft.evaluation.suites import SUITES, as_json, as_markdown, read_rows, result_table
from diffusion_nft.evaluation.tasks import suite_tasks, try_rewards
from diffusion_nft.runs.environment import write_environment
from diffusion_nft.runs.lock import only_writer
from diffusion_nft.shapes import BUILT_IN_MODEL
from diffusion_nft.tracking.grids import image_grid, save_grid
from diffusion_nft.utils.files import write_atomically

NUM_IMAGES = 16
# Settings that differ between the test sets of a model.
TEST_SET_KEYS = ("dataset", "dataset_sha256", *PER_REWARD_SETTINGS)


def parse_flags() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_model_flags(parser)
    add_evaluation_flags(parser)
    parser.add_argument("--suite", choices=sorted(SUITES), default="paper")
    parser.add_argument("--datasets", help="test sets of the suite, comma-separated; default: all")
    args = parser.parse_args()
    args.options = resolve_options(args, SUITES[args.suite].settings)
    if args.suite != BUILT_IN_MODEL and args.options.run.get("pretrained.model") == BUILT_IN_MODEL:
        parser.error("this checkpoint is for the built-in model: use --suite shapes")
    args.output_dir = args.output_dir or Path("reproductions", args.suite)
    args.model_dir = args.output_dir / args.options.folder_name(args.limit)
    args.tasks = suite_tasks(SUITES[args.suite], args, args.options, args.model_dir)
    return args


def draw_grid(task: Task) -> None:
    """Saves a grid of some images of a finished test set."""
    shown = draw_lines(task.prompts, NUM_IMAGES)
    reward = next(iter(task.weights))
    scores, _ = read_results(task.folder, task.prompts)
    grid = image_grid(
        read_images(task.folder, [task.lines[i] for i in shown]),
        [task.prompts[i].text for i in shown],
        columns=4,
        scores=[scores[reward][i] for i in shown],
    )
    save_grid(grid, task.folder / "grid.png")


def main() -> None:
    args = parse_flags()
    options: EvalOptions = args.options
    with distributed(timeout_minutes=60) as dist:
        check_shared("--output_dir", args.output_dir, dist)
        model = functools.cache(lambda: options.model(dist))
        records = [
            options.record(dist, task.dataset, task.weights, args.limit) for task in args.tasks
        ]
        common = {key: value for key, value in records[0].items() if key not in TEST_SET_KEYS}
        with only_writer("--output_dir", args.model_dir, dist):
            reserve_folder(args.model_dir, common, dist)
            if try_rewards(args.tasks, options, dist) and dist.is_main:
                write_environment(args.model_dir)
            for task, record in zip(args.tasks, records, strict=True):
                dist.log(f"{task.dataset}: {len(task.prompts)} lines, {', '.join(task.weights)}")
                complete(task, options, record, dist, model=model, keep_images=True)
                if dist.is_main:
                    draw_grid(task)
        if dist.is_main:
            suite = SUITES[args.suite]
            rows = read_rows(args.output_dir, suite)
            write_json(args.output_dir / "table.json", as_json(suite, rows))
            write_atomically(args.output_dir / "table.md", as_markdown(suite, rows).encode())
            print(result_table(suite, rows))
            print(f"images and scores: {args.model_dir}")
            print(f"with settings and versions: {args.output_dir}/table.md and table.json")


if __name__ == "__main__":
    command(main)
