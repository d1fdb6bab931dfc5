"""Models and LoRAs by local path or hub name, and the contents of a pipeline's folder."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from diffusion_nft.models import HUB_NAME
from diffusion_nft.models.lora import Lora
from diffusion_nft.shapes import BUILT_IN_MODEL
from diffusion_nft.shapes.model import PIPELINE_DIR
from diffusion_nft.utils.console import LOGGER

# "fp16" in model.fp16.safetensors and in the names of its shards (diffusers, transformers).
VARIANT = re.compile(r"\.(\w+)(-\d+-of-\d+)?\.(safetensors|bin)$")


def weights_variant(folder: Path) -> str | None:
    """The variant of the weights in ``folder``, such as "fp16"; None if some have no
    variant.

    Raises ValueError if there are no weights or a file is damaged.
    """
    found = [path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".bin")]
    if not found:
        raise ValueError(f"{folder} has no weights (*.safetensors)")
    for path in found:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}") from error
    variants = [match[1] for path in found if (match := VARIANT.search(path.name))]
    return variants[0] if len(variants) == len(found) else None


def fetch_pipeline(name: str, revision: str = "") -> Path:
    """The local folder of a pipeline; ``name``: ``shapes``, a folder, or a hub name, which is
    downloaded unless cached.

    Raises OSError, with advice, if the model is missing, gated, or neither reachable nor cached.
    """
    if name == BUILT_IN_MODEL:
        return PIPELINE_DIR
    if Path(name).is_dir():
        return Path(name)
    return _fetch("model", name, DiffusionPipeline.download, revision=revision or None)


def fetch_lora(name: str) -> Path:
    """The local path of a LoRA; ``name``: a file, a folder, or a hub name, of which the safetensors
    and JSON files are downloaded unless cached.  Raises OSError as ``fetch_pipeline``.
    """
    if Path(name).exists():
        return Path(name)
    return _fetch("LoRA", name, snapshot_download, allow_patterns=["*.safetensors", "*.json"])


def public_name(name: str) -> str:
    """The hub name, or the last part of a local path, so that no private path is published."""
    path = Path(name)
    for part in path.parts:
        # The hub's cache: models--OWNER--NAME/snapshots/...
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return name if HUB_NAME.fullmatch(name) and not path.exists() else path.resolve().name


def base_note(lora: Lora, base: str) -> str:
    """A note if the base model named by ``lora`` is not ``base``, else ""."""
    named, used = public_name(lora.base_model), public_name(base)
    # A local copy usually has the name of the hub's model.
    if not lora.base_model or Path(named).name == Path(used).name:
        return ""
    return f"the LoRA names {named} as its base model; it is used on {used}"


def _fetch(kind: str, name: str, download: Callable[..., Any], **options: Any) -> Path:
    """The downloaded folder, or the cached one if the hub does not answer."""
    try:
        return Path(download(name, **options))
    # huggingface_hub, diffusers and the HTTP library have separate exception classes, which differ
    # between versions and do not include all time-outs.
    except Exception as error:
        try:
            folder = Path(download(name, local_files_only=True, **options))
        except Exception:
            raise OSError(
                f"{kind} {name!r} is not a local path and could not be fetched from the hub "
                f"({type(error).__name__}).  Gated models (SD3.5 is one): accept the licence at "
                f"https://huggingface.co/{name} and run `hf auth login`.  Offline: give a local "
                "path, or set HF_HUB_OFFLINE=1 if it has been downloaded."
            ) from error
        cause = type(error).__name__
        LOGGER.warning(f"{kind} {name!r} is taken from the cache: the hub gave {cause}")
        return folder
