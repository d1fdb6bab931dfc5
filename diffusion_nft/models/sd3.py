"""Stable Diffusion 3 and 3.5."""

from types import MappingProxyType
from typing import Any

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from diffusion_nft.flow import timestep_from_sigma
from diffusion_nft.models import Size
from diffusion_nft.models.embeddings import PromptEmbeds
from diffusion_nft.models.pipeline import PipelineModel

ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
MLP = r"ff(_context)?\.net\.(0\.proj|2)"


class SD3Model(PipelineModel):
    """Stable Diffusion 3 and 3.5, with or without T5.

    ``match_published``: as in the published code's evaluation, the transformer is stored in
    float32, under autocast, and its timesteps are truncated to integers.
    """

    pipeline_class = StableDiffusion3Pipeline
    optional_parts = ("text_encoder_3", "tokenizer_3")
    # As in the published code: neither attn2 nor feed-forward layers.
    lora_targets = MappingProxyType(
        {
            "attention": rf"transformer_blocks\.\d+\.{ATTENTION}",
            "attention+mlp": rf"transformer_blocks\.\d+\.({ATTENTION}|{MLP})",
        }
    )

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.patch_size = self.transformer.config.patch_size
        if self.pipe.text_encoder is not None and self.pipe.text_encoder_3 is None:
            options["dist"].log(f"{self.name} has no T5: prompts are encoded by CLIP alone")

    def encode_text(self, text: str) -> PromptEmbeds:
        prompt_embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompt=text,
            prompt_2=text,
            prompt_3=text,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return PromptEmbeds.of_text(prompt_embeds, pooled)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        config, factor = self.transformer.config, self.pipe.vae_scale_factor
        largest = config.pos_embed_max_size * config.patch_size * factor
        if max(size) > largest:
            raise ValueError(
                f"resolution = {max(size)}: {self.name} supports at most {largest} pixels"
            )
        return super().latent_shape(size)

    def _grid(self, num_steps: int) -> dict[str, Any]:
        return {"num_inference_steps": num_steps}

    def predict(self, x: Tensor, sigma: Tensor, embeds: PromptEmbeds) -> Tensor:
        timestep = timestep_from_sigma(sigma)
        return self.transformer(
            hidden_states=x,
            timestep=timestep.trunc() if self.match_published else timestep,
            encoder_hidden_states=embeds.prompt_embeds,
            pooled_projections=embeds.pooled,
            return_dict=False,
        )[0]
