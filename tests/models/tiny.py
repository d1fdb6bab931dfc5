"""Tiny random pipelines of the real classes, saved to disk: a VAE of factor 2, no network."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel
from transformers import T5Tokenizer as T5

# 32 x 48 pixels: 2 pixels per latent, 2 latents per token.
SIZE = (32, 48)
CHARACTERS = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
WIDTH = 16  # of text encoders


def redraw(module: torch.nn.Module) -> Any:
    """Weights of std 1/sqrt(fan in); default ones are zero or too flat in places."""
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        elif "norm" not in name:
            torch.nn.init.normal_(weight, std=0.1)
    return module.eval()


def clip_tokenizer() -> CLIPTokenizer:
    words = [*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def clip() -> CLIPTextModel:
    size = 2 * len(CHARACTERS) + 2
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    return redraw(CLIPTextModel(config))


def t5_tokenizer() -> T5:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(chr(c), -3.0) for c in range(33, 127)]
    return T5(vocab=[*special, *letters], extra_ids=0, model_max_length=512)


def t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=98, d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=2, num_heads=2
    )
    return redraw(T5EncoderModel(config))


def vae(channels: int = 4) -> AutoencoderKL:
    return redraw(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=channels,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.8,
            shift_factor=0.1,
        )
    )


def flux1() -> Any:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=redraw(transformer),
    )


@dataclass(frozen=True)
class Family:
    """A tiny pipeline, and how it is called for what our model does."""

    build: Callable[[], Any]
    # Our classifier-free guidance (1: none) -> arguments of the pipeline.
    options: Callable[[float], dict[str, Any]]
    # Our latents -> the pipeline's ``latents``.
    to_pipeline: Callable[[Tensor], Tensor]
    # The pipeline, its latent output, the shape of ours -> our latents.
    from_pipeline: Callable[[Any, Tensor, torch.Size], Tensor]
    # Arguments by name and output of the transformer in the pipeline, shape -> x, sigma, velocity.
    call: Callable[[dict[str, Any], Any, torch.Size], tuple[Tensor, Tensor, Tensor]]


def packed_call(given: dict[str, Any], out: Any, shape: torch.Size) -> tuple[Tensor, ...]:
    v = unpack_tokens(out[0], shape)
    return unpack_tokens(given["hidden_states"], shape), given["timestep"], v


def pack_latents(x: Tensor) -> Tensor:
    """As the pipelines of FLUX and Qwen-Image do."""
    return FluxPipeline._pack_latents(x, *x.shape)


def unpack_tokens(tokens: Tensor, shape: torch.Size) -> Tensor:
    return FluxPipeline._unpack_latents(tokens, 2 * shape[2], 2 * shape[3], 2)


FAMILIES: dict[str, Family] = {
    "flux1": Family(
        build=flux1,
        options=lambda guidance: {"guidance_scale": 3.5, "true_cfg_scale": guidance},
        to_pipeline=pack_latents,
        from_pipeline=lambda pipe, latents, shape: unpack_tokens(latents, shape),
        call=packed_call,
    ),
}


def save(family: str, folder: Path) -> Path:
    """Saves the tiny pipeline of ``family``, always the same, to ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FAMILIES[family].build().save_pretrained(folder)
    return folder
