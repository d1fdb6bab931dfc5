"""Tiny random pipelines of the real classes, saved to disk: a VAE of factor 2, no network."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)
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


QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def qwen_tokenizer() -> Qwen2Tokenizer:
    vocab = {token: index for index, token in enumerate((*QWEN_SPECIAL, *CHARACTERS))}
    special = list(QWEN_SPECIAL[1:])
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=special)
    tokenizer.chat_template = "<|im_start|>{{ messages[0]['content'] }}<|im_end|>"
    return tokenizer


def qwen3_config(layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(QWEN_SPECIAL) + len(CHARACTERS),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )


def flux2_klein() -> Any:
    small_vae = redraw(
        AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
        )
    )
    small_vae.bn.running_mean.normal_()
    small_vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=small_vae,
        # Its hidden states 9, 18 and 27 are used.
        text_encoder=redraw(Qwen3ForCausalLM(qwen3_config(28))),
        tokenizer=qwen_tokenizer(),
        transformer=redraw(transformer),
    )


def qwen_image() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {
        key: value
        for key, value in qwen3_config(2).to_dict().items()
        if key.endswith(("_size", "_layers", "_heads"))
    }
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope},
            vision_config={
                "depth": 1,
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "num_heads": 2,
                "out_hidden_size": WIDTH,
            },
        )
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=redraw(
            AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[0.3, -0.2, 0.1, 0.5],
                latents_std=[1.2, 0.8, 1.5, 1.1],
            )
        ),
        text_encoder=redraw(encoder),
        tokenizer=qwen_tokenizer(),
        transformer=redraw(transformer),
    )


def z_image() -> Any:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=redraw(Qwen3Model(qwen3_config(3))),
        tokenizer=qwen_tokenizer(),
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
    # Arguments by name and output of the transformer in the pipeline, the shape of our latents, the
    # scheduler's sigma -> x, sigma as it was rounded, velocity.
    call: Callable[[dict[str, Any], Any, torch.Size, Tensor], tuple[Tensor, Tensor, Tensor]]
    # pretrained.max_sequence_length: one token a character, and those of the template.
    tokens: int = 24
    # Some parts compute in float32 whatever the weights' dtype: tolerance of float64 checks.
    exact: float = 1e-12
    learning_rate: float = 0.03  # with which a few epochs raise a reward


def packed_call(given: dict[str, Any], out: Any, shape: torch.Size, sigma: Tensor) -> Any:
    v = unpack_tokens(out[0], shape)
    return unpack_tokens(given["hidden_states"], shape), given["timestep"], v


def pack_latents(x: Tensor) -> Tensor:
    """As the pipelines of FLUX and Qwen-Image do."""
    return FluxPipeline._pack_latents(x, *x.shape)


def unpack_tokens(tokens: Tensor, shape: torch.Size) -> Tensor:
    return FluxPipeline._unpack_latents(tokens, 2 * shape[2], 2 * shape[3], 2)


def klein_latents(pipe: Any, latents: Tensor, shape: torch.Size) -> Tensor:
    """Undoes the pipeline's denormalisation."""
    del shape
    mean, std = pipe.vae.bn.running_mean, (pipe.vae.bn.running_var + 1e-4).sqrt()
    x = pipe._patchify_latents(latents)
    return (x - mean.reshape(1, -1, 1, 1)) / std.reshape(1, -1, 1, 1)


def klein_call(given: dict[str, Any], out: Any, shape: torch.Size, sigma: Tensor) -> Any:
    x, v = (tokens.transpose(1, 2).reshape(shape) for tokens in (given["hidden_states"], out[0]))
    return x, given["timestep"], v


def z_image_call(given: dict[str, Any], out: Any, shape: torch.Size, sigma: Tensor) -> Any:
    del shape
    x, v = (torch.stack(list(part)).squeeze(2) for part in (given["x"], out[0]))
    return x, sigma.expand(len(x)), -v


FAMILIES: dict[str, Family] = {
    "flux1": Family(
        build=flux1,
        options=lambda guidance: {"guidance_scale": 3.5, "true_cfg_scale": guidance},
        to_pipeline=pack_latents,
        from_pipeline=lambda pipe, latents, shape: unpack_tokens(latents, shape),
        call=packed_call,
    ),
    "flux2_klein": Family(
        build=flux2_klein,
        options=lambda guidance: {"guidance_scale": guidance},
        to_pipeline=lambda x: x,
        from_pipeline=klein_latents,
        call=klein_call,
    ),
    "qwen_image": Family(
        build=qwen_image,
        options=lambda guidance: {"true_cfg_scale": guidance},
        to_pipeline=pack_latents,
        from_pipeline=lambda pipe, latents, shape: unpack_tokens(latents, shape),
        call=packed_call,
        tokens=300,
    ),
    "z_image": Family(
        build=z_image,
        options=lambda guidance: {"guidance_scale": guidance - 1},
        to_pipeline=lambda x: x.float(),
        from_pipeline=lambda pipe, latents, shape: latents,
        call=z_image_call,
        learning_rate=0.1,
    ),
}


def save(family: str, folder: Path) -> Path:
    """Saves the tiny pipeline of ``family``, always the same, to ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FAMILIES[family].build().save_pretrained(folder)
    return folder
