"""Base models by family: loading, encoding prompts, predicting velocities, decoding latents."""

import importlib
from typing import Any

# pretrained.model_type -> "module:Class".
MODELS: dict[str, str] = {
    "sd3": "diffusion_nft.models.sd3:SD3Model",
}


def build_model(model_type: str, **options: Any) -> Any:
    """The model of family ``model_type`` (a key of MODELS), loaded with ``options``."""
    module, _, cls = MODELS[model_type].partition(":")
    return getattr(importlib.import_module(module), cls)(**options)
