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
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_nft.checkpoint import load_checkpoint, resolve_checkpoint
from diffusion_nft.checks import reward_addresses
from diffusion_nft.data import load_prompts
from diffusion_nft.distributed import distributed
from diffusion_nft.evaluate import (
    choose_rewards,
    earlier_scores,
    evaluate,
    rescore,
    write_results,
)
from diffusion_nft.models import MODELS, load_model
from diffusion_nft.policy import policy_of_lora
from diffusion_nft.precision import COMPUTE_DTYPES
from diffusion_nft.rewards import check_prompts
from diffusion_nft.rewards.combine import RewardSet
from diffusion_nft.rollout import Sampler
from diffusion_nft.run_dir import section
from diffusion_nft.solvers import check_solver

# Settings without a checkpoint; with one, those of its run.
DEFAULTS: dict[str, Any] = {
    "pretrained.model_type": "sd3",
    "pretrained.model": "stabilityai/stable-diffusion-3.5-medium",
    "pretrained.revision": "",
    "pretrained.max_sequence_length": 128,
    "resolution": 512,
    "mixed_precision": "fp16",
    "allow_tf32": True,
    "remote_timeout_seconds": 300.0,
    "seed": 42,
    "eval.num_steps": 40,
    "eval.solver": "flow",
    "eval.guidance_scale": 1.0,
    "eval.batch_size": 16,
}


def positive(text: str) -> int:
    """argparse's type of a count."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def served(text: str) -> tuple[str, tuple[str, ...]]:
    """argparse's type of a served reward: NAME=URL, with commas between several addresses."""
    name, _, addresses = text.partition("=")
    if complaint := reward_addresses({name: tuple(addresses.split(","))}):
        raise argparse.ArgumentTypeError(complaint)
    return name, tuple(addresses.split(","))


def parse_flags() -> argparse.Namespace:
    """The command line; ``settings`` joins it with the checkpoint's run and DEFAULTS."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint_path", type=Path, help="a checkpoint or a run directory (its latest)")
    add("--lora_hf_path", help="a LoRA on the hub, or a local PEFT folder")
    add("--pretrained", dest="pretrained.model", help="base: folder, hub name, or 'shapes'")
    add("--model_type", dest="pretrained.model_type", choices=sorted(MODELS))
    add("--dataset", help="a name under dataset/, or a folder")
    add("--output_dir", type=Path, help="default: evaluations/<dataset>/<model>")
    add("--num_inference_steps", dest="eval.num_steps", type=positive)
    add("--solver", dest="eval.solver")
    add("--guidance_scale", dest="eval.guidance_scale", type=float)
    add("--resolution", type=positive)
    add("--max_sequence_length", dest="pretrained.max_sequence_length", type=positive)
    add("--mixed_precision", choices=sorted(COMPUTE_DTYPES))
    add("--seed", type=int)
    add("--batch_size", dest="eval.batch_size", type=positive)
    add("--limit", type=positive, help="only the first lines of the test set")
    add("--reward", default="", help="comma-separated; default: the usual ones of the data set")
    add("--skip_rewards", default="", help="comma-separated")
    add("--remote", type=served, nargs="*", default=[], metavar="NAME=URL", help="served rewards")
    add("--save_images", action="store_true")
    add("--rescore", action="store_true", help="score --output_dir's saved pictures")
    args = parser.parse_args()
    if args.checkpoint_path and args.lora_hf_path:
        parser.error("give --checkpoint_path or --lora_hf_path, not both")
    run: dict[str, Any] = {}
    name = Path(args.lora_hf_path or getattr(args, "pretrained.model") or "base").name
    if args.checkpoint_path:
        args.checkpoint_path = resolve_checkpoint(args.checkpoint_path)
        run = load_checkpoint(args.checkpoint_path).state["config"]
        name = f"{args.checkpoint_path.resolve().parents[1].name}-{args.checkpoint_path.name}"
    args.remote = dict(args.remote)
    given = {key: value for key, value in vars(args).items() if value is not None}
    args.settings = DEFAULTS | run | given
    if "dataset" not in args.settings:
        parser.error("--dataset is needed without --checkpoint_path")
    dataset = args.settings["dataset"]
    check_solver(args.settings["eval.solver"])
    args.rewards = choose_rewards(dataset, args.reward, args.skip_rewards, run)
    args.output_dir = args.output_dir or Path("evaluations", Path(dataset).name, name)
    return args


def main() -> None:
    """Parses, loads, samples, scores, writes."""
    args = parse_flags()
    settings = args.settings
    prompts = load_prompts(settings["dataset"], "test")[: args.limit]
    check_prompts(args.rewards, [prompt.text for prompt in prompts])
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
            kept = earlier_scores(args.output_dir, prompts)
            result = rescore(prompts, rewards, **how)
            result = replace(result, scores=kept | result.scores)
        else:
            model = load_model(settings, dist)
            if lora := args.checkpoint_path or args.lora_hf_path:
                policy_of_lora(model, str(lora), dist)
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
