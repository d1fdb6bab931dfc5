"""Which model, LoRA and sampler a script uses: by flag, by the checkpoint's run, by DEFAULTS."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_nft.checkpoint import load_checkpoint, resolve_checkpoint
from diffusion_nft.checks import EMBEDDED_MODEL
from diffusion_nft.distributed import Distributed
from diffusion_nft.hub import fetch_lora
from diffusion_nft.lora import DEFAULT_ADAPTER, lora_file
from diffusion_nft.models import MODELS
from diffusion_nft.policy import Policy, policy_of_lora
from diffusion_nft.precision import COMPUTE_DTYPES
from diffusion_nft.validation import EMBEDDED_LENGTH, EMBEDDED_RESOLUTION, validate_settings

# Settings without a checkpoint; with one, those of its run.
DEFAULTS: dict[str, Any] = {
    "pretrained.model_type": "sd3",
    "pretrained.model": "stabilityai/stable-diffusion-3.5-medium",
    "pretrained.revision": "",
    "pretrained.max_sequence_length": 128,
    "resolution": 512,
    "mixed_precision": "fp16",
    "allow_tf32": True,
    "remote_timeout_seconds": 300.0,
    "seed": 42,
    "eval.num_steps": 40,
    "eval.solver": "flow",
    "eval.guidance_scale": 1.0,
    "eval.batch_size": 16,
}
# What the embedded model was made for.
EMBEDDED: dict[str, Any] = {
    "pretrained.max_sequence_length": EMBEDDED_LENGTH,
    "resolution": EMBEDDED_RESOLUTION,
    "mixed_precision": "no",
    "eval.num_steps": 10,
}


def positive(text: str) -> int:
    """argparse's type of a count."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def add_model_flags(parser: argparse.ArgumentParser, *, lora_required: bool = False) -> None:
    """The flags that ``resolve`` reads."""
    lora = parser.add_mutually_exclusive_group(required=lora_required)
    lora.add_argument(
        "--checkpoint_path", type=Path, help="a checkpoint or a run directory (its latest)"
    )
    lora.add_argument(
        "--lora_hf_path", help="a LoRA on the hub, or a local PEFT folder or diffusers file"
    )
    add = parser.add_argument
    add("--adapter", default=DEFAULT_ADAPTER, help="which one of a PEFT folder with several")
    add("--pretrained", dest="pretrained.model", help="base: folder, hub name, or 'shapes'")
    add("--model_type", dest="pretrained.model_type", choices=sorted(MODELS))
    add("--num_inference_steps", dest="eval.num_steps", type=positive)
    add("--solver", dest="eval.solver")
    add("--guidance_scale", dest="eval.guidance_scale", type=float)
    add("--resolution", type=positive)
    add("--max_sequence_length", dest="pretrained.max_sequence_length", type=positive)
    add("--mixed_precision", choices=sorted(COMPUTE_DTYPES))


@dataclass(frozen=True)
class Choice:
    """What the flags came to."""

    settings: dict[str, Any]  # flat: DEFAULTS, then ``run``, then the flags given
    run: dict[str, Any]  # flat configuration of the checkpoint's run; empty without a checkpoint
    checkpoint: Path | None
    lora: str  # local path or hub name; empty: the base model
    adapter: str
    name: str  # of the model, for people and file names

    def fetch(self, dist: Distributed) -> Path:
        """The local file of the LoRA, downloaded if need be.  Raises OSError or ValueError."""
        assert self.lora, "the base model has no LoRA"
        with dist.main_first():
            return lora_file(fetch_lora(self.lora), self.adapter)

    def policy(self, model: Any, dist: Distributed) -> Policy | None:
        """The LoRA's policy on ``model``, active; None for the base model.

        Raises OSError or ValueError, naming the LoRA, if it cannot be had or does not fit.
        """
        if not self.lora:
            return None
        file = self.fetch(dist)
        try:
            return policy_of_lora(model, file)
        except ValueError as error:
            base = self.settings["pretrained.model"]
            raise ValueError(f"LoRA {self.lora} on the base model {base}: {error}") from error


def resolve(args: argparse.Namespace) -> Choice:
    """Joins the parsed flags (settings by their dotted keys) with the checkpoint's run.

    Raises ValueError, naming them, for settings that cannot be or have no such checkpoint.
    """
    run: dict[str, Any] = {}
    checkpoint: Path | None = None
    name = Path(args.lora_hf_path or getattr(args, "pretrained.model") or "base").name
    if args.checkpoint_path:
        args.checkpoint_path = checkpoint = resolve_checkpoint(args.checkpoint_path)
        run = load_checkpoint(checkpoint).state["config"]
        name = f"{checkpoint.resolve().parents[1].name}-{checkpoint.name}"
    given = {key: value for key, value in vars(args).items() if value is not None}
    family = EMBEDDED if given.get("pretrained.model") == EMBEDDED_MODEL else {}
    settings = DEFAULTS | family | run | given
    validate_settings({key: settings[key] for key in DEFAULTS})
    lora = str(checkpoint or args.lora_hf_path or "")
    return Choice(settings, run, checkpoint, lora, args.adapter, name)
