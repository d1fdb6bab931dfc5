"""Draws prompts with the base model, with a LoRA, or with both side by side.

    python scripts/sample.py --prompt "a photo of a cat" --prompt "two dogs" --seeds 0 1 2
    python scripts/sample.py --checkpoint_path logs/nft/sd3/geneval --compare \
        --prompts_file prompts.txt --seeds 0 1

Writes every picture as a PNG and all of them as grid.png, a row a prompt. A picture depends on its
prompt, its seed and the model's flags alone, not on what else is drawn. Runs in one process.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_nft.data import check_text
from diffusion_nft.distributed import distributed
from diffusion_nft.models import load_model
from diffusion_nft.pictures import image_grid, side_by_side, to_pil
from diffusion_nft.policy import REFERENCE
from diffusion_nft.randomness import generator
from diffusion_nft.rollout import Sampler
from diffusion_nft.settings import add_model_flags, command, resolve

GRID = "grid.png"
# Characters of a prompt in a file's name.
NAME_LENGTH = 40


def parse_flags() -> argparse.Namespace:
    """The command line; ``prompts`` are those of both sources, in order, each once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="may be repeated")
    add("--prompts_file", type=Path, help="one prompt a line")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--compare", action="store_true", help="the base model beside the LoRA")
    add("--output_dir", type=Path, help="default: samples/<model>")
    args = parser.parse_args()
    try:
        lines = args.prompts_file.read_text("utf-8-sig").split("\n") if args.prompts_file else []
    except UnicodeDecodeError as error:
        parser.error(f"--prompts_file {args.prompts_file} is not UTF-8 (byte {error.start + 1})")
    args.prompts = list(dict.fromkeys(p.strip() for p in (*args.prompt, *lines) if p.strip()))
    if not args.prompts:
        parser.error("give --prompt or --prompts_file")
    for prompt in args.prompts:
        try:
            check_text(prompt)
        except ValueError as error:
            parser.error(f"a prompt holds {error}")
    if args.output_dir and args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is no folder")
    if args.compare and not (args.checkpoint_path or args.lora_hf_path):
        parser.error("--compare needs --checkpoint_path or --lora_hf_path")
    return args


def draw(model: Any, sampler: Sampler, prompts: list[str], seeds: list[int]) -> Tensor:
    """``[P * S, 3, H, W]``, a prompt's seeds together, by the model's active adapter.

    One at a time: in a batch the last bits of a picture depend on its neighbours.
    """
    pictures = [
        model.decode(sampler(model, model.encode([prompt]), [generator(seed, "sample")])[0]).cpu()
        for prompt in prompts
        for seed in seeds
    ]
    return torch.cat(pictures)


def save(pictures: Tensor, names: list[str], folder: Path, suffix: str = "") -> None:
    """Writes ``<name><suffix>.png`` for every picture."""
    for picture, name in zip(to_pil(pictures), names, strict=True):
        picture.save(folder / f"{name}{suffix}.png")


def main() -> None:
    """Parses, loads, draws, writes."""
    args = parse_flags()
    seeds, choice = list(dict.fromkeys(args.seeds)), resolve(args)
    settings = choice.settings
    with distributed(timeout_minutes=60) as dist:
        model = load_model(settings, dist)
        policy = choice.policy(model, dist)
        sampler = Sampler(
            settings["eval.solver"], settings["eval.num_steps"], settings["eval.guidance_scale"]
        )
        pictures = draw(model, sampler, args.prompts, seeds)
        base = None
        if args.compare:
            assert policy, "--compare comes with a LoRA"
            with policy.using(REFERENCE):
                base = draw(model, sampler, args.prompts, seeds)
    folder = args.output_dir or Path("samples", choice.name)
    folder.mkdir(parents=True, exist_ok=True)
    names = [
        f"{i:03d}-{re.sub(r'[^a-zA-Z0-9]+', '-', prompt)[:NAME_LENGTH].strip('-')}-seed{seed}"
        for i, prompt in enumerate(args.prompts)
        for seed in seeds
    ]
    captions = [f"{prompt} (seed {seed})" for prompt in args.prompts for seed in seeds]
    save(pictures, names, folder)
    if base is None:
        grid = image_grid(pictures, captions, columns=len(seeds))
    else:
        save(base, names, folder, "-base")
        labels = ("base", choice.name)
        grid = side_by_side(base, pictures, captions, columns=len(seeds), labels=labels)
    grid.save(folder / GRID)
    print(f"{len(names)} pictures a model: {folder}")


if __name__ == "__main__":
    command(main)
