"""Models and LoRAs by local path or hub name, and what a pipeline's folder holds."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from diffusion_nft.models import HUB_NAME, PIPELINE_INDEX
from diffusion_nft.models.lora import Lora
from diffusion_nft.shapes import BUILT_IN_MODEL
from diffusion_nft.shapes.model import PIPELINE_DIR
from diffusion_nft.utils.files import read_object

# "fp16" of model.fp16.safetensors and of its shards, as diffusers and transformers name them.
VARIANT = re.compile(r"\.(\w+)(-\d+-of-\d+)?\.(safetensors|bin)$")


def weights_variant(folder: Path) -> str | None:
    """The variant, such as "fp16", in which alone ``folder`` stores a model's weights; None where
    it has plain ones.

    Raises ValueError, naming the folder or the file, if there are no weights or one is damaged.
    """
    found = [path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".bin")]
    if not found:
        raise ValueError(f"{folder} holds no weights (*.safetensors)")
    for path in found:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}") from error
    variants = [match[1] for path in found if (match := VARIANT.search(path.name))]
    return variants[0] if len(variants) == len(found) else None


def read_index(folder: Path, family: str) -> dict[str, Any]:
    """The ``model_index.json`` of a pipeline's folder.

    Raises ValueError unless the name of the pipeline's class begins with ``family``.
    """
    if not (folder / PIPELINE_INDEX).is_file():
        raise ValueError(f"{folder} is not a diffusers folder: it holds no {PIPELINE_INDEX}")
    index = read_object(folder / PIPELINE_INDEX)
    name = index.get("_class_name")
    if not str(name).startswith(family):
        raise ValueError(f"{folder} holds a {name}; {family}Pipeline is needed")
    return index


def fetch_pipeline(name: str, revision: str = "") -> Path:
    """The local folder of a pipeline: ``shapes``, a folder, or a hub name (downloaded if need be).

    Raises OSError with the remedy when the model is missing or gated, or out of reach and not in
    the hub's cache either.
    """
    if name == BUILT_IN_MODEL:
        return PIPELINE_DIR
    if Path(name).is_dir():
        return Path(name)
    return _fetch("model", name, DiffusionPipeline.download, revision=revision or None)


def fetch_lora(name: str) -> Path:
    """The local path of a LoRA: a file or folder, or a hub name (downloaded if need be).

    Only safetensors and JSON files are fetched.  Raises OSError with the remedy.
    """
    if Path(name).exists():
        return Path(name)
    return _fetch("LoRA", name, snapshot_download, allow_patterns=["*.safetensors", "*.json"])


def public_name(name: str) -> str:
    """A hub name as it is, of a local path the last part: no folders of a machine."""
    path = Path(name)
    for part in path.parts:
        # The hub's cache: models--OWNER--NAME/snapshots/...
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return name if HUB_NAME.fullmatch(name) and not path.exists() else path.resolve().name


def base_note(lora: Lora, base: str) -> str:
    """What to say if ``lora`` names another base model than ``base``; empty if it does not."""
    named, used = public_name(lora.base_model), public_name(base)
    # A local copy is usually called as the hub's model is.
    if not lora.base_model or Path(named).name == Path(used).name:
        return ""
    return f"the LoRA names {named} as its base model; it is used on {used}"


def _fetch(kind: str, name: str, download: Callable[..., Any], **options: Any) -> Path:
    """What ``download`` brings, or what it brought earlier if the hub does not answer."""
    try:
        return Path(download(name, **options))
    # The hub's client, diffusers and the HTTP library beneath have families of errors of their own,
    # which change with their versions; a time-out is in none of the others.
    except Exception as error:
        try:
            folder = Path(download(name, local_files_only=True, **options))
        except Exception:
            raise OSError(
                f"{kind} {name!r} is no local path and could not be fetched from the hub "
                f"({type(error).__name__}).  Gated models (SD3.5 is one): accept the licence at "
                f"https://huggingface.co/{name} and run `hf auth login`.  Offline: give a local "
                "path, or set HF_HUB_OFFLINE=1 if it has been downloaded."
            ) from error
        text = f"{kind} {name!r} is taken from the cache, as the hub gave {type(error).__name__}"
        print(text, file=sys.stderr)
        return folder
