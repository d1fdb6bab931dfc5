"""Reward weights: sources, location and safe loading.

Files are stored in ``reward_ckpts/`` at the root of the repository, or in the folder of the
environment variable DIFFUSION_NFT_REWARD_CKPTS.  Models of the Hugging Face hub are stored in the
hub's cache.  ``scripts/download.py`` fetches both.
"""

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion_nft.utils.paths import expand

ROOT_VARIABLE = "DIFFUSION_NFT_REWARD_CKPTS"
DEFAULT_ROOT = Path(__file__).resolve().parents[2] / "reward_ckpts"


@dataclass(frozen=True)
class WeightFile:
    """A file's name in ``reward_ckpts/`` and its address.

    ``sha256``: the published hash or its first digits; empty for a file of ``repo`` on the
    hub, which publishes its hash.
    """

    file_name: str
    url: str
    sha256: str = ""
    repo: str = ""


@dataclass(frozen=True)
class HubModel:
    """The files of a hub repository that a reward reads; patterns match optional files."""

    repo: str
    files: tuple[str, ...]


# reward -> its file, named as in the published set-up.
WEIGHT_FILES: dict[str, WeightFile] = {
    "aesthetic": WeightFile(
        "sac+logos+ava1-l14-linearMSE.pth",
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/refs/heads/main/"
        "sac+logos+ava1-l14-linearMSE.pth",
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    ),
    "geneval": WeightFile(
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
        "https://download.openmmlab.com/mmdetection/v2.0/mask2former/"
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/"
        "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth",
        sha256="743b7d99",
    ),
    "hpsv2": WeightFile(
        "HPS_v2.1_compressed.pt",
        "https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt",
        repo="xswu/HPSv2",
    ),
    "imagereward": WeightFile(
        "ImageReward.pt",
        "https://huggingface.co/THUDM/ImageReward/resolve/main/ImageReward.pt",
        repo="THUDM/ImageReward",
    ),
}

_MODEL = ("config.json", "model.safetensors")
_TOKENIZER = ("config.json", "tokenizer_config.json", "*token*.json", "vocab*", "merges*")
_IMAGES = ("preprocessor_config.json",)
_CLIP_L = HubModel("openai/clip-vit-large-patch14", (*_MODEL, *_TOKENIZER, *_IMAGES))

# reward -> its models on the hub.
HUB_MODELS: dict[str, tuple[HubModel, ...]] = {
    "aesthetic": (_CLIP_L,),
    "clipscore": (_CLIP_L,),
    # open_clip's source of the "openai" weights of ViT-L-14-quickgelu.
    "geneval": (
        HubModel("timm/vit_large_patch14_clip_224.openai", ("open_clip_model.safetensors",)),
    ),
    "imagereward": (HubModel("bert-base-uncased", _TOKENIZER),),
    "pickscore": (
        HubModel("yuvalkirstain/PickScore_v1", _MODEL),
        HubModel("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", (*_TOKENIZER, *_IMAGES)),
    ),
}

# reward -> reason why nothing has to be fetched.
NOTHING_TO_FETCH: dict[str, str] = {
    "ocr": "the models are inside the package rapidocr",
    "shapes": "reads pixels, no model",
    "jpeg_compressibility": "no model",
    "jpeg_incompressibility": "no model",
    "image_statistics": "no model",
    "unifiedreward": "the model is loaded by a server that you start",
}


def weights_root() -> Path:
    given = os.environ.get(ROOT_VARIABLE)
    return Path(expand(given)) if given else DEFAULT_ROOT


def weight_file(name: str) -> Path:
    """Path of the weight file of the reward ``name``; FileNotFoundError if it does not exist."""
    wanted = WEIGHT_FILES[name]
    path = weights_root() / wanted.file_name
    if not path.is_file():
        raise FileNotFoundError(
            f"the {name} reward needs {path}, which does not exist: run "
            f"`python scripts/download.py {name}`, or put {wanted.url} into reward_ckpts/ "
            f"({ROOT_VARIABLE} names another folder)"
        )
    return path


def load_torch_file(path: Path) -> Any:
    """Loads tensors and plain containers from ``path`` to the CPU.

    Raises ValueError if the file is truncated, is not a checkpoint (e.g. an error page), or would
    run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # On arbitrary bytes the unpickler raises any of these.
    except (
        pickle.UnpicklingError,
        EOFError,
        RuntimeError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        raise ValueError(
            f"{path} is not a PyTorch checkpoint that loads safely; was it downloaded in full? "
            f"({type(error).__name__}: {error})"
        ) from error


def load_weights(module: nn.Module, weights: Any, path: Path) -> None:
    """Copies the state dict ``weights``, read from ``path``, into ``module``.

    Raises ValueError unless names and shapes are exactly those of the module.
    """
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path} holds a {type(weights).__name__}, not a state dict")
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {error}") from error
