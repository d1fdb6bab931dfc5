"""Z-Image."""

from types import MappingProxyType

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from diffusion_nft.flow import NUM_TRAIN_TIMESTEPS, timestep_from_sigma
from diffusion_nft.models.embeddings import PromptEmbeds
from diffusion_nft.models.pipeline import PipelineModel

BLOCK = r"(layers|noise_refiner|context_refiner)\.\d+\."
ATTENTION = r"attention\.(to_[qkv]|to_out\.0)"


class ZImageModel(PipelineModel):
    """Z-Image (base).  Prompts have any length up to ``max_sequence_length`` tokens.

    Its transformer takes the time 1 - sigma and predicts x0 - noise.  The guidance scale of its
    pipeline is ours minus 1.
    """

    pipeline_class = ZImagePipeline
    block_lists = ("noise_refiner", "context_refiner", "layers")
    lora_targets = MappingProxyType(
        {
            "attention": rf"{BLOCK}{ATTENTION}",
            "attention+mlp": rf"{BLOCK}({ATTENTION}|feed_forward\.w[123])",
        }
    )

    def encode_text(self, text: str) -> PromptEmbeds:
        (embeds,), _ = self.pipe.encode_prompt(
            prompt=[text],  # changed in place
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return PromptEmbeds.of_text(embeds[None])

    def predict(self, x: Tensor, sigma: Tensor, embeds: PromptEmbeds) -> Tensor:
        rows = zip(embeds.prompt_embeds, embeds.lengths, strict=True)
        images = self.transformer(
            list(x.unsqueeze(2)),
            # Rounded as in the pipeline.
            (NUM_TRAIN_TIMESTEPS - timestep_from_sigma(sigma)) / NUM_TRAIN_TIMESTEPS,
            [row[:length] for row, length in rows],
            return_dict=False,
        )[0]
        return -torch.stack(images).squeeze(2)
