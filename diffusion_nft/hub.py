"""Models and LoRAs by local path or hub name."""

from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from diffusion_nft.checks import EMBEDDED_MODEL
from diffusion_nft.shapes.model import PIPELINE_DIR


def fetch_pipeline(name: str, revision: str = "") -> Path:
    """The local folder of a pipeline: ``shapes``, a folder, or a hub name (downloaded if need be).

    Raises OSError with the remedy when the model is missing, gated or out of reach.
    """
    if name == EMBEDDED_MODEL:
        return PIPELINE_DIR
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(DiffusionPipeline.download(name, revision=revision or None))
    except (OSError, ValueError) as error:
        raise _unreachable("model", name, error) from error


def fetch_lora(name: str) -> Path:
    """The local path of a LoRA: a file or folder, or a hub name (downloaded if need be).

    Only safetensors and JSON files are fetched.  Raises OSError with the remedy.
    """
    if Path(name).exists():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise _unreachable("LoRA", name, error) from error


def _unreachable(kind: str, name: str, error: Exception) -> OSError:
    return OSError(
        f"{kind} {name!r} is no local path and could not be fetched from the hub "
        f"({type(error).__name__}).  Gated models (SD3.5 is one): accept the licence at "
        f"https://huggingface.co/{name} and run `hf auth login`.  Offline: give a local path."
    )
