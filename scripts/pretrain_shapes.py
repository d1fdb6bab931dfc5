"""Makes the built-in world "shapes" from nothing: prompt files, autoencoder, transformer, scores.

    python scripts/pretrain_shapes.py
    python scripts/pretrain_shapes.py --device cuda
    python scripts/pretrain_shapes.py --transformer_steps 300 --output_dir /tmp/pipeline   # a try

Phases: "vae" trains the autoencoder, "transformer" the velocity network on cached latents and
prompt embeddings; then the pipeline is saved and scored. Both networks are kept in --work_dir, so
the phases can be repeated alone with --phase. `--minutes` shortens each phase to a time limit
with the same schedule (the result then depends on the machine).

The captions are noisy, as captions from the web are: with a probability that depends on the tag,
the image shows something else than its caption says. A model trained on them draws clean shapes
but follows its prompt only part of the time, and leaves something to learn by reinforcement.
Held-out captions are not used here at all.

The shipped weights are what the first of these commands made with one thread (OMP_NUM_THREADS=1)
on two cores shared with other jobs: 26 minutes of CPU time, 50 minutes on the clock, of which the
autoencoder took 6 and the transformer 42. `--device cuda` has not been measured. Strict scores of
one sample for each of the 480 held-out lines, ten Euler steps, no guidance (standard error 0.02
over all, 0.055 for a tag), as printed at its end:

                  single   two  counting  colors  position  color_attr    all
    standard        .650  .787      .487    .512      .237        .450   .521
    stricter        .637  .762      .400    .512      .225        .450   .498

With the noise that evaluation draws for seeds 42, 43 and 44 it is .485, .444 and .463: .478 on
average of the four draws, position .184. Real images pass both rules on all 480 lines, their
reconstructions the standard one on all and the stricter one on .998.
"""

# diffusers annotates its arguments and outputs more narrowly than it uses them.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

import argparse
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from diffusion_nft.command_line import command, device, positive, user_path
from diffusion_nft.flow import timestep_from_sigma
from diffusion_nft.shapes import captions as grammar
from diffusion_nft.shapes.model import (
    MAX_SEQUENCE_LENGTH,
    PIPELINE_DIR,
    build_pipeline,
    build_transformer,
    build_vae,
)
from diffusion_nft.shapes.scene import IMAGE_SIZE, NUM_CELLS, random_scene, render_batch
from diffusion_nft.shapes.verifier import RULES, verify
from diffusion_nft.utils.paths import prepare_folder

SEED = 0
DATASET_DIR = Path(__file__).parents[1] / "dataset" / "shapes"

VAE_BATCH_SIZE = 16
VAE_LEARNING_RATE = 2e-3
KL_WEIGHT = 6e-4

NUM_IMAGES = 24_000
BATCH_SIZE = 64
LEARNING_RATE = 2e-3
CAPTION_DROPOUT = 0.05
EMA_DECAY = 0.997
SHIFT = 3.0
SAVE_EVERY = 500

# How often a tag is drawn, and how often its image does not fit the caption.
TAG_WEIGHTS = {
    "single_object": 1.0,
    "two_object": 1.5,
    "counting": 1.5,
    "colors": 1.0,
    "position": 3.0,
    "color_attr": 3.0,
}
CAPTION_NOISE = {
    "single_object": 0.35,
    "two_object": 0.30,
    "counting": 0.25,
    "colors": 0.35,
    "position": 0.05,
    "color_attr": 0.05,
}
# Of the pairs that do not fit, this part shows the scene of an unrelated caption.
UNRELATED = 0.2


def training_steps(
    name: str, steps: int, minutes: float, optimizer: torch.optim.Optimizer, warmup: int = 150
) -> Iterator[tqdm]:
    """Yields once per step with the learning rate set: linear warm-up, cosine to zero.

    Ends after `steps` steps or `minutes` minutes; the cosine follows whichever is further.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    start = time.monotonic()
    with tqdm(total=steps, desc=name, mininterval=5) as bar:
        for step in range(steps):
            progress = max(step / steps, (time.monotonic() - start) / (60 * minutes))
            if progress >= 1:
                return
            scale = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = scale * peak
            yield bar
            bar.update()


def train_vae(steps: int, minutes: float, device: torch.device) -> AutoencoderKL:
    """Trains the autoencoder; its latents, shifted and scaled, have zero mean and unit variance."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=VAE_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    for bar in training_steps("vae", steps, minutes, optimizer):
        # Up to nine objects: a full grid teaches more per pixel than a mostly empty image.
        scenes = [random_scene(rng, max_objects=NUM_CELLS) for _ in range(VAE_BATCH_SIZE)]
        images = torch.from_numpy(render_batch(scenes)).to(device)
        posterior = vae.encode(2 * images - 1).latent_dist
        error = vae.decode(posterior.sample()).sample - (2 * images - 1)
        mse = error.square().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = error.abs().mean() + 2 * mse + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(psnr=f"{10 * math.log10(4 / mse.item()):.1f}", refresh=False)

    scenes = [random_scene(rng) for _ in range(512)]
    latents = encode(vae, render_batch(scenes), normalize=False)
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4),
        scaling_factor=round(1 / latents.std().item(), 4),
    )
    return vae.cpu()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray, normalize: bool = True) -> torch.Tensor:
    """Posterior means: float32 [B, 4, 12, 12] for images [B, 3, 48, 48] in [0, 1], on the CPU."""
    chunks = torch.from_numpy(images).split(64)
    means = [vae.encode((2 * x - 1).to(vae.device)).latent_dist.mean.cpu() for x in chunks]
    latents = torch.cat(means)
    if normalize:
        latents = (latents - vae.config["shift_factor"]) * vae.config["scaling_factor"]
    return latents.contiguous()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Images [B, 3, 48, 48] in [0, 1] through the autoencoder and back."""
    latents = encode(vae, images, normalize=False)
    decoded = [vae.decode(x.to(vae.device)).sample.cpu() for x in latents.split(64)]
    return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def embed_prompts(
    pipeline: StableDiffusion3Pipeline, prompts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token embeddings [N, 16, 96] and pooled embeddings [N, 96]."""
    embeddings, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompts,
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
    )
    return embeddings, pooled


def noisy_pairs(
    vae: AutoencoderKL, captions: list[dict], rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [NUM_IMAGES, 4, 12, 12] and, for each, the index of its caption."""
    by_tag = {
        tag: [index for index, caption in enumerate(captions) if caption["tag"] == tag]
        for tag in grammar.TAGS
    }
    weights = np.array([TAG_WEIGHTS[tag] for tag in grammar.TAGS])
    latents, indices = [], []
    for start in tqdm(range(0, NUM_IMAGES, 1000), desc="images"):
        scenes = []
        for _ in range(min(1000, NUM_IMAGES - start)):
            tag = rng.choice(grammar.TAGS, p=weights / weights.sum())
            index = int(rng.choice(by_tag[tag]))
            shown = captions[index]
            if rng.random() < CAPTION_NOISE[tag]:
                if rng.random() < UNRELATED:
                    shown = captions[rng.integers(len(captions))]
                else:
                    shown = grammar.corrupt(shown, rng)
            scenes.append(grammar.sample_scene(shown, rng))
            indices.append(index)
        latents.append(encode(vae, render_batch(scenes)))
    return torch.cat(latents), torch.tensor(indices)


def train_transformer(
    vae: AutoencoderKL,
    transformer: SD3Transformer2DModel,
    directory: Path,
    steps: int,
    minutes: float,
    seed: int,
) -> None:
    """Trains the velocity network by flow matching.

    Its moving average is written to `directory` every SAVE_EVERY steps and at the end.
    """
    device = transformer.device
    captions = [caption for tag in grammar.TAGS for caption in grammar.captions("train", tag)]
    pipeline = build_pipeline(vae, transformer, SEED)
    prompts = [caption["prompt"] for caption in captions] + [""]
    embeddings, pooled = (x.to(device) for x in embed_prompts(pipeline.to("cpu"), prompts))
    transformer.to(device)
    latents, indices = noisy_pairs(vae.to(device), captions, np.random.default_rng(seed))
    latents, indices = latents.to(device), indices.to(device)

    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    ema = EMAModel(transformer.parameters(), decay=EMA_DECAY)
    generator = torch.Generator(device).manual_seed(seed)
    order = torch.empty(0, dtype=torch.long, device=device)
    mean_loss = float("nan")
    for step, bar in enumerate(training_steps("transformer", steps, minutes, optimizer)):
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(latents), generator=generator, device=device)
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        x0, caption = latents[batch], indices[batch]
        uniform = torch.rand(3, BATCH_SIZE, generator=generator, device=device)
        caption = torch.where(uniform[0] < CAPTION_DROPOUT, len(prompts) - 1, caption)
        normal = torch.randn(BATCH_SIZE, generator=generator, device=device)
        sigma = torch.where(uniform[1] < 0.6, normal.sigmoid(), uniform[2])
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        xt = torch.lerp(x0, noise, sigma[:, None, None, None])
        velocity = transformer(
            hidden_states=xt,
            timestep=timestep_from_sigma(sigma),
            encoder_hidden_states=embeddings[caption],
            pooled_projections=pooled[caption],
        ).sample
        loss = (velocity - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        ema.step(transformer.parameters())
        mean_loss = loss.item() if step == 0 else 0.99 * mean_loss + 0.01 * loss.item()
        bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            ema.store(transformer.parameters())
            ema.copy_to(transformer.parameters())
            transformer.save_pretrained(directory)
            ema.restore(transformer.parameters())
    ema.copy_to(transformer.parameters())
    transformer.save_pretrained(directory)


def save_pipeline(pipeline: StableDiffusion3Pipeline, directory: Path) -> None:
    """Writes the pipeline beside its final place and moves it there; weights in float16.

    The text encoders stay in float32: transformers loads a model in the precision of its file, and
    the transformer would then be fed half-precision embeddings.
    """
    for network in (pipeline.vae, pipeline.transformer):
        network.half()
        network.register_to_config(_name_or_path="")
    new, old = (directory.with_name(f"{directory.name}.{suffix}") for suffix in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(new)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def generate(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> torch.Tensor:
    """Ten Euler steps without guidance: float32 [B, 3, 48, 48] in [0, 1], on the CPU."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    images = [
        pipeline(
            prompts[start : start + 96],
            num_inference_steps=10,
            guidance_scale=1.0,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            generator=generator,
            output_type="pt",
        ).images
        for start in range(0, len(prompts), 96)
    ]
    return torch.cat(images).float().cpu()


def print_scores(pipeline: StableDiffusion3Pipeline) -> None:
    """Strict scores on the held-out prompts, by tag and rule; and those of real images."""
    metadata = grammar.metadata_lines("test")
    tags = np.array([line["tag"] for line in metadata])
    rng = np.random.default_rng(SEED + 1)
    real = render_batch([grammar.sample_scene(line, rng) for line in metadata])
    columns = {
        "generated": generate(pipeline, [line["prompt"] for line in metadata]),
        "reconstructed": reconstruct(pipeline.vae, real),
        "real": torch.from_numpy(real),
    }
    print(f"{'rule':10s}{'images':15s}" + "".join(f"{tag:>15s}" for tag in grammar.TAGS), end="")
    print(f"{'all':>8s}{'graded':>8s}")
    for rule in RULES:
        for name, images in columns.items():
            graded, strict = (x.double().numpy() for x in verify(images, metadata, rule))
            by_tag = "".join(f"{strict[tags == tag].mean():15.3f}" for tag in grammar.TAGS)
            print(f"{rule:10s}{name:15s}{by_tag}{strict.mean():8.3f}{graded.mean():8.3f}")


def existing(folder: Path) -> str:
    """``folder``, for diffusers, which would look for one that is missing on the hub."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: an earlier --phase makes it")
    return str(folder)


def main() -> None:
    """Runs the phases asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--phase", choices=("all", "vae", "transformer", "scores"), default="all")
    parser.add_argument("--vae_steps", type=positive, default=1000)
    parser.add_argument("--transformer_steps", type=positive, default=4500)
    parser.add_argument("--minutes", type=float, default=math.inf, help="limit of each phase")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the transformer in --work_dir, with fresh images and a new schedule",
    )
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--work_dir", type=user_path, default=Path("runs/pretrain_shapes"))
    parser.add_argument("--output_dir", type=user_path, default=PIPELINE_DIR)
    args = parser.parse_args()

    if args.phase != "scores":
        prepare_folder(args.work_dir)
        prepare_folder(args.output_dir.parent)
    if args.phase in ("all", "vae"):
        grammar.write_metadata(DATASET_DIR)
        vae = train_vae(args.vae_steps, args.minutes, args.device)
        vae.save_pretrained(args.work_dir / "vae")
    if args.phase in ("all", "transformer"):
        vae = AutoencoderKL.from_pretrained(existing(args.work_dir / "vae"))
        directory = args.work_dir / "transformer"
        torch.manual_seed(SEED)
        transformer = build_transformer()
        if args.resume:
            transformer = SD3Transformer2DModel.from_pretrained(existing(directory))
        train_transformer(
            vae,
            transformer.to(args.device),
            directory,
            args.transformer_steps,
            args.minutes,
            seed=SEED + 1 if args.resume else SEED,
        )
        save_pipeline(build_pipeline(vae.cpu(), transformer.cpu(), SEED), args.output_dir)
    if args.phase != "vae":
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            existing(args.output_dir), dtype=torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        print_scores(pipeline.to(args.device))


if __name__ == "__main__":
    command(main)
