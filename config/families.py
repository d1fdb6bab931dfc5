"""Presets of other model families, run as those of nft.py:

    torchrun --nproc_per_node=8 scripts/train_nft.py --config config/families.py:NAME

They start from settings that other trainers publish for these models and from the SD3.5 presets.
Nothing here has been measured: neither results nor memory nor cost (docs/models.md).
"""

import runpy
from pathlib import Path

import ml_collections

# Loaded by path, as torchrun has no ``config`` package.
NFT = runpy.run_path(str(Path(__file__).with_name("nft.py")))


def _family(base: str, model: str, name: str, tokens: int) -> ml_collections.ConfigDict:
    """The SD3.5 preset ``base`` for another model: bf16, micro-batches of 1, gradient
    checkpointing, offloaded text encoders.
    """
    config = NFT["get_config"](base)
    config.save_dir = f"logs/nft/{name}"
    config.pretrained.model = model
    config.pretrained.max_sequence_length = tokens
    config.mixed_precision = "bf16"
    config.sample.batch_size = 4
    config.train.batch_size = 1
    config.train.lora_rank = 64
    config.train.lora_alpha = 128
    config.eval.batch_size = 4
    config.eval.num_prompts = 256
    config.perf.gradient_checkpointing = True
    config.perf.offload_text_encoders = True
    config.perf.vae_batch_size = 1
    return config


def flux1_pickscore() -> ml_collections.ConfigDict:
    """PickScore on FLUX.1-dev at 384 px, evaluated at 1024 px; meant for 8 GPUs of 80 GB.

    Guidance 3.5 is an input of the model, in rollouts, loss and evaluation.  Each sample is trained
    at 2 of the noisiest 5 of 8 sigmas, without a KL term.
    """
    config = _family("sd3_pickscore", "black-forest-labs/FLUX.1-dev", "flux1/pickscore", 512)
    config.resolution = 384
    config.eval.resolution = 1024
    config.sample.num_image_per_prompt = 16
    config.sample.num_steps = 8
    config.train.sigma_range = 0.7
    config.train.timestep_fraction = 0.4
    config.nft.kl_weight = 0.0
    config.eval.num_steps = 28
    return config


def flux2_klein_pickscore() -> ml_collections.ConfigDict:
    """PickScore on FLUX.2-klein-base-4B at 384 px; meant for 8 GPUs of 80 GB.

    Rollouts and evaluation have guidance 4, the loss has none.
    """
    model = "black-forest-labs/FLUX.2-klein-base-4B"
    config = _family("sd3_pickscore", model, "flux2_klein/pickscore", 512)
    config.resolution = 384
    config.sample.num_image_per_prompt = 16
    config.sample.num_steps = 8
    config.sample.guidance_scale = config.eval.guidance_scale = 4.0
    config.train.learning_rate = 1e-4
    config.nft.beta = 0.1
    return config


def qwen_image_ocr() -> ml_collections.ConfigDict:
    """Text rendering on Qwen-Image at 512 px; meant for 8 GPUs of 80 GB.

    LoRA on attention and MLPs; neither rollouts nor evaluation have guidance.
    """
    config = _family("sd3_ocr", "Qwen/Qwen-Image", "qwen_image/ocr", 256)
    config.sample.num_groups = 24
    config.sample.num_image_per_prompt = 16
    config.train.lora_targets = "attention+mlp"
    config.nft.beta = 0.1
    config.nft.old_policy_decay = "delayed_linear"
    return config


def z_image_pickscore() -> ml_collections.ConfigDict:
    """PickScore on Z-Image at 512 px; meant for 8 GPUs of 80 GB.

    Rollouts and evaluation have guidance 5 (the pipeline's 4), the loss has none.  Each sample is
    trained at 2 of the noisiest 5 of 10 sigmas; rewards are standardised per prompt (GDPO).
    """
    config = _family("sd3_pickscore", "Tongyi-MAI/Z-Image", "z_image/pickscore", 512)
    config.sample.num_image_per_prompt = 16
    config.sample.guidance_scale = config.eval.guidance_scale = 5.0
    config.sample.standardize_rewards = True
    config.train.sigma_range = 0.5
    config.train.timestep_fraction = 0.4
    config.nft.beta = 0.1
    return config


def sd35_large_geneval() -> ml_collections.ConfigDict:
    """GenEval on SD3.5-Large at 512 px, with the settings of SD3.5-Medium; meant for 8 GPUs of
    80 GB.
    """
    model = "stabilityai/stable-diffusion-3.5-large"
    config = _family("sd3_geneval", model, "sd35_large/geneval", 128)
    config.train.lora_rank = 32
    config.train.lora_alpha = 64
    return config


PRESETS = {
    preset.__name__: preset
    for preset in (
        *(flux1_pickscore, flux2_klein_pickscore, qwen_image_ocr),
        *(z_image_pickscore, sd35_large_geneval),
    )
}


def get_config(name: str = "") -> ml_collections.ConfigDict:
    """The preset ``name``, locked.  Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    return PRESETS[name]()
