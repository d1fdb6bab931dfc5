"""Base models by family, and ``Model``, their common interface."""

import importlib
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, device, nn

from diffusion_nft.models.precision import Precision

if TYPE_CHECKING:  # reward servers import this package with little else
    from ml_collections import ConfigDict

    from diffusion_nft.images import Images
    from diffusion_nft.models.embeddings import PromptEmbeds

PIPELINE_INDEX = "model_index.json"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# pretrained.model_type -> "module:Class".
MODELS: dict[str, str] = {
    "sd3": "diffusion_nft.models.sd3:SD3Model",
    "flux1": "diffusion_nft.models.flux1:FluxModel",
    "flux2_klein": "diffusion_nft.models.flux2_klein:Flux2KleinModel",
    "qwen_image": "diffusion_nft.models.qwen_image:QwenImageModel",
    "z_image": "diffusion_nft.models.z_image:ZImageModel",
}
# Class of the pipeline, as in its model_index.json -> pretrained.model_type.
PIPELINES: dict[str, str] = {
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux1",
    "Flux2KleinPipeline": "flux2_klein",
    "QwenImagePipeline": "qwen_image",
    "ZImagePipeline": "z_image",
}
# Height and width of an image in pixels.
Size = tuple[int, int]


class Model(Protocol):
    """A frozen base model on a device; LoRA adapters are added to its ``transformer``.

    Latents are ``[B, C, h, w]``; sigma is the noise level in [0, 1]; the velocity is
    ``noise - x0``.
    """

    device: device
    precision: Precision
    transformer: nn.Module
    lora_targets: Mapping[str, str]  # train.lora_targets -> regular expression of layers' names
    offload_text_encoders: bool  # to host memory, except while encoding

    def parts(self) -> dict[str, list[nn.Module]]:
        """All networks: ``transformer``, ``text encoders`` and ``VAE``."""
        ...

    def blocks(self) -> list[nn.Module]:
        """The transformer's blocks, in order."""
        ...

    def encode(self, texts: list[str]) -> "PromptEmbeds":
        """Embeddings of ``texts`` on the device, one row each; repeated texts are encoded once."""
        ...

    def encode_cached(self, texts: Sequence[str]) -> "PromptEmbeds":
        """As ``encode``, but in host memory."""
        ...

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """``(C, h, w)`` of an image's latents.  Raises ValueError if the size is not supported."""
        ...

    def sigmas(self, num_steps: int, size: Size) -> Tensor:
        """Noise levels of ``num_steps`` steps: float64 ``[num_steps + 1]`` on the CPU, from 1 (or
        the model's maximum) to 0.
        """
        ...

    def shift(self, num_steps: int, size: Size) -> float:
        """Time shift of ``sigmas`` (3 for SD3.5)."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor, embeds: "PromptEmbeds") -> Tensor:
        """Predicted velocity of ``x: [B, C, h, w]`` at ``sigma: [B]``, float32 or wider, by the
        transformer's active adapter.
        """
        ...

    def guided(self, without: Tensor, with_prompt: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance: the velocities with negative prompt and prompt combined."""
        ...

    def decode(self, x0: Tensor) -> "Images":
        """Images of latents ``x0: [B, C, h, w]``."""
        ...

    def pop_forward_counts(self) -> dict[str, int]:
        """``cost/forwards`` and ``cost/backwards``: samples through the transformer since the last
        call.
        """
        ...

    def uncounted(self) -> AbstractContextManager[None]:
        """A context in which forwards are not counted."""
        ...


def build_model(model_type: str, **options: Any) -> Any:
    """Loads a model of family ``model_type``, a key of MODELS; ``options``: of its class."""
    module, _, cls = MODELS[model_type].partition(":")
    return getattr(importlib.import_module(module), cls)(**options)


def image_size(config: "ConfigDict") -> Size:
    """Height and width of training images."""
    return _size(config.resolution)


def eval_size(config: "ConfigDict") -> Size:
    """Height and width of evaluation images."""
    return _size(config.eval.resolution or config.resolution)


def _size(resolution: int | Sequence[int]) -> Size:
    height, width = resolution if isinstance(resolution, Sequence) else (resolution, resolution)
    return height, width
