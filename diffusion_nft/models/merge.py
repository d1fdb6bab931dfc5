"""Export of a pipeline with a LoRA merged into its transformer, for plain diffusers."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from ml_collections import ConfigDict

from diffusion_nft.models import PIPELINE_INDEX
from diffusion_nft.models.hub import fetch_pipeline, weights_variant
from diffusion_nft.models.lora import Lora, merge_lora
from diffusion_nft.models.precision import COMPUTE_DTYPES
from diffusion_nft.utils.files import read_object

TRANSFORMER = "transformer"


def merge(config: ConfigDict, lora: Lora) -> tuple[Path, Any]:
    """The folder of the base pipeline, and its transformer with ``lora`` merged."""
    base = fetch_pipeline(config.pretrained.model, config.pretrained.revision)
    stored = COMPUTE_DTYPES[config.mixed_precision]
    # A sum in half precision would lose most of the LoRA's small changes.
    exact = torch.promote_types(stored, torch.float32)
    transformer: Any = AutoModel.from_pretrained(
        str(base),
        subfolder=TRANSFORMER,
        dtype=exact,
        variant=weights_variant(base / TRANSFORMER),
    )
    merged: Any = merge_lora(transformer, lora)
    return base, merged.to(stored)


def write_pipeline(base: Path, transformer: Any, to: Path) -> None:
    """Writes the pipeline in ``base`` to ``to``, with ``transformer`` in place of its own.

    Parts missing in ``base`` (T5) are removed from the index, and a variant (fp16) is removed from
    the names of weights.
    """
    transformer.save_pretrained(to / TRANSFORMER)
    index = read_object(base / PIPELINE_INDEX)
    for part in [part for part, classes in index.items() if isinstance(classes, list)]:
        if not (base / part).is_dir():
            index[part] = [None, None]
        elif part != TRANSFORMER:
            shutil.copytree(base / part, to / part)
            if any((to / part).glob("*.safetensors")) and (variant := weights_variant(to / part)):
                _drop_variant(to / part, variant)
    (to / PIPELINE_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _drop_variant(folder: Path, variant: str) -> None:
    for path in list(folder.iterdir()):
        if path.suffixes[-2:] == [f".{variant}", ".json"]:  # an index of shards
            path.write_text(path.read_text("utf-8").replace(f".{variant}-", "-"), "utf-8")
        path.rename(path.with_name(path.name.replace(f".{variant}", "", 1)))
