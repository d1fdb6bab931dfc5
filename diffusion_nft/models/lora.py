"""Reading and writing of LoRA files: PEFT folders and diffusers files.

A LoRA changes the weight W of a module to W + (alpha / rank) B A.  PEFT reads alpha from a
configuration, newer diffusers from the metadata, ComfyUI from tensors; others assume alpha = rank.
Files are therefore written with alpha = rank, with the strength multiplied into B.

Only safetensors and JSON are read, never pickles.
"""

import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

PEFT_FOLDER, PEFT_PREFIX = "lora", "base_model.model."
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS, DIFFUSERS_PREFIX = "pytorch_lora_weights.safetensors", "transformer."
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# PEFT saves the adapter of this name in the folder itself, others in subfolders.
DEFAULT_ADAPTER = "default"
# "<module>.lora_A.weight" or "<module>.lora_A.<adapter>.weight".
LORA_KEY = re.compile(r"(?P<module>.+)\.(?P<matrix>lora_[AB])(\.(?P<adapter>[^.]+))?\.weight")
# Keys of rank_pattern and alpha_pattern: the end of a module's name, or "^" and the whole name.
# PEFT accepts any regular expression; one from an untrusted file may never terminate.
PATTERN = re.compile(r"\^?[\w.-]+")
FORMAT = {"format": "pt"}


@dataclass(frozen=True)
class Lora:
    """A LoRA with alpha = rank: the weight W of each module becomes W + B A.

    ``state``: for every module ``"<module>.lora_A.weight": [rank, in]`` and
    ``"<module>.lora_B.weight": [out, rank]``, all of one rank.  ``base_model``: as named by the
    author, or empty.
    """

    state: dict[str, Tensor]
    base_model: str = ""

    @property
    def rank(self) -> int:
        return next(value.shape[0] for key, value in self.state.items() if ".lora_A." in key)

    @property
    def modules(self) -> list[str]:
        return lora_modules(self.state)


def lora_modules(state: Iterable[str]) -> list[str]:
    """Full module names, sorted, from keys such as ``"<module>.lora_A.weight"``."""
    return sorted({key.rsplit(".lora_", 1)[0] for key in state})


def scaled(state: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """``state`` with every B times ``factor``, in at least float32; exact for powers of two."""
    if factor == 1:
        return state
    return {
        key: value.to(torch.promote_types(value.dtype, torch.float32)) * factor
        if ".lora_B." in key
        else value
        for key, value in state.items()
    }


def export_lora(path: Path, lora: Lora) -> None:
    """Writes ``lora`` to the folder ``path`` in both layouts: ``lora/`` for PEFT, and
    ``pytorch_lora_weights.safetensors`` for ``pipe.load_lora_weights(path)`` and ComfyUI.

    Only necessary keys of PEFT's configuration are written, because versions of PEFT reject, or
    warn of, keys of later ones.  Raises OSError.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in lora.state.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": lora.base_model or None,
        "r": lora.rank,
        "lora_alpha": lora.rank,
        # Full names, because the end of a name may match other modules.
        "target_modules": lora.modules,
        "inference_mode": True,
    }
    folder = path / PEFT_FOLDER
    folder.mkdir()
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file, prefix in (
        (folder / PEFT_WEIGHTS, PEFT_PREFIX),
        (path / DIFFUSERS_WEIGHTS, DIFFUSERS_PREFIX),
    ):
        named = {f"{prefix}{key}": value for key, value in state.items()}
        file.write_bytes(safetensors.torch.save(named, FORMAT))


def load_lora(path: Path) -> Lora:
    """The LoRA at ``path``, as in ``lora_file``, on the CPU.

    The alpha / rank of every module is multiplied into its B; modules of smaller rank are padded
    with zeros.  Raises ValueError if there is no LoRA, or not a plain one.
    """
    file = lora_file(Path(path))
    is_peft = file.name == PEFT_WEIGHTS
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            described = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged, or not a safetensors file: {error}") from error
    alphas = {} if is_peft else _pop_alphas(tensors, file)
    plain = _plain_state(tensors, PEFT_PREFIX if is_peft else DIFFUSERS_PREFIX, file)
    pairs = _pairs(plain, file)
    if strangers := sorted(alphas.keys() - pairs.keys()):
        raise ValueError(f"{file} has an alpha for {strangers[0]}, but no LoRA weights")
    rank, state = max(len(a) for a, _ in pairs.values()), {}
    config = _peft_config(file.parent) if is_peft else _described(described, rank, file)
    if config and config.use_dora:
        raise ValueError(f"{file} is not a plain LoRA but DoRA")
    for module, (a, b) in pairs.items():
        own = len(a)
        strength = _strength(module, own, config, file) if config else 1.0
        strength = alphas[module] / own if module in alphas else strength
        if strength != 1:
            b = b.to(torch.float64 if b.dtype == torch.float64 else torch.float32) * strength
        if own < rank:
            a, b = F.pad(a, (0, 0, 0, rank - own)), F.pad(b, (0, rank - own))
        for name, value in (("A", a), ("B", b)):
            if not value.float().isfinite().all():
                raise ValueError(f"{file}: {module}.lora_{name} has NaN or infinite values")
            state[f"{module}.lora_{name}.weight"] = value
    base = config.base_model_name_or_path if config else ""
    return Lora(state, base if isinstance(base, str) else "")


def _pop_alphas(tensors: dict[str, Tensor], file: Path) -> dict[str, float]:
    """Removes ``"transformer.<module>.alpha"`` from ``tensors``; returns module -> alpha."""
    alphas: dict[str, float] = {}
    for key in [key for key in tensors if key.endswith(".alpha")]:
        value = tensors.pop(key)
        if value.numel() != 1 or value.is_complex() or not value.isfinite().all():
            raise ValueError(f"{file}: {key} is not a finite number")
        alphas[key.removeprefix(DIFFUSERS_PREFIX).removesuffix(".alpha")] = float(value)
    return alphas


def _plain_state(tensors: dict[str, Tensor], prefix: str, file: Path) -> dict[str, Tensor]:
    """``tensors`` renamed to the keys of ``Lora.state``; ValueError if not matrices of one LoRA."""
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = LORA_KEY.fullmatch(key.removeprefix(prefix))
        if match is None or not key.startswith(prefix):
            raise ValueError(f"{file} is not a plain LoRA of a transformer: it holds {key}")
        plain = f"{match['module']}.{match['matrix']}.weight"
        if plain in state:
            raise ValueError(f"{file} holds several adapters, {match['adapter']} among them")
        if value.ndim != 2 or not value.is_floating_point() or not value.numel():
            found = f"{value.dtype} {list(value.shape)}"
            raise ValueError(
                f"{file} is not a plain LoRA: {key} is {found}, not a matrix of floats"
            )
        state[plain] = value
    if not state:
        raise ValueError(f"{file} has no LoRA weights")
    return state


def _pairs(state: dict[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A, B); ValueError if one is missing or their ranks differ."""
    pairs = {}
    for module in lora_modules(state):
        a, b = (state.get(f"{module}.lora_{name}.weight") for name in "AB")
        if a is None or b is None or a.shape[0] != b.shape[1]:
            raise ValueError(f"{file} is not a plain LoRA: {module} needs A and B of equal rank")
        pairs[module] = a, b
    return pairs


def _strength(module: str, rank: int, config: LoraConfig, file: Path) -> float:
    """alpha / rank of ``module`` (rsLoRA: alpha / sqrt(rank)) according to ``config``.

    Raises ValueError if alpha is not a finite number, or if the rank is not ``rank``, that of the
    weights.
    """
    described: list[Any] = []
    for default, pattern in (
        (config.r, config.rank_pattern or {}),
        (config.lora_alpha, config.alpha_pattern or {}),
    ):
        if not isinstance(pattern, dict) or not all(map(PATTERN.fullmatch, pattern)):
            raise ValueError(f"{file}: its rank_pattern and alpha_pattern must name modules")
        described.append(pattern.get(get_pattern_key([*pattern], module), default))
    own_rank, alpha = described
    if own_rank != rank:
        raise ValueError(f"{file}: {module} has rank {rank}, its description says {own_rank!r}")
    # JSON of others may hold anything.
    if type(alpha) not in (int, float) or not abs(alpha) <= sys.float_info.max:
        raise ValueError(f"{file}: alpha of {module} must be a finite number")
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _described(described: str, rank: int, file: Path) -> LoraConfig | None:
    """The metadata of a diffusers file, or None; rank and alpha are ``rank`` by default."""
    options: dict[str, Any] = {"r": rank, "lora_alpha": rank}
    try:
        given = json.loads(described).items()
        options |= {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in given}
        return LoraConfig(**options) if given else None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata do not describe a LoRA ({error})") from error


def check_modules(transformer: nn.Module, targets: Iterable[str]) -> None:
    """Raises ValueError if a target, a name or the end of one, matches no linear layer."""
    linear = [f".{n}" for n, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    absent = [t for t in targets if not any(name.endswith(f".{t}") for name in linear)]
    if absent:
        raise ValueError(
            f"LoRA does not fit this model, which has no linear layers {', '.join(absent[:3])} "
            f"({len(absent)} missing)"
        )


def merge_lora(transformer: nn.Module, lora: Lora) -> nn.Module:
    """``transformer``, changed in place, with ``lora`` merged into its weights by PEFT.

    Raises ValueError if the LoRA does not fit.
    """
    check_modules(transformer, lora.modules)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=lora.modules)
    wrapped = get_peft_model(transformer, config)  # pyright: ignore[reportArgumentType]
    full = {f"{PEFT_PREFIX}{key}": value for key, value in lora.state.items()}
    shapes = {key: value.shape for key, value in get_peft_model_state_dict(wrapped).items()}
    if wrong := sorted(key for key in shapes if key not in full or full[key].shape != shapes[key]):
        raise ValueError(f"LoRA does not fit this model: {wrong[0]} is missing or misshapen")
    set_peft_model_state_dict(wrapped, full)
    return wrapped.merge_and_unload()  # pyright: ignore[reportCallIssue]


def _peft_config(folder: Path) -> LoraConfig:
    if not (folder / PEFT_CONFIG).is_file():
        raise ValueError(f"{folder} has {PEFT_WEIGHTS} but no {PEFT_CONFIG} with rank and alpha")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"{folder / PEFT_CONFIG} does not describe a LoRA ({error})") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder / PEFT_CONFIG} describes {config.peft_type}, not LoRA")
    return config


def lora_file(path: Path, adapter: str = DEFAULT_ADAPTER) -> Path:
    """The safetensors file of a LoRA.

    ``path``: such a file; a PEFT folder; a folder with one in ``lora/`` (a checkpoint, also of the
    published code); or a folder with a diffusers file.  ``adapter``: for PEFT folders with several
    (``default`` and ``old`` in the published code).  Raises ValueError if there is none, or it is a
    pickle.
    """
    if adapter != DEFAULT_ADAPTER:
        files = [path / adapter / PEFT_WEIGHTS, path / PEFT_FOLDER / adapter / PEFT_WEIGHTS]
    elif path.is_file() and path.suffix == ".safetensors":
        return path
    else:
        files = [path / PEFT_WEIGHTS, path / PEFT_FOLDER / PEFT_WEIGHTS, path / DIFFUSERS_WEIGHTS]
        others = list(path.glob("*.safetensors"))
        # As in diffusers, the only file of a folder may have any name.
        files += others if len(others) == 1 else []
    if found := [file for file in files if file.is_file()]:
        return found[0]
    present = [path, *path.glob("*"), *path.glob(f"{PEFT_FOLDER}/*")] if path.exists() else []
    if pickles := [str(file) for file in present if file.suffix in PICKLES]:
        raise ValueError(f"{pickles[0]} is a pickle, which can run code: convert it to safetensors")
    if adapter != DEFAULT_ADAPTER:
        wanted = f"adapter {adapter!r} in a subfolder of that name"
        raise ValueError(f"{path} has no LoRA ({wanted}){_hint(path)}")
    if several := sorted(str(file) for file in path.glob("*.safetensors")):
        shown = ", ".join(several[:5]) + (", ..." if len(several) > 5 else "")
        raise ValueError(f"{path} has {len(several)} safetensors files: choose one of {shown}")
    raise ValueError(f"{path} has no LoRA ({PEFT_WEIGHTS} or {DIFFUSERS_WEIGHTS}){_hint(path)}")


def _hint(path: Path) -> str:
    """PEFT folders in subfolders of ``path``, as in hub repositories with several LoRAs."""
    deeper = [f for n in (1, 2, 3) for f in path.glob("*/" * n + PEFT_WEIGHTS)]
    names = sorted(str(file.parent.relative_to(path)) for file in deeper)
    return f"; choose one of its subfolders {', '.join(names)}" if names else ""
