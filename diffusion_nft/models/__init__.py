"""Base models by family: loading, encoding prompts, predicting velocities, decoding latents."""

import importlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_nft.models.precision import Precision

if TYPE_CHECKING:  # reward servers import this package with little else
    from diffusion_nft.distributed.ranks import Distributed

PIPELINE_INDEX = "model_index.json"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# pretrained.model_type -> "module:Class".
MODELS: dict[str, str] = {
    "sd3": "diffusion_nft.models.sd3:SD3Model",
}


def build_model(model_type: str, **options: Any) -> Any:
    """The model of family ``model_type`` (a key of MODELS), loaded with ``options``."""
    module, _, cls = MODELS[model_type].partition(":")
    return getattr(importlib.import_module(module), cls)(**options)


def load_model(settings: Mapping[str, Any], dist: "Distributed") -> Any:
    """The model of a flat configuration: ``pretrained.*``, ``resolution``, ``mixed_precision``,
    ``allow_tf32`` and whatever of ``perf.*`` and ``match_published`` is there.
    """
    perf = {k.removeprefix("perf."): v for k, v in settings.items() if k.startswith("perf.")}
    return build_model(
        settings["pretrained.model_type"],
        name=settings["pretrained.model"],
        revision=settings["pretrained.revision"],
        max_sequence_length=settings["pretrained.max_sequence_length"],
        resolution=settings["resolution"],
        dist=dist,
        precision=Precision(
            settings["mixed_precision"], dist.device, allow_tf32=settings["allow_tf32"]
        ),
        match_published=settings.get("match_published", False),
        **perf,
    )
