"""Exports the LoRA of a checkpoint, or converts a LoRA of another layout, to a folder to share.

    python scripts/export_lora.py --checkpoint_path logs/nft/sd3/geneval --output_dir shared
    python scripts/export_lora.py --lora_hf_path OWNER/NAME --merge --output_dir shared

Writes lora/ (PEFT), pytorch_lora_weights.safetensors (diffusers) and README.md, a model card.
--merge adds the base pipeline with the LoRA merged into the transformer, in --mixed_precision.
Nothing is left in the folder after a failure.  Nothing is uploaded without --push.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from diffusion_nft.command_line import command, script_parser, user_path
from diffusion_nft.distributed.ranks import distributed
from diffusion_nft.evaluation.options import add_model_flags, resolve_options
from diffusion_nft.models.hub import base_note, public_name
from diffusion_nft.models.lora import Lora, export_lora, load_lora
from diffusion_nft.models.merge import merge, write_pipeline
from diffusion_nft.reports.model_card import write_card
from diffusion_nft.utils.files import DiskError

# Temporary folder in the output folder, until all files are written.
MARKER = ".unfinished"


def parse_flags() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add_model_flags(parser, lora_required=True)
    add = parser.add_argument
    add("--output_dir", type=user_path, required=True, help="new or empty folder")
    add("--merge", action="store_true", help="also write a pipeline with the LoRA merged")
    add("--push", metavar="OWNER/NAME", help="upload the folder to this hub repository")
    args = parser.parse_args()
    if args.push is not None:
        validate_repo_id(args.push)
        if "/" not in args.push:
            parser.error(f"--push takes OWNER/NAME, not {args.push}")
    if args.output_dir.exists() and {p.name for p in args.output_dir.iterdir()} - {MARKER}:
        parser.error(f"--output_dir {args.output_dir} is not empty")
    return args


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose files are moved to ``folder`` at the end of the block.

    Removes them if the block fails.  Raises DiskError if a file cannot be written.
    """
    missing, unfinished = not folder.exists(), folder / MARKER
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a command that was killed
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in unfinished.iterdir():
            path.rename(folder / path.name)
        unfinished.rmdir()
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{folder} could not be filled: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if missing and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def main() -> None:
    args = parse_flags()
    options = resolve_options(args)
    with distributed(timeout_minutes=60) as dist:
        lora = load_lora(options.fetch(dist))
    given = getattr(args, "pretrained.model")
    if not (options.run or given) and lora.base_model:
        options.config.pretrained.model = lora.base_model
    base = options.config.pretrained.model
    if note := base_note(lora, base):
        print(note)
    merged = merge(options.config, lora) if args.merge else None
    with filling(args.output_dir) as folder:
        if merged:
            write_pipeline(*merged, folder)
        export_lora(folder, Lora(lora.state, public_name(base)))
        write_card(options, lora, folder, repo=args.push, merged=args.merge)
    print(f"exported: {args.output_dir}")
    if args.push:
        api = HfApi()
        api.create_repo(args.push, exist_ok=True)
        url = api.upload_folder(repo_id=args.push, folder_path=args.output_dir)
        print(f"pushed: {url}")


if __name__ == "__main__":
    command(main)
