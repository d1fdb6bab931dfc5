"""LoRA files that users load: PEFT folders and diffusers files, written and read.

Nothing is ever unpickled: weights are safetensors, descriptions are JSON.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

PEFT_FOLDER, PEFT_PREFIX = "lora", "base_model.model."
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS, DIFFUSERS_PREFIX = "pytorch_lora_weights.safetensors", "transformer."
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# PEFT writes its adapter of this name into the folder itself, others into subfolders.
DEFAULT_ADAPTER = "default"
# "<module>.lora_A.weight", with or without the name of an adapter before "weight".
LORA_KEY = re.compile(r"(?P<module>.+)\.(?P<matrix>lora_[AB])(\.(?P<adapter>[^.]+))?\.weight")


def export_lora(
    path: Path,
    state: dict[str, Tensor],
    *,
    rank: int,
    alpha: float,
    target_modules: list[str],
    base_model: str,
) -> None:
    """Writes the LoRA ``state`` (``"<module>.lora_A.weight": ...``) into ``path`` in both layouts.

    ``path/lora/`` is for PEFT; ``path/pytorch_lora_weights.safetensors`` is for
    ``pipe.load_lora_weights(path)``, with alpha in its metadata (diffusers' default is the rank).
    """
    from diffusers.loaders import SD3LoraLoaderMixin

    plain: dict[str, Any] = {key: v.detach().cpu().contiguous() for key, v in state.items()}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  (declared int, used as a factor)
        target_modules=target_modules,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    config.save_pretrained(str(path / PEFT_FOLDER))
    safetensors.torch.save_file(
        {f"{PEFT_PREFIX}{key}": value for key, value in plain.items()},
        path / PEFT_FOLDER / PEFT_WEIGHTS,
        metadata={"format": "pt"},
    )
    SD3LoraLoaderMixin.save_lora_weights(
        path,
        transformer_lora_layers=plain,
        weight_name=DIFFUSERS_WEIGHTS,
        transformer_lora_adapter_metadata={
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(target_modules),
        },
    )


def load_lora(path: Path) -> tuple[dict[str, Tensor], LoraConfig]:
    """``{"<module>.lora_A.weight": ...}`` on the CPU, and rank, alpha and modules as a LoraConfig.

    ``path``: whatever ``lora_file`` takes.  Raises ValueError if that finds none, or it is more
    than plain LoRA.
    """
    file = lora_file(Path(path))
    is_peft = file.name == PEFT_WEIGHTS
    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            described = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or is damaged: {error}") from error
    state = _plain_state(tensors, PEFT_PREFIX if is_peft else DIFFUSERS_PREFIX, file)
    ranks = {value.shape[0 if ".lora_A." in key else 1] for key, value in state.items()}
    config = _peft_config(file.parent) if is_peft else _described(described, min(ranks), file)
    patterned = config.use_rslora or config.rank_pattern or config.alpha_pattern
    alpha = config.lora_alpha
    if config.use_dora or patterned or [*ranks] != [config.r] or not _is_factor(alpha):
        raise ValueError(f"{file} is not a plain LoRA: one rank and one alpha for all are expected")
    if not isinstance(config.target_modules, (list, set)):
        config.target_modules = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    return state, config


def _plain_state(tensors: dict[str, Tensor], prefix: str, file: Path) -> dict[str, Tensor]:
    """``tensors`` of ``file`` by plain names; ValueError unless they are matrices of one LoRA."""
    state: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = LORA_KEY.fullmatch(key.removeprefix(prefix))
        if match is None or not key.startswith(prefix):
            raise ValueError(f"{file} is not a plain LoRA of a transformer: it holds {key}")
        plain = f"{match['module']}.{match['matrix']}.weight"
        if plain in state:
            raise ValueError(f"{file} holds several adapters, {match['adapter']} among them")
        if value.ndim != 2 or not value.is_floating_point() or not value.numel():
            shape = f"{value.dtype} {list(value.shape)}"
            raise ValueError(f"{file} is not a plain LoRA: {key} is {shape}, no matrix of weights")
        if not value.float().isfinite().all():
            raise ValueError(f"{file}: {key} holds numbers that are not finite")
        state[plain] = value
    if not state:
        raise ValueError(f"{file} holds no LoRA weights")
    return state


def _described(described: str, rank: int, file: Path) -> LoraConfig:
    """What the metadata of a diffusers file says; where it does not give alpha, it is ``rank``."""
    options: dict[str, Any] = {"r": rank, "lora_alpha": rank}
    try:
        given = json.loads(described).items()
        options |= {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in given}
        return LoraConfig(**options)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: its metadata describe no LoRA ({error})") from error


def _is_factor(alpha: Any) -> bool:
    """Whether ``alpha`` can be one: strangers' JSON may hold anything there."""
    return type(alpha) in (int, float) and abs(alpha) <= sys.float_info.max


def load_scaled(path: Path, *, rank: int, alpha: int) -> dict[str, Tensor]:
    """The state that ``load_lora`` gives; ValueError also for another rank or alpha / rank."""
    state, lora = load_lora(path)
    if lora.r != rank or lora.lora_alpha / lora.r != alpha / rank:
        raise ValueError(
            f"LoRA {path} has alpha/rank {lora.lora_alpha}/{lora.r}, this policy {alpha}/{rank}"
        )
    return state


def merge_lora(transformer: nn.Module, state: dict[str, Tensor], lora: LoraConfig) -> nn.Module:
    """``transformer`` with what ``load_lora`` gave added to its weights, by PEFT's own merge.

    Changes ``transformer``.  Raises ValueError if the LoRA does not fit it.
    """
    modules = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    if absent := sorted(set(modules) - {name for name, _ in transformer.named_modules()}):
        raise ValueError(f"LoRA does not fit this model, which has no {', '.join(absent[:3])}")
    config = LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules=modules)
    wrapped = get_peft_model(transformer, config)  # pyright: ignore[reportArgumentType]
    full = {f"{PEFT_PREFIX}{key}": value for key, value in state.items()}
    shapes = {key: value.shape for key, value in get_peft_model_state_dict(wrapped).items()}
    if wrong := sorted(key for key in shapes if key not in full or full[key].shape != shapes[key]):
        raise ValueError(f"LoRA does not fit this model: shape or absence of {wrong[0]}")
    set_peft_model_state_dict(wrapped, full)
    return wrapped.merge_and_unload()  # pyright: ignore[reportCallIssue]


def _peft_config(folder: Path) -> LoraConfig:
    if not (folder / PEFT_CONFIG).is_file():
        raise ValueError(f"{folder} has {PEFT_WEIGHTS} but no {PEFT_CONFIG} with rank and alpha")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ValueError(f"{folder / PEFT_CONFIG} describes no LoRA ({error})") from error
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder / PEFT_CONFIG} describes {config.peft_type}, not LoRA")
    return config


def lora_file(path: Path, adapter: str = DEFAULT_ADAPTER) -> Path:
    """The safetensors file that ``path`` means.

    ``path``: such a file; a PEFT folder; a folder with one in ``lora/`` (a checkpoint, also the
    published code's); or a folder with a diffusers file.  Of a PEFT folder with several adapters
    (the published code's have ``default`` and ``old``), ``adapter`` names the one to take.  Raises
    ValueError if there is none, or it is a pickle.
    """
    if adapter != DEFAULT_ADAPTER:
        files = [path / adapter / PEFT_WEIGHTS, path / PEFT_FOLDER / adapter / PEFT_WEIGHTS]
    elif path.is_file() and path.suffix == ".safetensors":
        return path
    else:
        files = [path / PEFT_WEIGHTS, path / PEFT_FOLDER / PEFT_WEIGHTS, path / DIFFUSERS_WEIGHTS]
        others = list(path.glob("*.safetensors"))
        # diffusers, too, takes the only file of a folder, whatever its name.
        files += others if len(others) == 1 else []
    if found := [file for file in files if file.is_file()]:
        return found[0]
    present = [path, *path.glob("*"), *path.glob(f"{PEFT_FOLDER}/*")] if path.exists() else []
    if pickles := [str(file) for file in present if file.suffix in PICKLES]:
        raise ValueError(f"{pickles[0]} is a pickle, which can run code; save it as safetensors")
    wanted = f"{PEFT_WEIGHTS} or {DIFFUSERS_WEIGHTS}"
    if adapter != DEFAULT_ADAPTER:
        wanted = f"adapter {adapter!r} in a subfolder of that name"
    raise ValueError(f"{path} holds no LoRA ({wanted}){_hint(path)}")


def _hint(path: Path) -> str:
    """Where else below ``path`` PEFT folders are: a hub repository may hold several."""
    deeper = [f for n in (1, 2, 3) for f in path.glob("*/" * n + PEFT_WEIGHTS)]
    names = sorted(str(file.parent.relative_to(path)) for file in deeper)
    return f"; its subfolders {', '.join(names)} do: give one of them" if names else ""
