"""FLUX.2-klein."""

from types import MappingProxyType

from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from diffusion_nft.models import Size
from diffusion_nft.models.embeddings import PromptEmbeds
from diffusion_nft.models.packing import grid_ids
from diffusion_nft.models.pipeline import PipelineModel

DOUBLE = r"transformer_blocks\.\d+\."
ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
MLP = r"ff(_context)?\.linear_(in|out)"
SINGLE = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"


class Flux2KleinModel(PipelineModel):
    """FLUX.2-klein-base.  Latents are those of the VAE in 2 x 2 patches, normalised.

    Prompts are padded to ``max_sequence_length`` tokens, without a mask, and so depend on it.  In
    bf16 the transformer rounds sigma to 8 bits; the pipeline rounds 1000 sigma, and then a
    thousandth of it.
    """

    pipeline_class = Flux2KleinPipeline
    block_lists = ("transformer_blocks", "single_transformer_blocks")
    # The single blocks compute attention and MLP in the same layers.
    lora_targets = MappingProxyType(
        {
            "attention": rf"{DOUBLE}{ATTENTION}|{SINGLE}",
            "attention+mlp": rf"{DOUBLE}({ATTENTION}|{MLP})|{SINGLE}",
        }
    )

    def distilled(self) -> str:
        return "is_distilled in its model_index.json" if self.pipe.config.is_distilled else ""

    def encode_text(self, text: str) -> PromptEmbeds:
        embeds, _ = self.pipe.encode_prompt(
            prompt=text, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return PromptEmbeds.of_text(embeds)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        height, width = self._latent_size(size)
        return self.transformer.config.in_channels, height // 2, width // 2

    def _mu(self, num_steps: int, size: Size) -> float:
        return compute_empirical_mu(self._image_tokens(size), num_steps)

    def predict(self, x: Tensor, sigma: Tensor, embeds: PromptEmbeds) -> Tensor:
        batch, _, height, width = x.shape
        length = embeds.prompt_embeds.shape[1]
        image_ids = grid_ids((1, height, width, 1), self.device)
        text_ids = grid_ids((1, 1, 1, length), self.device)
        v = self.transformer(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=sigma,
            guidance=None,
            encoder_hidden_states=embeds.prompt_embeds,
            txt_ids=text_ids.expand(batch, -1, -1),
            img_ids=image_ids.expand(batch, -1, -1),
            return_dict=False,
        )[0]
        return v.transpose(1, 2).unflatten(2, (height, width))

    def decode_latents(self, x0: Tensor) -> Tensor:
        norm = self.vae.bn
        std = (norm.running_var + self.vae.config.batch_norm_eps).sqrt()
        latents = x0 * std.reshape(1, -1, 1, 1) + norm.running_mean.reshape(1, -1, 1, 1)
        return self.vae.decode(pixel_shuffle(latents, 2)).sample
