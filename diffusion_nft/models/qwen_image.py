"""Qwen-Image."""

from types import MappingProxyType

import torch
from diffusers import QwenImagePipeline
from torch import Tensor

from diffusion_nft.models import Size
from diffusion_nft.models.embeddings import PromptEmbeds
from diffusion_nft.models.packing import pack, unpack
from diffusion_nft.models.pipeline import PipelineModel

ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
MLP = r"(img|txt)_mlp\.net\.(0\.proj|2)"


class QwenImageModel(PipelineModel):
    """Qwen-Image.  Prompts have any length up to ``max_sequence_length`` tokens.

    Guided velocities have the norms of those with the prompt, token by token; the pipeline guides
    only if it is given a negative prompt.  In bf16 the transformer rounds sigma to 8 bits; the
    pipeline rounds 1000 sigma, and then a thousandth of it.
    """

    pipeline_class = QwenImagePipeline
    longest_prompt = 1024
    lora_targets = MappingProxyType(
        {
            "attention": rf"transformer_blocks\.\d+\.{ATTENTION}",
            "attention+mlp": rf"transformer_blocks\.\d+\.({ATTENTION}|{MLP})",
        }
    )

    def encode_text(self, text: str) -> PromptEmbeds:
        embeds, _ = self.pipe.encode_prompt(
            prompt=text, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return PromptEmbeds.of_text(embeds)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        return self.vae.config.z_dim, *self._latent_size(size)

    def predict(self, x: Tensor, sigma: Tensor, embeds: PromptEmbeds) -> Tensor:
        tokens = (1, x.shape[2] // 2, x.shape[3] // 2)
        v = self.transformer(
            hidden_states=pack(x),
            timestep=sigma,
            encoder_hidden_states=embeds.prompt_embeds,
            encoder_hidden_states_mask=embeds.mask,
            img_shapes=[[tokens]] * len(x),
            return_dict=False,
        )[0]
        return unpack(v, x.shape)

    def guided(self, without: Tensor, with_prompt: Tensor, scale: float) -> Tensor:
        combined = pack(super().guided(without, with_prompt, scale))
        norms = [torch.norm(v, dim=-1, keepdim=True) for v in (pack(with_prompt), combined)]
        return unpack(combined * (norms[0] / norms[1]), without.shape)

    def decode_latents(self, x0: Tensor) -> Tensor:
        config = self.vae.config
        mean, std = (
            x0.new_tensor(values).reshape(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        # The VAE is of videos: one frame.
        return self.vae.decode((x0 * std + mean).unsqueeze(2)).sample[:, :, 0]
