"""Pretraining of the built-in model: the autoencoder, then the velocity network on noisy captions.

The captions are noisy, as captions from the web: with a probability that depends on the tag, the
image does not fit its caption.  The resulting model draws clean shapes but often ignores its
prompt, which leaves room for reinforcement learning.  Held-out captions are not used.
"""

# The annotations of diffusers are too narrow.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import math
from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from diffusion_nft.flow import add_noise, timestep_from_sigma
from diffusion_nft.shapes import captions as grammar
from diffusion_nft.shapes.model import (
    MAX_SEQUENCE_LENGTH,
    build_pipeline,
    build_transformer,
    build_vae,
)
from diffusion_nft.shapes.scene import NUM_CELLS, random_scene, render_batch

SEED = 0
LEARNING_RATE, WARMUP_STEPS = 2e-3, 150

VAE_BATCH_SIZE = 16
KL_WEIGHT = 6e-4

NUM_IMAGES = 24_000
BATCH_SIZE = 64
CAPTION_DROPOUT = 0.05
EMA_DECAY = 0.997
SHIFT = 3.0

# Relative frequency of a tag, and the probability that its image does not fit the caption.
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
# Share of these images that show the scene of an unrelated caption.
UNRELATED = 0.2


def training_steps(name: str, steps: int, optimizer: Optimizer) -> Iterator[tqdm]:
    """Yields a progress bar once per step: linear warm-up, then cosine to zero."""

    def scale(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = LambdaLR(optimizer, scale)
    for _ in (bar := tqdm(range(steps), desc=name, mininterval=5)):
        optimizer.zero_grad()
        yield bar
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        schedule.step()


def train_vae(steps: int, device: torch.device) -> AutoencoderKL:
    """The autoencoder, with the shift and scale that normalise its latents in the config."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    vae = build_vae().to(device, memory_format=torch.channels_last)
    optimizer = AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    for bar in training_steps("vae", steps, optimizer):
        # Up to nine objects, as mostly empty images are less informative per pixel.
        scenes = [random_scene(rng, max_objects=NUM_CELLS) for _ in range(VAE_BATCH_SIZE)]
        images = torch.from_numpy(render_batch(scenes)).to(device)
        posterior = vae.encode(2 * images - 1).latent_dist
        error = vae.decode(posterior.sample()).sample - (2 * images - 1)
        mse = error.square().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        (error.abs().mean() + 2 * mse + KL_WEIGHT * kl).backward()
        bar.set_postfix(psnr=f"{10 * math.log10(4 / mse.item()):.1f}", refresh=False)
    latents = encode(vae, render_batch([random_scene(rng) for _ in range(512)]))
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4),
        scaling_factor=round(1 / latents.std().item(), 4),
    )
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """Posterior means: float32 [B, 4, 12, 12] for images [B, 3, 48, 48] in [0, 1]."""
    chunks = torch.from_numpy(images).split(64)
    return torch.cat([vae.encode((2 * x - 1).to(vae.device)).latent_dist.mean for x in chunks])


def noisy_pairs(vae: AutoencoderKL, captions: list[dict]) -> tuple[Tensor, Tensor]:
    """Latents [NUM_IMAGES, 4, 12, 12] and, for each, the index of its caption."""
    rng = np.random.default_rng(SEED)
    by_tag = {
        tag: [index for index, caption in enumerate(captions) if caption["tag"] == tag]
        for tag in grammar.TAGS
    }
    weights = np.array([TAG_WEIGHTS[tag] for tag in grammar.TAGS])
    scenes, indices = [], []
    for _ in tqdm(range(NUM_IMAGES), desc="scenes"):
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
    batches = [scenes[start : start + 960] for start in range(0, NUM_IMAGES, 960)]
    latents = torch.cat([encode(vae, render_batch(batch)) for batch in batches])
    latents = (latents - vae.config["shift_factor"]) * vae.config["scaling_factor"]
    return latents, torch.tensor(indices, device=latents.device)


def train_pipeline(vae: AutoencoderKL, steps: int) -> StableDiffusion3Pipeline:
    """The pipeline of ``vae`` and the EMA of a velocity network trained by flow matching."""
    device = vae.device
    torch.manual_seed(SEED)
    transformer = build_transformer()
    captions = [caption for tag in grammar.TAGS for caption in grammar.captions("train", tag)]
    with torch.no_grad():
        embeddings, _, pooled, _ = build_pipeline(vae, transformer, SEED).encode_prompt(
            prompt=[caption["prompt"] for caption in captions] + [""],
            prompt_2=None,
            prompt_3=None,
            device="cpu",
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
        )
    embeddings, pooled = embeddings.to(device), pooled.to(device)
    latents, indices = noisy_pairs(vae, captions)
    transformer.to(device)
    weights = list(transformer.parameters())
    optimizer = AdamW(weights, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ema = EMAModel(weights, decay=EMA_DECAY)
    rng = torch.Generator(device).manual_seed(SEED)
    order = torch.empty(0, dtype=torch.long, device=device)
    for step, bar in enumerate(training_steps("transformer", steps, optimizer)):
        if step:
            ema.step(weights)
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(latents), generator=rng, device=device)
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        x0, caption = latents[batch], indices[batch]
        uniform = torch.rand(3, BATCH_SIZE, generator=rng, device=device)
        caption = torch.where(uniform[0] < CAPTION_DROPOUT, len(captions), caption)
        normal = torch.randn(BATCH_SIZE, generator=rng, device=device)
        sigma = torch.where(uniform[1] < 0.6, normal.sigmoid(), uniform[2])
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        noise = torch.randn(x0.shape, generator=rng, device=device)
        velocity = transformer(
            hidden_states=add_noise(x0, noise, sigma),
            timestep=timestep_from_sigma(sigma),
            encoder_hidden_states=embeddings[caption],
            pooled_projections=pooled[caption],
        ).sample
        loss = (velocity - (noise - x0)).square().mean()
        loss.backward()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    ema.step(weights)
    ema.copy_to(weights)
    # Half precision makes the files smaller.  The text encoders stay in float32, because
    # transformers loads models in the precision of their files.
    return build_pipeline(vae.cpu().half(), transformer.cpu().half(), SEED)
