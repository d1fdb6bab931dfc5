r"""Trains the built-in model "shapes" from scratch and writes its prompt files.

    python scripts/pretrain_shapes.py
    python scripts/pretrain_shapes.py --device cuda
    python scripts/pretrain_shapes.py --transformer_steps 300 --output_dir /tmp/pipeline   # short
    python scripts/reproduce.py --suite shapes --pretrained /tmp/pipeline \
        --max_sequence_length 8 --mixed_precision no                                       # scores

The shipped weights were made by the first command with one thread (OMP_NUM_THREADS=1) on two cores
shared with other jobs: 26 minutes of CPU time, 50 minutes of wall time (autoencoder 6, transformer
42). `--device cuda` has not been measured. Strict scores of one sample per held-out line (480), ten
Euler steps, no guidance (standard error 0.02 over all, 0.055 per tag):

                  single   two  counting  colors  position  color_attr    all
    standard        .650  .787      .487    .512      .237        .450   .521
    stricter        .637  .762      .400    .512      .225        .450   .498

Evaluations with seeds 42, 43 and 44 give .485, .444 and .463; the mean of the four is .478, for
position .184. Rendered images pass both rules on all 480 lines; their reconstructions pass the
standard rule on all lines and the stricter rule on .998.
"""

import argparse
from pathlib import Path

from diffusion_nft.command_line import command, device, positive, script_parser, user_path
from diffusion_nft.shapes.captions import write_metadata
from diffusion_nft.shapes.model import PIPELINE_DIR
from diffusion_nft.shapes.pretraining import train_pipeline, train_vae
from diffusion_nft.utils.paths import prepare_folder

DATASET_DIR = Path(__file__).parents[1] / "dataset" / "shapes"


def parse_flags() -> argparse.Namespace:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--vae_steps", type=positive, default=1000)
    add("--transformer_steps", type=positive, default=4500)
    add("--device", type=device, default="cpu")
    add("--output_dir", type=user_path, default=PIPELINE_DIR)
    return parser.parse_args()


def main() -> None:
    args = parse_flags()
    prepare_folder(args.output_dir)
    write_metadata(DATASET_DIR)
    vae = train_vae(args.vae_steps, args.device)
    train_pipeline(vae, args.transformer_steps).save_pretrained(args.output_dir)
    print(f"saved: {args.output_dir}")


if __name__ == "__main__":
    command(main)
