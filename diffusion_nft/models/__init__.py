"""Base models by family, and ``Model``, the interface through which the program uses them."""

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
    """A frozen base model of some family on a device; LoRA goes on its ``transformer``."""

    device: device
    precision: Precision
    transformer: nn.Module
    lora_targets: Sequence[
        str
    ]  # the linear layers that training adapts, by the ends of their names
    offload_text_encoders: bool  # they are on the device only while they encode

    @property
    def shift(self) -> float:
        """The time shift that the model was trained with (3 for SD3.5)."""
        ...

    def parts(self) -> dict[str, list[nn.Module]]:
        """All networks: ``transformer``, ``text encoders`` and ``VAE``."""
        ...

    def encode(self, texts: list[str]) -> "Conditioning":
        """Embeddings of ``texts`` on the device, one row per text; a text is encoded once."""
        ...

    def encode_cached(self, texts: Sequence[str]) -> "Conditioning":
        """As ``encode``, in host memory."""
        ...

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """``(C, h, w)`` of the latents of an image; ValueError if it cannot be of that size."""
        ...

    def sigmas(self, num_steps: int, size: Size) -> Tensor:
        """The family's noise levels for ``num_steps`` steps: float64 ``[N + 1]``, down to 0."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor, cond: "Conditioning") -> Tensor:
        """Predicted velocity ``noise - x0`` of ``x: [B, C, h, w]`` at ``sigma: [B]``, float32 or
        wider, by the transformer's active adapter.
        """
        ...

    def decode(self, x0: Tensor) -> "Images":
        """The images of latents ``x0: [B, C, h, w]``."""
        ...

    def pop_forward_counts(self) -> dict[str, int]:
        """Samples that went forward and backward through the transformer since the last call."""
        ...

    def uncounted(self) -> AbstractContextManager[None]:
        """Forwards in this context are not counted."""
        ...


def build_model(model_type: str, **options: Any) -> Any:
    """The model of family ``model_type`` (a key of MODELS), loaded with ``options``."""
    module, _, cls = MODELS[model_type].partition(":")
    return getattr(importlib.import_module(module), cls)(**options)


def image_size(config: "ConfigDict") -> Size:
    """The size of the images of ``config``."""
    return config.resolution, config.resolution


def load_model(config: "ConfigDict", dist: "Distributed") -> Any:
    """The ``Model`` of ``config``: its ``pretrained``, ``perf``, ``mixed_precision``,
    ``allow_tf32`` and, if it has it, ``match_published``.

    Raises OSError if there is none, ValueError if it is damaged or cannot make images of this
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
