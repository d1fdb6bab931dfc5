"""FLUX.1-dev."""

from types import MappingProxyType

import torch
from diffusers import FluxPipeline
from torch import Tensor

from diffusion_nft.models.embeddings import PromptEmbeds
from diffusion_nft.models.packing import grid_ids, pack, unpack
from diffusion_nft.models.pipeline import PipelineModel

DOUBLE = r"transformer_blocks\.\d+\."
ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
MLP = r"ff(_context)?\.net\.(0\.proj|2)"
SINGLE = r"single_transformer_blocks\.\d+\."


class FluxModel(PipelineModel):
    """FLUX.1-dev, whose guidance is an input of the transformer: ``embedded_guidance``.

    Prompts are padded to ``max_sequence_length`` T5 tokens, without a mask, and so depend on it.
    In bf16 the transformer rounds sigma to 8 bits; the pipeline rounds 1000 sigma, and then a
    thousandth of it.
    """

    pipeline_class = FluxPipeline
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    # The single blocks' proj_out mixes the outputs of attention and MLP.
    lora_targets = MappingProxyType(
        {
            "attention": rf"{DOUBLE}{ATTENTION}|{SINGLE}attn\.to_[qkv]",
            "attention+mlp": rf"{DOUBLE}({ATTENTION}|{MLP})"
            rf"|{SINGLE}(attn\.to_[qkv]|proj_mlp|proj_out)",
        }
    )

    def distilled(self) -> str:
        takes_guidance = self.transformer.config.guidance_embeds
        return "" if takes_guidance else "its transformer takes no guidance, like FLUX.1-schnell's"

    def encode_text(self, text: str) -> PromptEmbeds:
        prompt_embeds, pooled, _ = self.pipe.encode_prompt(
            prompt=text,
            prompt_2=text,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return PromptEmbeds.of_text(prompt_embeds, pooled)

    def predict(self, x: Tensor, sigma: Tensor, embeds: PromptEmbeds) -> Tensor:
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full_like(sigma, self.embedded_guidance)
        v = self.transformer(
            hidden_states=pack(x),
            timestep=sigma,
            guidance=guidance,
            pooled_projections=embeds.pooled,
            encoder_hidden_states=embeds.prompt_embeds,
            txt_ids=sigma.new_zeros(embeds.prompt_embeds.shape[1], 3),
            img_ids=grid_ids((1, x.shape[2] // 2, x.shape[3] // 2), self.device),
            return_dict=False,
        )[0]
        return unpack(v, x.shape)
