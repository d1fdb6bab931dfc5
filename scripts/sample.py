"""Generates images with the base model, with a LoRA, or with both side by side.

    python scripts/sample.py --prompt "a photo of a cat" --prompt "two dogs" --seeds 0 1 2
    python scripts/sample.py --checkpoint_path logs/nft/sd3/geneval --compare \
        --prompts_file prompts.txt --seeds 0 1

Writes one PNG per image, and a grid with one row per prompt to grid.png.  An image depends only on
its prompt, its seed and the flags of the model.  Existing images are overwritten.  Runs in one
process.
"""

import argparse
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from diffusion_nft.command_line import command, script_parser, user_path
from diffusion_nft.data.prompts import Prompt, check_text, read_prompts
from diffusion_nft.distributed.ranks import distributed
from diffusion_nft.evaluation.options import add_model_flags, resolve_options
from diffusion_nft.images import Images, save_png
from diffusion_nft.models import Model
from diffusion_nft.models.loading import load_model
from diffusion_nft.models.sampling import Sampler
from diffusion_nft.policy import REFERENCE
from diffusion_nft.randomness import generator
from diffusion_nft.tracking.grids import image_grid, save_grid, side_by_side
from diffusion_nft.utils.paths import prepare_folder

GRID = "grid.png"
# Characters of the prompt in a file name, of up to 4 bytes each.
NAME_LENGTH = 40


def parse_flags() -> argparse.Namespace:
    """The command line; ``prompts`` are the unique prompts of both flags."""
    parser = script_parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="may be repeated")
    formats = 'one prompt per line, or a .jsonl file with one object with "prompt" per line'
    add("--prompts_file", type=user_path, help=formats)
    add("--seeds", type=int, nargs="+", default=[0])
    add("--compare", action="store_true", help="also generate with the base model")
    add("--output_dir", type=user_path, help="default: samples/<model>")
    args = parser.parse_args()
    for prompt in args.prompt:
        try:
            check_text(prompt)
        except ValueError as error:
            parser.error(f"a prompt holds {error}")
    lines = read_prompts(args.prompts_file, skip_blank=True) if args.prompts_file else []
    texts = [*(prompt.strip() for prompt in args.prompt), *(line.text for line in lines)]
    args.prompts = list(dict.fromkeys(filter(None, texts)))
    if not args.prompts:
        parser.error("give --prompt or --prompts_file")
    if args.compare and not (args.checkpoint_path or args.lora_hf_path):
        parser.error("--compare needs --checkpoint_path or --lora_hf_path")
    return args


def file_stem(number: int, prompt: str) -> str:
    """``007-a-red-circle``: the letters and digits of ``prompt``, of any script."""
    # Marks are parts of letters in many scripts.
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in prompt)
    return "-".join([f"{number:03d}", *kept[:NAME_LENGTH].split()])


def draw(
    model: Model,
    sampler: Sampler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    suffix: str = "",
) -> Images:
    """One image per prompt and seed, ordered by prompt; each is also written to ``folder``.

    Uses batches of one: in a larger batch, the rounding of an image depends on the others.
    """
    images = []
    for number, prompt in enumerate(prompts):
        for seed in seeds:
            cond = sampler.encode(model, [Prompt(prompt)]).to(model.device)
            latents = sampler(model, cond, [generator(seed, "sample")])[0]
            images.append(model.decode(latents).to("cpu"))
            if not images[-1].finite.all():
                raise ValueError(
                    f"the image of {prompt!r}, seed {seed}, has NaN or infinite values; the "
                    f"{len(images) - 1} images before it are in {folder}"
                )
            path = folder / f"{file_stem(number, prompt)}-seed{seed}{suffix}.png"
            save_png(images[-1].to_pil()[0], path)
    return Images.concatenate(images)


def main() -> None:
    args = parse_flags()
    seeds, options = list(dict.fromkeys(args.seeds)), resolve_options(args)
    prompts = args.prompts
    folder = args.output_dir or Path("samples", options.name)
    prepare_folder(folder)
    base = None
    with distributed(timeout_minutes=60) as dist:
        model = load_model(options.config, dist)
        policy = options.policy(model, dist)
        sampler = Sampler.for_evaluation(options.config)
        images = draw(model, sampler, prompts, seeds, folder)
        if args.compare:
            assert policy, "--compare needs a LoRA"
            with policy.use_adapter(REFERENCE):
                base = draw(model, sampler, prompts, seeds, folder, "-base")
    captions = [f"{prompt} (seed {seed})" for prompt in prompts for seed in seeds]
    if base is None:
        grid = image_grid(images, captions, columns=len(seeds))
    else:
        labels = ("base", options.name)
        grid = side_by_side(base, images, captions, columns=len(seeds), labels=labels)
    save_grid(grid, folder / GRID)
    print(f"{len(captions)} images per model: {folder}")


if __name__ == "__main__":
    command(main)
