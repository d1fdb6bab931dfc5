"""Stable Diffusion 3 and 3.5: loading, prompts to embeddings, velocities, latents to images."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import StableDiffusion3Pipeline
from safetensors import SafetensorError
from torch import Tensor

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.flow import timestep_from_sigma
from diffusion_nft.images import Images
from diffusion_nft.models import Size
from diffusion_nft.models.embeddings import Conditioning, EmbeddingCache
from diffusion_nft.models.hub import fetch_pipeline, read_index, weights_variant
from diffusion_nft.models.precision import Precision

# The attention projections with LoRA, as in the published code: neither attn2 nor feed-forward.
LORA_TARGETS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)

FAMILY = "StableDiffusion3"
# Parts of a pipeline; those of T5 are optional.
NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2")
OTHER_COMPONENTS = ("scheduler", "tokenizer", "tokenizer_2")
T5, T5_TOKENIZER = "text_encoder_3", "tokenizer_3"

# Limit of compiled graphs per block: kinds of block x policies x batch sizes.
COMPILED_GRAPHS = 64


def load_pipeline(folder: Path, dtypes: dict[str, torch.dtype]) -> StableDiffusion3Pipeline:
    """The pipeline in ``folder``, with or without T5.  A variant (fp16) is loaded if there are no
    other weights.  ``dtypes``: by the name of the part.

    Raises ValueError if a part is missing or damaged.
    """
    index = read_index(folder, FAMILY)
    present = [
        part
        for part, classes in index.items()
        if isinstance(classes, list) and None not in classes and (folder / part).is_dir()
    ]
    networks = (*NETWORKS, T5) if T5 in present else NETWORKS
    others = (*OTHER_COMPONENTS, T5_TOKENIZER) if T5 in present else OTHER_COMPONENTS
    for part in (*networks, *others):
        if part not in present:
            raise ValueError(f"{folder} has no {part}, which a {FAMILY}Pipeline requires")
        if part in networks and not (folder / part / "config.json").is_file():
            raise ValueError(f"{folder / part} has no config.json")
    variants = filter(None, [weights_variant(folder / part) for part in networks])
    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(
            folder,
            dtype=dtypes,
            variant=next(variants, None),
            local_files_only=True,
            **({} if T5 in present else dict.fromkeys((T5, T5_TOKENIZER))),
        )
    # Raised by diffusers and transformers for files that they cannot parse.
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"{folder} cannot be loaded: {type(error).__name__}: {cause}") from error
    for part in NETWORKS:
        if any(weight.is_meta for weight in getattr(pipe, part).parameters()):
            raise ValueError(f"some weights are missing in {folder / part}")
    return pipe


@contextmanager
def temporarily_on(modules: list[torch.nn.Module], device: torch.device) -> Iterator[None]:
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


class SD3Model:
    """One frozen SD3 pipeline on a device.

    Text encoders and transformer are stored in the compute dtype, the VAE in at least float32.
    ``match_published``: as in the published code's evaluation, the transformer is stored in
    float32, under autocast, and its timesteps are truncated to integers.
    """

    lora_targets = LORA_TARGETS

    def __init__(
        self,
        name: str,
        *,
        dist: Distributed,
        precision: Precision,
        revision: str = "",
        max_sequence_length: int,
        embed_cache_gb: float = 2.0,
        offload_text_encoders: bool = False,
        vae_batch_size: int = 8,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        match_published: bool = False,
    ):
        """Raises OSError if the model is not available, ValueError if it is damaged."""
        with dist.main_first():
            folder = fetch_pipeline(name, revision)
        self.device, self.precision = dist.device, precision
        dtypes = {"default": precision.compute_dtype, "vae": precision.trained_dtype}
        if match_published:
            dtypes["transformer"] = precision.trained_dtype
        self.stored_dtype = dtypes.get("transformer", precision.compute_dtype)
        diffusers.utils.logging.disable_progress_bar()
        # Otherwise diffusers warns of every prompt longer than CLIP's 77 tokens.
        diffusers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        # A pipeline is read into host memory first, which has room for one rather than one per GPU.
        with dist.in_turn() if self.device.type == "cuda" else nullcontext():
            self._load(folder, dtypes, offload_text_encoders)
        if self.pipe.text_encoder is not None and self.pipe.text_encoder_3 is None:
            dist.print_once(f"{name} has no T5: prompts are encoded by CLIP alone")
        self.pipe.set_progress_bar_config(disable=True)
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if compile:
            # Blocks of the same kind share a graph; each policy and each shape has its own.
            torch._dynamo.config.recompile_limit = COMPILED_GRAPHS
            for block in self.transformer.transformer_blocks:
                block.compile(dynamic=False)
        self.match_published = match_published
        self.max_sequence_length = max_sequence_length
        self.offload_text_encoders = offload_text_encoders
        self.vae_batch_size = vae_batch_size
        self.forward_counts = {"cost/forwards": 0, "cost/backwards": 0}
        self.encode_cached = EmbeddingCache(self._encode, embed_cache_gb * 1e9)
        self.name = name

    def _load(self, folder: Path, dtypes: dict[str, torch.dtype], offloaded: bool) -> None:
        self.pipe = load_pipeline(folder, dtypes)
        for networks in self.parts().values():
            for network in networks:
                network.requires_grad_(False).eval()
        self.transformer = self.pipe.transformer.to(self.device)
        # Convolutions are faster in this layout, on CPUs and on tensor cores.
        self.vae = self.pipe.vae.to(self.device, memory_format=torch.channels_last)
        for encoder in () if offloaded else self._text_encoders():
            encoder.to(self.device)

    def _text_encoders(self) -> list[torch.nn.Module]:
        encoders = (self.pipe.text_encoder, self.pipe.text_encoder_2, self.pipe.text_encoder_3)
        return [encoder for encoder in encoders if encoder is not None]

    def parts(self) -> dict[str, list[torch.nn.Module]]:
        return {
            "transformer": [self.pipe.transformer],
            "text encoders": self._text_encoders(),
            "VAE": [self.pipe.vae],
        }

    def _encode(self, texts: list[str]) -> list[Conditioning]:
        if not self.offload_text_encoders:
            return self._encode_here(texts)
        with temporarily_on(self._text_encoders(), self.device):
            return self._encode_here(texts)

    @torch.no_grad()
    def _encode_here(self, texts: list[str]) -> list[Conditioning]:
        rows = []
        for text in texts:
            prompt_embeds, _, pooled_prompt_embeds, _ = self.pipe.encode_prompt(
                prompt=text,
                prompt_2=text,
                prompt_3=text,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
            assert prompt_embeds is not None and pooled_prompt_embeds is not None
            rows.append(Conditioning(prompt_embeds.cpu(), pooled_prompt_embeds.cpu()))
        return rows

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
        config, factor = self.transformer.config, self.pipe.vae_scale_factor
        largest = config.pos_embed_max_size * config.patch_size * factor
        if max(size) // factor // config.patch_size > config.pos_embed_max_size:
            raise ValueError(
                f"resolution = {max(size)}: {self.name} supports at most {largest} pixels"
            )
        return config.in_channels, size[0] // factor, size[1] // factor

    def encode(self, texts: list[str]) -> Conditioning:
        return self.encode_cached(texts).to(self.device)

    def sigmas(self, num_steps: int, size: Size) -> Tensor:
        del size  # the scheduler's noise levels do not depend on it
        self.pipe.scheduler.set_timesteps(num_steps)
        return self.pipe.scheduler.sigmas.to("cpu", torch.float64)

    @property
    def shift(self) -> float:
        return self.pipe.scheduler.config.shift

    def velocity(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        self.forward_counts["cost/forwards"] += len(x)
        if torch.is_grad_enabled():
            self.forward_counts["cost/backwards"] += len(x)
        timestep = timestep_from_sigma(sigma)
        with self.precision.autocast(self.stored_dtype):
            v = self.transformer(
                hidden_states=x.to(self.stored_dtype),
                timestep=timestep.trunc() if self.match_published else timestep,
                encoder_hidden_states=cond.prompt_embeds,
                pooled_projections=cond.pooled_prompt_embeds,
                return_dict=False,
            )[0]
        return v.to(self.precision.trained_dtype)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> Images:
        """``vae_batch_size`` images at a time."""
        config = self.vae.config
        latents = x0.to(dtype=self.vae.dtype, memory_format=torch.channels_last)
        parts = [
            self.vae.decode(part / config.scaling_factor + config.shift_factor).sample
            for part in latents.split(self.vae_batch_size)
        ]
        return Images.from_float(torch.cat(parts) / 2 + 0.5)
