"""What all model families share: a frozen diffusers pipeline on a device."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import diffusers.utils.logging
import numpy as np
import torch
import transformers.utils.logging
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.images import Images
from diffusion_nft.models import Size
from diffusion_nft.models.embeddings import EmbeddingCache, PromptEmbeds
from diffusion_nft.models.loading import BuildPipeline, load_pipeline
from diffusion_nft.models.precision import Precision

# Limit of compiled graphs per block: kinds of block x policies x batch sizes.
COMPILED_GRAPHS = 64


@contextmanager
def temporarily_on(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Moves the frozen weights of ``modules`` to ``device`` for the block.  The originals are kept,
    so nothing is copied back.
    """
    homes = [(weight, weight.data) for module in modules for weight in module.parameters()]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for weight, home in homes:
            weight.data = home


class PipelineModel(ABC):
    """A ``Model`` around a diffusers pipeline.

    Text encoders and transformer are stored in the compute dtype, the VAE in at least float32.
    """

    pipeline_class: ClassVar[Any]
    # Parts that may be missing.
    optional_parts: ClassVar[tuple[str, ...]] = ()
    # ModuleLists of the transformer's repeated blocks, in order.
    block_lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    # train.lora_targets -> regular expression of whole names of linear layers.
    lora_targets: ClassVar[Mapping[str, str]]
    # Side of the transformer's patches, in elements of the VAE's latents.
    patch_size = 2
    # Maximum of pretrained.max_sequence_length.
    longest_prompt: ClassVar[int] = 512

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        dist: Distributed,
        precision: Precision,
        max_sequence_length: int,
        pipeline: BuildPipeline | None = None,
        embedded_guidance: float = 1.0,
        embed_cache_gb: float = 2.0,
        offload_text_encoders: bool = False,
        vae_batch_size: int = 8,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        match_published: bool = False,
    ):
        """``folder``: of the pipeline's files.  ``name``: in messages.  ``pipeline``: builds it
        from the dtypes of its parts, in place of the files.

        Raises ValueError if the pipeline is damaged, or the prompts' maximum length too large.
        """
        if max_sequence_length > self.longest_prompt:
            raise ValueError(
                f"pretrained.max_sequence_length = {max_sequence_length}: {name} takes prompts of "
                f"at most {self.longest_prompt} tokens"
            )
        self.device, self.precision, self.name = dist.device, precision, name
        self.embedded_guidance, self.match_published = embedded_guidance, match_published
        dtypes = {"default": precision.compute_dtype, "vae": precision.trained_dtype}
        if match_published:
            dtypes["transformer"] = precision.trained_dtype
        self.stored_dtype = dtypes.get("transformer", precision.compute_dtype)
        diffusers.utils.logging.disable_progress_bar()
        # Otherwise diffusers warns of every prompt longer than CLIP's 77 tokens.
        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        load = pipeline or partial(
            load_pipeline, folder, self.pipeline_class, optional=self.optional_parts
        )
        # A pipeline is read into host memory first, which has room for one rather than one per GPU.
        with dist.in_turn() if self.device.type == "cuda" else nullcontext():
            self._place(load(dtypes), offload_text_encoders)
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if compile:
            # Blocks of the same kind share a graph; each policy and each shape has its own.
            for block in self.blocks():
                block.compile(dynamic=False)
        self.compiled = compile
        self.max_sequence_length = max_sequence_length
        self.offload_text_encoders = offload_text_encoders
        self.vae_batch_size = vae_batch_size
        self.forward_counts = {"cost/forwards": 0, "cost/backwards": 0}
        self.encode_cached = EmbeddingCache(self._encode, embed_cache_gb * 1e9)

    def _place(self, pipe: Any, offloaded: bool) -> None:
        self.pipe = pipe
        pipe.set_progress_bar_config(disable=True)
        for networks in self.parts().values():
            for network in networks:
                network.requires_grad_(False).eval()
        self.transformer = pipe.transformer.to(self.device)
        # Convolutions are faster in this layout, on CPUs and on tensor cores.
        self.vae = pipe.vae.to(self.device)
        for module in self.vae.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
        for encoder in () if offloaded else self.text_encoders():
            encoder.to(self.device)

    def text_encoders(self) -> list[nn.Module]:
        parts = (getattr(self.pipe, f"text_encoder{n}", None) for n in ("", "_2", "_3"))
        return [encoder for encoder in parts if encoder is not None]

    def parts(self) -> dict[str, list[nn.Module]]:
        return {
            "transformer": [self.pipe.transformer],
            "text encoders": self.text_encoders(),
            "VAE": [self.pipe.vae],
        }

    def blocks(self) -> list[nn.Module]:
        return [b for blocks in self.block_lists for b in getattr(self.transformer, blocks)]

    def distilled(self) -> str:
        """A sign that the model is distilled to few steps; empty if there is none."""
        return ""

    @abstractmethod
    def encode_text(self, text: str) -> PromptEmbeds:
        """One row, in host memory."""

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> list[PromptEmbeds]:
        offloaded = self.offload_text_encoders
        with temporarily_on(self.text_encoders(), self.device) if offloaded else nullcontext():
            return [self.encode_text(text) for text in texts]

    def encode(self, texts: list[str]) -> PromptEmbeds:
        return self.encode_cached(texts).to(self.device)

    def pop_forward_counts(self) -> dict[str, int]:
        counts, self.forward_counts = self.forward_counts, dict.fromkeys(self.forward_counts, 0)
        return counts

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        counts = dict(self.forward_counts)
        try:
            yield
        finally:
            self.forward_counts = counts

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        return self.vae.config.latent_channels, *self._latent_size(size)

    def _latent_size(self, size: Size) -> Size:
        """Height and width of the VAE's latents.  Raises ValueError if the size is not possible."""
        factor = self.pipe.vae_scale_factor
        multiple = factor * self.patch_size
        if any(side % multiple for side in size):
            raise ValueError(
                f"resolution = {size[0]} x {size[1]}: height and width must be multiples of "
                f"{multiple} for {self.name}"
            )
        return size[0] // factor, size[1] // factor

    def _image_tokens(self, size: Size) -> int:
        return math.prod(size) // (self.pipe.vae_scale_factor * self.patch_size) ** 2

    def _grid(self, num_steps: int) -> dict[str, Any]:
        """Arguments of the scheduler's ``set_timesteps``, as the family's pipeline passes them."""
        return {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps)}

    def _mu(self, num_steps: int, size: Size) -> float:
        """Parameter of a shift that depends on the size (``use_dynamic_shifting``)."""
        del num_steps
        config = self.pipe.scheduler.config
        return calculate_shift(
            self._image_tokens(size),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    def sigmas(self, num_steps: int, size: Size) -> Tensor:
        scheduler = self.pipe.scheduler
        if scheduler.config.get("use_dynamic_shifting"):
            scheduler.set_timesteps(**self._grid(num_steps), mu=self._mu(num_steps, size))
        else:
            scheduler.set_timesteps(**self._grid(num_steps))
        sigmas = scheduler.sigmas.to("cpu", torch.float64)
        falls = bool((sigmas.diff() < 0).all()) and 0 < sigmas[0] <= 1 and sigmas[-1] == 0
        if not falls:  # also NaN
            raise ValueError(
                f"{self.name}: {num_steps} steps of its scheduler do not decrease from at most 1 "
                f"to 0, but are {[round(value, 4) for value in sigmas.tolist()]}"
            )
        return sigmas

    def shift(self, num_steps: int, size: Size) -> float:
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return config.get("shift", 1.0)
        mu = self._mu(num_steps, size)
        return math.exp(mu) if config.get("time_shift_type") == "exponential" else mu

    @abstractmethod
    def predict(self, x: Tensor, sigma: Tensor, embeds: PromptEmbeds) -> Tensor:
        """``velocity`` of ``x`` in the dtype of the transformer."""

    def velocity(self, x: Tensor, sigma: Tensor, embeds: PromptEmbeds) -> Tensor:
        self.forward_counts["cost/forwards"] += len(x)
        if torch.is_grad_enabled():
            self.forward_counts["cost/backwards"] += len(x)
        limit = torch._dynamo.config.patch(recompile_limit=COMPILED_GRAPHS)
        with (
            self.precision.autocast(self.stored_dtype),
            limit if self.compiled else nullcontext(),
        ):
            v = self.predict(x.to(self.stored_dtype), sigma, embeds)
        return v.to(self.precision.trained_dtype)

    def guided(self, without: Tensor, with_prompt: Tensor, scale: float) -> Tensor:
        return without + scale * (with_prompt - without)

    def decode_latents(self, x0: Tensor) -> Tensor:
        """Pixels ``[B, 3, H, W]`` in [-1, 1] of latents in the dtype of the VAE."""
        config = self.vae.config
        latents = x0 / config.scaling_factor + config.shift_factor
        return self.vae.decode(latents.to(memory_format=torch.channels_last)).sample

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Images:
        """``vae_batch_size`` images at a time."""
        parts = x0.to(self.vae.dtype).split(self.vae_batch_size)
        return Images.from_float(torch.cat([self.decode_latents(p) for p in parts]) / 2 + 0.5)
