"""Loading of base models."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models import PIPELINE_INDEX, PIPELINES, build_model, eval_size, image_size
from diffusion_nft.models.hub import fetch_pipeline, weights_variant
from diffusion_nft.models.precision import Precision
from diffusion_nft.utils.files import read_object

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# In the names of models distilled to few steps.
DISTILLED_NAME = re.compile(r"turbo|lightning|schnell|hyper|lcm|distill|flash", re.IGNORECASE)

# From the dtypes of a pipeline's parts (and "default"), the pipeline.
BuildPipeline = Callable[[dict[str, torch.dtype]], Any]


def read_index(folder: Path) -> dict[str, Any]:
    """The ``model_index.json`` of a pipeline's folder.

    Raises ValueError if it is missing or of a pipeline that is not supported.
    """
    if not (folder / PIPELINE_INDEX).is_file():
        raise ValueError(f"{folder} is not a diffusers folder: it has no {PIPELINE_INDEX}")
    index = read_object(folder / PIPELINE_INDEX)
    if index.get("_class_name") not in PIPELINES:
        raise ValueError(
            f"{folder} holds a {index.get('_class_name')}; supported are {', '.join(PIPELINES)}"
        )
    return index


def load_pipeline(
    folder: Path, cls: Any, dtypes: dict[str, torch.dtype], *, optional: tuple[str, ...] = ()
) -> Any:
    """The pipeline of class ``cls`` in ``folder``.  A variant (fp16) is loaded if there are no
    other weights.  ``dtypes``: by the name of the part.  ``optional``: parts that may be missing
    together; without the first, the others are not loaded.

    Raises ValueError if another part is missing or damaged, or the pipeline is of another class.
    """
    index = read_index(folder)
    if index["_class_name"] != cls.__name__:
        name = index["_class_name"]
        raise ValueError(f"{folder} holds a {name}; a {cls.__name__} is required")
    present = {
        part
        for part, classes in index.items()
        if isinstance(classes, list) and None not in classes and (folder / part).is_dir()
    }
    parameters = list(inspect.signature(cls).parameters.values())
    required = [p.name for p in parameters if p.default is p.empty]
    absent = optional if set(optional[:1]) - present else ()
    variants = []
    for part in (part for part in required if part not in absent):
        if part not in present:
            raise ValueError(f"{folder} has no {part}, which a {cls.__name__} requires")
        if part.startswith(("transformer", "vae", "text_encoder")):
            if not (folder / part / "config.json").is_file():
                raise ValueError(f"{folder / part} has no config.json")
            variants.append(weights_variant(folder / part))
    try:
        pipe = cls.from_pretrained(
            folder,
            dtype=dtypes,
            variant=next(filter(None, variants), None),
            local_files_only=True,
            **dict.fromkeys(absent),
        )
    # Raised by diffusers and transformers for files that they cannot parse.
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"{folder} cannot be loaded: {type(error).__name__}: {cause}") from error
    for part in required:
        network = getattr(pipe, part)
        weights = network.parameters() if isinstance(network, torch.nn.Module) else ()
        # Files of T5 may lack the copy of its embedding.
        if part not in optional and any(weight.is_meta for weight in weights):
            raise ValueError(f"some weights are missing in {folder / part}")
    return pipe


def load_model(
    config: "ConfigDict", dist: Distributed, *, pipeline: BuildPipeline | None = None
) -> Any:
    """The ``Model`` of a training or evaluation configuration.  ``pipeline``: replaces the files.

    Raises OSError if it is not available, ValueError if it is damaged or does not support the
    resolution or the number of steps.
    """
    own = config.pretrained
    folder = Path()
    if pipeline is None:
        with dist.main_first():
            folder = fetch_pipeline(own.model, own.revision)
    model_type = own.model_type or PIPELINES[read_index(folder)["_class_name"]]
    model = build_model(
        model_type,
        folder=folder,
        name=own.model,
        pipeline=pipeline,
        max_sequence_length=own.max_sequence_length,
        embedded_guidance=own.embedded_guidance,
        dist=dist,
        precision=Precision(config.mixed_precision, dist.device, allow_tf32=config.allow_tf32),
        match_published=config.get("match_published", False),
        **config.get("perf", {}),
    )
    for steps, size in (
        (config.get("sample", {}).get("num_steps"), image_size(config)),
        (config.eval.num_steps, eval_size(config)),
    ):
        model.latent_shape(size)
        if steps:
            model.sigmas(steps, size)
    return model


def check_distilled(model: Any, config: "ConfigDict", dist: Distributed) -> None:
    """Raises ValueError if ``model`` is distilled to few steps, which training on noised samples
    would undo: its images blur (github.com/NVlabs/DiffusionNFT, issue 45).  A local folder with
    only such a name is warned of.
    """
    if config.pretrained.allow_distilled:
        return
    name, sign = config.pretrained.model, model.distilled()
    local = Path(name).is_dir()
    if not sign and (found := DISTILLED_NAME.search(Path(name).name)):
        sign = f"{found[0]!r} in its name"
    if sign and local and not model.distilled():
        dist.log(f"{name} may be distilled to few steps ({sign}): training would blur it")
    elif sign:
        raise ValueError(
            f"pretrained.model = {name!r} is distilled to few steps ({sign}), and training blurs "
            "such models: choose its base model, or set pretrained.allow_distilled = True"
        )
