"""Scores a model, with or without a LoRA, on a test set.

    torchrun --nproc_per_node=8 scripts/evaluation.py --dataset geneval --guidance_scale 1.0 \
        --checkpoint_path logs/nft/sd3/geneval --save_images
    python scripts/evaluation.py --dataset geneval --guidance_scale 4.5 \
        --lora_hf_path jieliu/SD3.5M-FlowGRPO-GenEval

Writes ``evaluation_results.jsonl`` (one object per sample) and ``average_scores.json`` to
--output_dir.  The scores do not depend on the number of processes.  Base model, resolution, text
length and precision default to those of the checkpoint's run, or to SD3.5-Medium at 512 pixels.
With --save_images, rerunning the same command continues an interrupted evaluation.
"""

import argparse
import functools
import json
from pathlib import Path

from diffusion_nft.command_line import command, script_parser
from diffusion_nft.data.prompts import evaluated_lines, resolve_dataset, split_file
from diffusion_nft.distributed.ranks import Distributed, check_shared, distributed
from diffusion_nft.evaluation.evaluate import Task, choose_rewards, complete, rescore
from diffusion_nft.evaluation.options import (
    add_evaluation_flags,
    add_model_flags,
    named_rewards,
    resolve_options,
)
from diffusion_nft.evaluation.results import (
    finished,
    merge_scores,
    merge_settings,
    read_results,
    write_results,
)
from diffusion_nft.runs.lock import only_writer


def parse_flags() -> argparse.Namespace:
    """The command line, with the resolved ``options``."""
    parser = script_parser(__doc__)
    add_model_flags(parser)
    add_evaluation_flags(parser)
    add = parser.add_argument
    add("--dataset", help="name of a folder in dataset/, or a path")
    add("--reward", default="", help="comma-separated; default: those of the data set")
    add("--save_images", action="store_true", help="keep all images; allows resuming")
    add("--rescore", action="store_true", help="score the images saved in --output_dir")
    args = parser.parse_args()
    args.options = options = resolve_options(args)
    if "dataset" not in options.config:
        parser.error("--dataset is needed without --checkpoint_path")
    args.dataset = options.config.dataset
    split_file(args.dataset, "test")
    args.rewards = choose_rewards(args.dataset, args.reward, args.skip_rewards, options.run)
    if idle := named_rewards(args) - args.rewards.keys():
        parser.error(f"{min(idle)} is not among the rewards {', '.join(args.rewards)}")
    folder = Path(
        "evaluations", resolve_dataset(args.dataset).name, options.folder_name(args.limit)
    )
    args.output_dir = args.output_dir or folder
    return args


def evaluate_sets(args: argparse.Namespace, dist: Distributed) -> None:
    """Evaluates, or with --rescore scores the saved images, and writes the results."""
    options, folder = args.options, args.output_dir
    prompts, lines = evaluated_lines(args.dataset, args.limit)
    options.check_test_prompts(args.rewards, prompts, lines)
    record = options.record(dist, args.dataset, args.rewards, args.limit)
    if not args.rescore:
        task = Task(args.dataset, prompts, lines, args.rewards, folder)
        model = functools.partial(options.model, dist)
        complete(task, options, record, dist, model=model, keep_images=args.save_images)
        return
    scores, before = read_results(folder, prompts)
    settings = before | merge_settings(before, record)
    rewards, size = options.rewards(args.rewards, dist), options.config.eval.batch_size
    new = rescore(prompts, lines, rewards, folder, batch_size=size, dist=dist)
    if dist.is_main:
        write_results(merge_scores(new, scores, settings["rewards"]), folder, settings=settings)


def main() -> None:
    args = parse_flags()
    with distributed(timeout_minutes=60) as dist:
        check_shared("--output_dir", args.output_dir, dist)
        with only_writer("--output_dir", args.output_dir, dist):
            evaluate_sets(args, dist)
        averages = json.dumps(finished(args.output_dir), indent=2)
        dist.print_once(f"{averages}\nresults: {args.output_dir}")


if __name__ == "__main__":
    command(main)
