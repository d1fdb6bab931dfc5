"""Evaluation options of the scripts, from flags, the run of a checkpoint, or DEFAULTS."""

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion_nft.command_line import natural, path_or_name, positive, resolution, user_path
from diffusion_nft.data.prompts import Prompt, split_file
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models import MODELS
from diffusion_nft.models.hub import base_note, fetch_lora
from diffusion_nft.models.loading import load_model
from diffusion_nft.models.lora import DEFAULT_ADAPTER, load_lora, lora_file
from diffusion_nft.models.precision import COMPUTE_DTYPES, set_tf32
from diffusion_nft.policy import Policy, policy_of_lora, unusual_modules
from diffusion_nft.rewards import REWARD_SERVER_TIMEOUT, check_prompts, parse_option
from diffusion_nft.rewards.combine import RewardSet
from diffusion_nft.runs.checkpoint import load_checkpoint, resolve_checkpoint
from diffusion_nft.shapes import BUILT_IN_LENGTH, BUILT_IN_MODEL, BUILT_IN_RESOLUTION
from diffusion_nft.utils.files import sha256
from diffusion_nft.validation.checks import reward_addresses, reward_options
from diffusion_nft.validation.flat import flatten, unflatten, with_defaults
from diffusion_nft.validation.schema import validate_settings

# Settings without a checkpoint.
DEFAULTS: dict[str, Any] = {
    "pretrained.model_type": "",
    "pretrained.model": "stabilityai/stable-diffusion-3.5-medium",
    "pretrained.revision": "",
    "pretrained.max_sequence_length": 128,
    "pretrained.embedded_guidance": 3.5,
    "pretrained.allow_distilled": False,
    "resolution": 512,
    "sample.negative_prompt": "",
    "mixed_precision": "fp16",
    "allow_tf32": True,
    "match_published": False,
    "eval.seed": 42,
    "eval.num_steps": 40,
    "eval.solver": "flow",
    "eval.guidance_scale": 1.0,
    "eval.batch_size": 16,
    "eval.resolution": 0,
}
# Defaults of the built-in model.
BUILT_IN_SETTINGS: dict[str, Any] = {
    "pretrained.max_sequence_length": BUILT_IN_LENGTH,
    "resolution": BUILT_IN_RESOLUTION,
    "mixed_precision": "no",
    "eval.num_steps": 10,
}
# Parts of a folder name for settings that differ from the defaults.
FILE_NAME_PARTS = {
    "eval.solver": "{}",
    "eval.num_steps": "{}steps",
    "resolution": "{}px",
    "eval.resolution": "{}px",
    "mixed_precision": "{}",
    "pretrained.max_sequence_length": "{}tokens",
}
# T5 tokens in the published evaluation script; the published training uses 128.
PUBLISHED_LENGTH = 256


def add_model_flags(parser: argparse.ArgumentParser, *, lora_required: bool = False) -> None:
    """Adds the flags that ``resolve_options`` reads."""
    lora = parser.add_mutually_exclusive_group(required=lora_required)
    add = lora.add_argument
    add("--checkpoint_path", type=user_path, help="checkpoint, or run directory (its latest)")
    files = "LoRA on the hub, or a local PEFT folder or diffusers file"
    add("--lora_hf_path", type=path_or_name, help=files)
    add = parser.add_argument
    add("--adapter", default=DEFAULT_ADAPTER, help="adapter of a PEFT folder with several")
    base = "base model: folder, hub name or 'shapes'"
    add("--pretrained", dest="pretrained.model", type=path_or_name, help=base)
    add("--model_type", dest="pretrained.model_type", choices=sorted(MODELS))
    add("--num_inference_steps", dest="eval.num_steps", type=positive)
    add("--solver", dest="eval.solver")
    add("--guidance_scale", dest="eval.guidance_scale", type=float)
    add("--resolution", type=resolution, help="N, or HEIGHTxWIDTH")
    add("--negative_prompt", dest="sample.negative_prompt", help="of guidance")
    add("--max_sequence_length", dest="pretrained.max_sequence_length", type=positive)
    add("--mixed_precision", choices=sorted(COMPUTE_DTYPES))
    add(
        "--match_published",
        action="store_const",
        const=True,
        help=f"match the published evaluation script: {PUBLISHED_LENGTH} T5 tokens, integer "
        "timesteps, transformer weights in float32 (docs/evaluation.md)",
    )


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the common flags of the evaluation scripts."""
    add = parser.add_argument
    add("--output_dir", type=user_path)
    add("--seed", dest="eval.seed", type=natural, help="of the noise")
    add("--batch_size", dest="eval.batch_size", type=positive, help="images per batch")
    add("--limit", type=positive, default=0, help="size of a random subset of each test set")
    add("--skip_rewards", default="", help="comma-separated")
    add("--max_unscored", type=natural, help="maximum number of images without a score")
    pairs: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    help = "server of a reward; NAME=local to score in this process"
    add("--reward_servers", type=_served, metavar="NAME=URL", help=help, **pairs)
    add("--option", type=_reward_option, metavar="NAME.KEY=VALUE", help="reward option", **pairs)


def named_rewards(args: argparse.Namespace) -> set[str]:
    """The rewards in --reward_servers and --option."""
    return {name for name, _ in args.reward_servers} | {key.split(".")[1] for key, _ in args.option}


def _served(text: str) -> tuple[str, tuple[str, ...]]:
    """argparse type of NAME=URL[,URL...] or NAME=local."""
    name, _, addresses = text.partition("=")
    if addresses == "local":
        return name, ()
    if complaint := reward_addresses({name: tuple(addresses.split(","))}):
        raise argparse.ArgumentTypeError(complaint)
    return name, tuple(addresses.split(","))


def _reward_option(text: str) -> tuple[str, Any]:
    """argparse type of NAME.KEY=VALUE: the dotted key of the setting, and its value."""
    key, value = parse_option(text)
    name, _, option = key.partition(".")
    if complaint := reward_options({name: {option: value}}):
        raise argparse.ArgumentTypeError(complaint)
    return f"reward_options.{key}", value


@dataclass(frozen=True)
class EvalOptions:
    """Resolved evaluation options."""

    config: ConfigDict  # DEFAULTS updated by ``run``, settings of the script, and flags
    run: dict[str, Any]  # flat configuration of the checkpoint's run; empty without a checkpoint
    checkpoint: Path | None
    lora: str  # local path or hub name; empty for the base model
    adapter: str
    name: str  # of the model
    usual: dict[str, Any]  # flat settings without run and flags
    served: dict[str, tuple[str, ...]]  # reward -> addresses of its servers

    def folder_name(self, limit: int) -> str:
        """Folder name of an evaluation of ``limit`` lines (0: all): model, guidance, seed, and
        settings that differ from the defaults.
        """
        settings = flatten(self.config)
        parts = [
            self.name,
            f"cfg{settings['eval.guidance_scale']:g}",
            f"seed{settings['eval.seed']}",
        ]
        parts += ["published"] if settings["match_published"] else []
        for key, form in FILE_NAME_PARTS.items():
            if settings[key] != self.usual[key]:
                parts.append(form.format(settings[key]))
        parts += [f"{limit}lines"] if limit else []
        return "-".join(parts)

    def record(
        self,
        dist: Distributed,
        dataset: str,
        weights: Mapping[str, float],
        limit: int,
    ) -> dict[str, Any]:
        """All settings that the results of an evaluation depend on."""
        settings = flatten(self.config)
        record = {key: settings[key] for key in DEFAULTS}
        record |= {"dataset": dataset, "dataset_sha256": sha256(split_file(dataset, "test"))}
        record |= {"limit": limit or None, "rewards": dict(weights), "lora": self.lora}
        record["reward_options"] = {
            name: {key: value for key, value in options.items() if key != "api_key"}
            for name, options in self._options.items()
            if name in weights
        }
        record["reward_servers"] = {name: at for name, at in self.served.items() if name in weights}
        if self.lora:
            record["adapter"] = self.adapter
            record["lora_sha256"] = sha256(self.fetch(dist))
        return record

    @property
    def _options(self) -> dict[str, Any]:
        """Options of the rewards that are not scored by servers."""
        options = self.config.get("reward_options", {})
        return {name: dict(own) for name, own in options.items() if name not in self.served}

    def check_test_prompts(
        self, names: Iterable[str], prompts: Sequence[Prompt], lines: Sequence[int]
    ) -> None:
        """Raises the errors of ``rewards.check_prompts`` for ``lines`` of a test set."""
        check_prompts(
            names,
            [prompt.text for prompt in prompts],
            [prompt.metadata for prompt in prompts],
            options=self._options,
            reward_servers=self.served,
            lines=lines,
        )

    def rewards(self, weights: Mapping[str, float], dist: Distributed) -> RewardSet:
        """The rewards of ``weights``.  Raises the errors of ``rewards.build_reward``."""
        # Also set by loading a model, which scoring may not need.
        set_tf32(self.config.allow_tf32)
        return RewardSet.build(
            weights,
            dist.device,
            options=self._options,
            reward_servers=self.served,
            timeout=self.config.get("reward_server_timeout_seconds", REWARD_SERVER_TIMEOUT),
            max_unscored=self.config.get("max_unscored", 0),
        )

    def fetch(self, dist: Distributed) -> Path:
        """The local file of the LoRA, downloaded if needed.  Raises OSError or ValueError."""
        assert self.lora, "the base model has no LoRA"
        with dist.main_first():
            return lora_file(fetch_lora(self.lora), self.adapter)

    def model(self, dist: Distributed) -> Any:
        """The base model with the LoRA, if any, active.  Raises OSError or ValueError."""
        model = load_model(self.config, dist)
        self.policy(model, dist)
        return model

    def policy(self, model: Any, dist: Distributed) -> Policy | None:
        """The LoRA's policy on ``model``, active; None for the base model.

        Prints a note if the LoRA names another base model or adapts other layers than in training.
        Raises OSError or ValueError, naming the LoRA, if it is not available or does not fit.
        """
        if not self.lora:
            return None
        file, base = self.fetch(dist), self.config.pretrained.model
        try:
            lora = load_lora(file)
            policy = policy_of_lora(model, lora)
        except ValueError as error:
            raise ValueError(f"LoRA {self.lora} on the base model {base}: {error}") from error
        if note := base_note(lora, base):
            dist.log(f"{self.lora}: {note}")
        if difference := unusual_modules(
            model, lora.modules, self.run.get("train.lora_targets", "attention")
        ):
            dist.log(f"{self.lora}: on other layers than those that training adapts: {difference}")
        return policy


def resolve_options(
    args: argparse.Namespace, script: Mapping[str, Any] | None = None
) -> EvalOptions:
    """Resolves the parsed flags (settings by dotted keys) with the run of the checkpoint.

    ``script``: settings of the script, which override those of the run.  Raises ValueError for
    invalid settings or a missing checkpoint.
    """
    run: dict[str, Any] = {}
    checkpoint: Path | None = None
    chosen = args.lora_hf_path or getattr(args, "pretrained.model") or "base"
    name = chosen if chosen in ("base", BUILT_IN_MODEL) else _model_name(chosen)
    if args.checkpoint_path:
        args.checkpoint_path = checkpoint = resolve_checkpoint(args.checkpoint_path)
        run = with_defaults(load_checkpoint(checkpoint).state["config"])
        name = _model_name(str(checkpoint))
    flags = DEFAULTS.keys() | {"dataset", "max_unscored"}
    given = {key: value for key, value in vars(args).items() if value is not None and key in flags}
    script, family, published = dict(script or {}), {}, {}
    if (DEFAULTS | run | script | given)["pretrained.model"] == BUILT_IN_MODEL:
        family = BUILT_IN_SETTINGS
    elif "match_published" in given:
        published = {"pretrained.max_sequence_length": PUBLISHED_LENGTH}
    usual = DEFAULTS | family | script | published
    # Only evaluation scripts have these flags.
    options, servers = (dict(getattr(args, flag, ())) for flag in ("option", "reward_servers"))
    settings = DEFAULTS | family | run | script | published | given | options
    if "resolution" in script | given:
        settings["eval.resolution"] = 0
    validate_settings({key: settings[key] for key in DEFAULTS})
    lora = str(checkpoint or args.lora_hf_path or "")
    name += f"-{args.adapter}" if args.adapter != DEFAULT_ADAPTER else ""
    addresses = {**unflatten(run).get("reward_servers", {})} | servers
    served = {reward: at for reward, at in addresses.items() if at}
    for reward in (key.split(".")[1] for key in options):
        if reward in served:
            raise ValueError(
                f"--option {reward}...: set the options of this reward at its server, "
                f"{served[reward][0]}, or use --reward_servers {reward}=local"
            )
    return EvalOptions(
        unflatten(settings), run, checkpoint, lora, args.adapter, name, usual, served
    )


def _model_name(given: str) -> str:
    """Name for a hub repository or path; of a path several parts, as the last is often "lora"."""
    parts = Path(given).parts
    if os.path.exists(given):
        # Links are not followed, to keep the given name.
        parts = Path(os.path.abspath(given)).parts[1:]
        # For a checkpoint in a run directory: the names of run and checkpoint.
        parts = parts[-3:] if parts[-2:-1] == ("checkpoints",) else parts[-4:]
    return "-".join(part for part in parts if part not in ("/", "checkpoints"))
