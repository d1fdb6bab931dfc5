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
from typing import Any

from diffusion_nft.checkpoint import load_checkpoint, load_lora, resolve_checkpoint
from diffusion_nft.data import load_prompts
from diffusion_nft.distributed import Distributed, distributed
from diffusion_nft.evaluate import DEFAULT_REWARDS, evaluate, rescore, write_results
from diffusion_nft.hub import fetch_lora
from diffusion_nft.models import MODELS, build_model
from diffusion_nft.policy import Policy
from diffusion_nft.precision import COMPUTE_DTYPES, Precision
from diffusion_nft.rewards import check_prompts
from diffusion_nft.rewards.combine import RewardSet
from diffusion_nft.rollout import Sampler
from diffusion_nft.solvers import check_solver


def parse_flags() -> argparse.Namespace:
    """The command line; a run's own configuration fills in what is not given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint_path", help="a checkpoint or a run directory (its latest)")
    parser.add_argument("--lora_hf_path", help="a LoRA on the hub, or a local PEFT folder")
    parser.add_argument("--pretrained", help="base model: folder, hub name, or 'shapes'")
    parser.add_argument("--model_type", default="sd3", choices=sorted(MODELS))
    parser.add_argument("--dataset", help="a name under dataset/, or a folder")
    parser.add_argument("--output_dir", help="default: evaluations/<dataset>/<model>")
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--solver")
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--max_sequence_length", type=int, help="T5 tokens")
    parser.add_argument("--mixed_precision", choices=sorted(COMPUTE_DTYPES))
    parser.add_argument("--seed", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--limit", type=int, help="only the first lines of the test set")
    parser.add_argument("--reward", help="comma-separated; default: the usual ones of the data set")
    parser.add_argument("--skip_rewards", default="", help="comma-separated")
    parser.add_argument("--save_images", action="store_true")
    parser.add_argument(
        "--rescore", action="store_true", help="score --output_dir's saved pictures"
    )
    args = parser.parse_args()
    if args.checkpoint_path and args.lora_hf_path:
        parser.error("give --checkpoint_path or --lora_hf_path, not both")
    run: dict[str, Any] = {}
    if args.checkpoint_path:
        args.checkpoint_path = resolve_checkpoint(Path(args.checkpoint_path))
        run = load_checkpoint(args.checkpoint_path).state["config"]
    for flag, key, default in (
        ("pretrained", "pretrained.model", "stabilityai/stable-diffusion-3.5-medium"),
        ("dataset", "dataset", None),
        ("num_inference_steps", "eval.num_steps", 40),
        ("solver", "eval.solver", "flow"),
        ("guidance_scale", "eval.guidance_scale", 1.0),
        ("resolution", "resolution", 512),
        ("max_sequence_length", "pretrained.max_sequence_length", 128),
        ("mixed_precision", "mixed_precision", "fp16"),
        ("seed", "seed", 42),
        ("batch_size", "eval.batch_size", 16),
    ):
        if getattr(args, flag) is None:
            setattr(args, flag, run.get(key, default))
    if args.dataset is None:
        parser.error("--dataset is needed without --checkpoint_path")
    name = Path(args.dataset).name
    what = Path(args.checkpoint_path or args.lora_hf_path or args.pretrained).name
    if args.checkpoint_path:
        what = f"{args.checkpoint_path.resolve().parent.parent.name}-{what}"
    args.output_dir = Path(args.output_dir or Path("evaluations", name, what))
    for flag in ("batch_size", "num_inference_steps", "limit"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} must be at least 1, not {getattr(args, flag)}")
    check_solver(args.solver)
    args.revision = run.get("pretrained.revision", "")
    args.offload_text_encoders = run.get("perf.offload_text_encoders", False)
    args.vae_batch_size = run.get("perf.vae_batch_size", 8)
    chosen = args.reward.split(",") if args.reward else list(DEFAULT_REWARDS.get(name, ()))
    skipped = args.skip_rewards.split(",") if args.skip_rewards else []
    if unknown := [reward for reward in skipped if reward not in chosen]:
        parser.error(f"--skip_rewards {unknown[0]!r} is not among {', '.join(chosen)}")
    # The run's own weights, so that "total" is what training logged.
    args.rewards = {
        reward: run.get(f"reward_fn.{reward}", 1.0) for reward in chosen if reward not in skipped
    }
    if not args.rewards:
        parser.error(f"dataset {args.dataset!r} has no usual rewards: choose with --reward")
    return args


def load_model(args: argparse.Namespace, dist: Distributed) -> Any:
    """The base model, with the LoRA active if one is asked for."""
    precision = Precision(args.mixed_precision, dist.device)
    model = build_model(
        args.model_type,
        name=args.pretrained,
        revision=args.revision,
        offload_text_encoders=args.offload_text_encoders,
        vae_batch_size=args.vae_batch_size,
        max_sequence_length=args.max_sequence_length,
        resolution=args.resolution,
        dist=dist,
        precision=precision,
    )
    lora = args.checkpoint_path or args.lora_hf_path
    if lora:
        with dist.main_first():
            state, lora_config = load_lora(fetch_lora(str(lora)))
        policy = Policy(
            model.transformer,
            targets=model.lora_targets,
            rank=lora_config.r,
            alpha=lora_config.lora_alpha,
            seed=args.seed,
            dtype=precision.trained_dtype,
        )
        policy.load("current", state)
    return model


def main() -> None:
    """Parses, loads, samples, scores, writes."""
    args = parse_flags()
    prompts = load_prompts(args.dataset, "test")[: args.limit]
    check_prompts(args.rewards, [prompt.text for prompt in prompts])
    image_dir = args.output_dir / "images"
    settings = {
        key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
    }
    with distributed(timeout_minutes=60) as dist:
        rewards = RewardSet(args.rewards, dist.device)
        if args.rescore:
            result = rescore(prompts, rewards, image_dir, batch_size=args.batch_size, dist=dist)
        else:
            result = evaluate(
                load_model(args, dist),
                prompts,
                rewards,
                Sampler(args.solver, args.num_inference_steps, args.guidance_scale),
                seed=args.seed,
                batch_size=args.batch_size,
                dist=dist,
                image_dir=image_dir if args.save_images else None,
            )
        if dist.is_main:
            saved = image_dir if args.save_images or args.rescore else None
            write_results(result, args.output_dir, image_dir=saved, settings=settings)
        dist.say(json.dumps(result.averages(), indent=2))
        dist.say(f"results: {args.output_dir}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
