"""Scores a model, with or without a LoRA, on a test set.

    torchrun --nproc_per_node=8 scripts/evaluation.py --dataset geneval --guidance_scale 1.0 \
        --checkpoint_path logs/nft/sd3/geneval --save_images
    python scripts/evaluation.py --dataset geneval --guidance_scale 4.5 \
        --lora_hf_path jieliu/SD3.5M-FlowGRPO-GenEval

Writes ``evaluation_results.jsonl`` (one object a sample) and ``average_scores.json`` to
--output_dir. The same numbers on any number of processes.  What --checkpoint_path was trained with
(base model, resolution, text length, precision) is the default; without a checkpoint, SD3.5-Medium
at 512.
"""

import argparse
import json
import sys
from pathlib import Path

from diffusion_nft.checks import reward_addresses
from diffusion_nft.data import load_prompts, split_file
from diffusion_nft.distributed import distributed
from diffusion_nft.evaluate import (
    beside,
    choose_rewards,
    evaluate,
    read_results,
    rescore,
    write_results,
)
from diffusion_nft.models import load_model
from diffusion_nft.rewards import check_prompts
from diffusion_nft.rewards.combine import RewardSet
from diffusion_nft.rollout import Sampler
from diffusion_nft.run_dir import section
from diffusion_nft.settings import add_model_flags, positive, resolve


def served(text: str) -> tuple[str, tuple[str, ...]]:
    """argparse's type of a served reward: NAME=URL, with commas between several addresses."""
    name, _, addresses = text.partition("=")
    if complaint := reward_addresses({name: tuple(addresses.split(","))}):
        raise argparse.ArgumentTypeError(complaint)
    return name, tuple(addresses.split(","))


def parse_flags() -> argparse.Namespace:
    """The command line; ``choice`` joins it with the checkpoint's run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    add = parser.add_argument
    add("--dataset", help="a name under dataset/, or a folder")
    add("--output_dir", type=Path, help="default: evaluations/<dataset>/<model>")
    add("--seed", type=int)
    add("--batch_size", dest="eval.batch_size", type=positive)
    add("--limit", type=positive, help="only the first lines of the test set")
    add("--reward", default="", help="comma-separated; default: the usual ones of the data set")
    add("--skip_rewards", default="", help="comma-separated")
    add(
        "--remote",
        type=served,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=URL",
        help="served rewards",
    )
    add("--save_images", action="store_true")
    add("--rescore", action="store_true", help="score --output_dir's saved pictures")
    args = parser.parse_args()
    args.remote = dict(args.remote)
    args.choice = choice = resolve(args)
    if "dataset" not in choice.settings:
        parser.error("--dataset is needed without --checkpoint_path")
    dataset = choice.settings["dataset"]
    split_file(dataset, "test")
    args.rewards = choose_rewards(dataset, args.reward, args.skip_rewards, choice.run)
    if idle := [name for name in args.remote if name not in args.rewards]:
        parser.error(f"--remote {idle[0]} is not among the rewards {', '.join(args.rewards)}")
    args.output_dir = args.output_dir or Path("evaluations", Path(dataset).name, choice.name)
    return args


def main() -> None:
    """Parses, loads, samples, scores, writes."""
    args = parse_flags()
    settings = args.choice.settings | {"rewards": args.rewards}
    prompts = load_prompts(settings["dataset"], "test")[: args.limit]
    check_prompts(args.rewards, [p.text for p in prompts], [p.metadata for p in prompts])
    image_dir = args.output_dir / "images" if args.save_images or args.rescore else None
    with distributed(timeout_minutes=60) as dist:
        remote = section(settings, "remote") | args.remote
        options = section(settings, "reward_options")
        rewards = RewardSet.build(
            args.rewards,
            dist.device,
            options={name: given for name, given in options.items() if name not in remote},
            remote=remote,
            timeout=settings["remote_timeout_seconds"],
        )
        how = {"batch_size": settings["eval.batch_size"], "image_dir": image_dir, "dist": dist}
        if args.rescore:
            earlier = read_results(args.output_dir, prompts)
            result, settings = beside(rescore(prompts, rewards, **how), args.rewards, *earlier)
        else:
            model = load_model(settings, dist)
            args.choice.policy(model, dist)
            sampler = Sampler(
                settings["eval.solver"], settings["eval.num_steps"], settings["eval.guidance_scale"]
            )
            result = evaluate(model, prompts, rewards, sampler, seed=settings["seed"], **how)
        if dist.is_main:
            shown = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
            write_results(result, args.output_dir, image_dir=image_dir, settings=shown)
        dist.say(json.dumps(result.averages(), indent=2))
        dist.say(f"results: {args.output_dir}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
