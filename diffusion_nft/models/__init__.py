"""Base models by family, and ``Model``, their common interface."""

import importlib
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, device, nn

from diffusion_nft.models.precision import Precision

if TYPE_CHECKING:  # reward servers import this package with little else
    from ml_collections import ConfigDict

    from diffusion_nft.distributed.ranks import Distributed
    from diffusion_nft.images import Images
    from diffusion_nft.models.embeddings import Conditioning

PIPELINE_INDEX = "model_index.json"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# pretrained.model_type -> "module:Class".
MODELS: dict[str, str] = {
    "sd3": "diffusion_nft.models.sd3:SD3Model",
}
# Height and width of an image in pixels.
Size = tuple[int, int]


class Model(Protocol):
    """A frozen base model on a device; LoRA adapters are added to its ``transformer``."""

    device: device
    precision: Precision
    transformer: nn.Module
    lora_targets: Sequence[str]  # ends of the names of the linear layers with LoRA
    offload_text_encoders: bool  # to host memory, except while encoding

    @property
    def shift(self) -> float:
        """Time shift used in pretraining (3 for SD3.5)."""
        ...

    def parts(self) -> dict[str, list[nn.Module]]:
        """All networks: ``transformer``, ``text encoders`` and ``VAE``."""
        ...

    def encode(self, texts: list[str]) -> "Conditioning":
        """Embeddings of ``texts`` on the device, one row each; repeated texts are encoded once."""
        ...

    def encode_cached(self, texts: Sequence[str]) -> "Conditioning":
        """As ``encode``, but in host memory."""
        ...

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """``(C, h, w)`` of an image's latents.  Raises ValueError if the size is not supported."""
        ...

    def sigmas(self, num_steps: int, size: Size) -> Tensor:
        """Noise levels of ``num_steps`` steps: float64 ``[num_steps + 1]`` on the CPU, 1 to 0."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor, cond: "Conditioning") -> Tensor:
        """Predicted velocity ``noise - x0`` of ``x: [B, C, h, w]`` at ``sigma: [B]``, float32 or
        wider, by the transformer's active adapter.
        """
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
    """Loads a model of family ``model_type``, a key of MODELS."""
    module, _, cls = MODELS[model_type].partition(":")
    return getattr(importlib.import_module(module), cls)(**options)


def image_size(config: "ConfigDict") -> Size:
    return config.resolution, config.resolution


def load_model(config: "ConfigDict", dist: "Distributed") -> Any:
    """The ``Model`` of a training or evaluation configuration.

    Raises OSError if it is not available, ValueError if it is damaged or does not support the
    ``resolution``.
    """
    model = build_model(
        config.pretrained.model_type,
        name=config.pretrained.model,
        revision=config.pretrained.revision,
        max_sequence_length=config.pretrained.max_sequence_length,
        dist=dist,
        precision=Precision(config.mixed_precision, dist.device, allow_tf32=config.allow_tf32),
        match_published=config.get("match_published", False),
        **config.get("perf", {}),
    )
    model.latent_shape(image_size(config))
    return model
