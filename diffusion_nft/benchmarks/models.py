"""Benchmarked models, with pretrained or random weights, and epochs run as in the trainer.

``ARCHITECTURES`` have random weights with the shapes of a real model, and random tensors in place
of text embeddings: the costs of sampling and training are those of the real model, that of encoding
is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from ml_collections import ConfigDict
from torch import Tensor, nn

from diffusion_nft.advantages import group_advantages, optimality, standardized_total
from diffusion_nft.data.prompts import Prompt, epoch_prompts
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models.embeddings import EmbeddingCache, PromptEmbeds
from diffusion_nft.models.loading import BuildPipeline, load_model
from diffusion_nft.randomness import generator
from diffusion_nft.rewards import check_prompts
from diffusion_nft.rewards.combine import RewardSet
from diffusion_nft.rewards.worker import ScoringWorker
from diffusion_nft.rollout import Rollout, generate_rollouts
from diffusion_nft.runs.state import TrainingState
from diffusion_nft.tracking.monitor import Monitor
from diffusion_nft.update import build_learner
from diffusion_nft.validation.inputs import build_named, load_checked_prompts, reward_weights
from diffusion_nft.validation.stages import stages_of

CLIP_TOKENS = 77
# More than the number of groups in an epoch.
NUM_SYNTHETIC_PROMPTS = 1000


@dataclass(frozen=True)
class Architecture:
    """Arguments of the SD3Transformer2DModel and AutoencoderKL."""

    transformer: dict[str, Any]
    vae: dict[str, Any]


def _vae(widths: tuple[int, ...], **options: Any) -> dict[str, Any]:
    return dict(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        **options,
    )


ARCHITECTURES = {
    "sd3.5-medium": Architecture(
        transformer=dict(
            sample_size=128,
            num_layers=24,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        vae=_vae((128, 256, 512, 512), layers_per_block=2),
    ),
    # A thousandth of the size, for tests and for scaling of the resolution on CPUs.
    "sd3.5-tiny": Architecture(
        transformer=dict(
            sample_size=64,
            num_layers=3,
            num_attention_heads=2,
            joint_attention_dim=96,
            caption_projection_dim=128,
            pooled_projection_dim=64,
            pos_embed_max_size=64,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
        vae=_vae((8, 8, 16, 16), layers_per_block=1, norm_num_groups=8),
    ),
}


@dataclass(frozen=True)
class Setup:
    """Configuration, prompts and rewards of a benchmark."""

    config: ConfigDict
    dist: Distributed
    arch: str  # a name in ARCHITECTURES; any other value: the model of the config
    prompts: list[Prompt]
    rewards: RewardSet

    @classmethod
    def of(cls, config: ConfigDict, dist: Distributed, arch: str) -> "Setup":
        """Loads prompts (for ARCHITECTURES, numbered ones) and rewards of ``config``.

        Raises ValueError or OSError if they are not available.
        """
        weights, _ = reward_weights(config)
        if arch in ARCHITECTURES:
            prompts = [Prompt(f"prompt {i}") for i in range(NUM_SYNTHETIC_PROMPTS)]
            check_prompts(weights, [p.text for p in prompts], [p.metadata for p in prompts])
        else:
            prompts, *_ = load_checked_prompts(config)
        return cls(
            config, dist, arch, prompts, RewardSet(weights, build_named(config, weights, dist))
        )

    @property
    def num_samples(self) -> int:
        """Samples per epoch over all ranks."""
        return self.config.sample.num_groups * self.config.sample.num_image_per_prompt

    def epoch_prompts(self, epoch: int) -> list[Prompt]:
        groups, seed = self.config.sample.num_groups, self.config.seed
        return epoch_prompts(self.prompts, groups, seed=seed, epoch=epoch)

    def optimality(self, total: Tensor) -> Tensor:
        """Optimality r ``[N]`` from the total rewards ``[N]`` of an epoch."""
        config = self.config
        size = config.sample.num_image_per_prompt
        advantages = group_advantages(total, size, global_std=config.sample.global_std)
        return optimality(
            advantages, adv_clip_max=config.train.adv_clip_max, adv_mode=config.train.adv_mode
        )

    def load(self, *, frozen_in_float32: bool = False) -> Any:
        """Loads the model with frozen weights in the compute dtype, or in float32."""
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.match_published = frozen_in_float32
        if self.arch not in ARCHITECTURES:
            model = load_model(config, self.dist)
        else:
            config.pretrained.model_type = "sd3"
            build = _random_pipeline(ARCHITECTURES[self.arch], self.dist.device)
            model = load_model(config, self.dist, pipeline=build)
            budget = self.config.perf.embed_cache_gb * 1e9
            model.encode_cached = EmbeddingCache(_random_embeddings(model), budget)
        # Without the integer timesteps of ``match_published``.
        model.match_published = False
        return model


def _random_pipeline(arch: Architecture, device: torch.device) -> BuildPipeline:
    """Builds a pipeline with random weights and without text encoders."""

    def build(dtype: dict[str, torch.dtype]) -> StableDiffusion3Pipeline:
        torch.manual_seed(0)
        with torch.device(device):
            transformer = SD3Transformer2DModel(**arch.transformer)
            vae = AutoencoderKL(**arch.vae)
        parts: dict[str, Any] = {
            "transformer": _cast(transformer, dtype.get("transformer", dtype["default"])),
            "vae": _cast(vae, dtype["vae"]),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        }
        encoders = ("text_encoder", "tokenizer")
        absent = {f"{name}{number}": None for name in encoders for number in ("", "_2", "_3")}
        return StableDiffusion3Pipeline(**parts, **absent)  # pyright: ignore[reportArgumentType]

    return build


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module.to(dtype)  # diffusers annotates its own ``to`` without arguments


def _random_embeddings(model: Any) -> Callable[[list[str]], list[PromptEmbeds]]:
    shape, dtype = model.transformer.config, model.precision.compute_dtype
    length = CLIP_TOKENS + model.max_sequence_length

    def encode(texts: list[str]) -> list[PromptEmbeds]:
        rows = []
        for text in texts:
            rng = generator(text)
            prompt_embeds = torch.randn(1, length, shape.joint_attention_dim, generator=rng)
            pooled = torch.randn(1, shape.pooled_projection_dim, generator=rng)
            rows.append(PromptEmbeds.of_text(prompt_embeds.to(dtype), pooled.to(dtype)))
        return rows

    return encode


class Product:
    """Runs epochs with the parts of the trainer."""

    name = "ours"

    def __init__(self, setup: Setup):
        self.setup, config = setup, setup.config
        self.model = setup.load()
        self.learner = build_learner(config, setup.dist, self.model)
        self.policy = self.learner.policy
        self.optimizer = self.learner.optimizer
        # Patched by ``Observer``.
        self.encoder, self.switch, self.waiting = (
            (self.model, "encode_cached"),
            self.policy,
            (ScoringWorker, "results"),
        )
        self.state = TrainingState(
            stages_of(config)[0],
            dist=setup.dist,
            learner=self.learner,
            monitor=Monitor(config, self.learner.algorithm, setup.dist.log),
            prompts={},
        )

    def sample(self, epoch: int) -> tuple[Rollout, Tensor]:
        """Samples of ``epoch``, and their optimality r ``[N]``."""
        setup = self.setup
        with self.policy.use_adapter("old"):
            rollout = generate_rollouts(
                self.model,
                setup.epoch_prompts(epoch),
                setup.rewards,
                setup.config,
                epoch=epoch,
                dist=setup.dist,
                num_images=0,
            )
        total = rollout.scores.total
        if setup.config.sample.standardize_rewards:
            size = setup.config.sample.num_image_per_prompt
            total = standardized_total(rollout.scores.parts, setup.rewards.weights, size)
        return rollout, setup.optimality(total)

    def train(self, rollout: Rollout, r: Tensor, epoch: int) -> None:
        self.learner.train_epoch(rollout, r, epoch=epoch)
