"""Which model, LoRA, sampler and rewards a script uses: by flag, by the checkpoint's run, by
DEFAULTS."""

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion_nft.command_line import natural, path_or_name, positive, user_path
from diffusion_nft.data.prompts import Prompt, split_file
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models import MODELS, load_model
from diffusion_nft.models.hub import base_note, fetch_lora
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

# Settings without a checkpoint; with one, those of its run.
DEFAULTS: dict[str, Any] = {
    "pretrained.model_type": "sd3",
    "pretrained.model": "stabilityai/stable-diffusion-3.5-medium",
    "pretrained.revision": "",
    "pretrained.max_sequence_length": 128,
    "resolution": 512,
    "mixed_precision": "fp16",
    "allow_tf32": True,
    "match_published": False,
    "seed": 42,
    "eval.num_steps": 40,
    "eval.solver": "flow",
    "eval.guidance_scale": 1.0,
    "eval.batch_size": 16,
}
# What the built-in model was made for.
BUILT_IN_SETTINGS: dict[str, Any] = {
    "pretrained.max_sequence_length": BUILT_IN_LENGTH,
    "resolution": BUILT_IN_RESOLUTION,
    "mixed_precision": "no",
    "eval.num_steps": 10,
}
# Settings that a folder's name tells where they are not the usual ones.
FILE_NAME_PARTS = {
    "eval.solver": "{}",
    "eval.num_steps": "{}steps",
    "resolution": "{}px",
    "mixed_precision": "{}",
    "pretrained.max_sequence_length": "{}tokens",
}
# T5 tokens in the published evaluation script, which trains at 128.
PUBLISHED_LENGTH = 256


def add_model_flags(parser: argparse.ArgumentParser, *, lora_required: bool = False) -> None:
    """The flags that ``resolve_options`` reads."""
    lora = parser.add_mutually_exclusive_group(required=lora_required)
    lora.add_argument(
        "--checkpoint_path", type=user_path, help="a checkpoint or a run directory (its latest)"
    )
    lora.add_argument(
        "--lora_hf_path",
        type=path_or_name,
        help="a LoRA on the hub, or a local PEFT folder or diffusers file",
    )
    add = parser.add_argument
    add("--adapter", default=DEFAULT_ADAPTER, help="which one of a PEFT folder with several")
    add(
        "--pretrained",
        dest="pretrained.model",
        type=path_or_name,
        help="base: folder, hub name, or 'shapes'",
    )
    add("--model_type", dest="pretrained.model_type", choices=sorted(MODELS))
    add("--num_inference_steps", dest="eval.num_steps", type=positive)
    add("--solver", dest="eval.solver")
    add("--guidance_scale", dest="eval.guidance_scale", type=float)
    add("--resolution", type=positive)
    add("--max_sequence_length", dest="pretrained.max_sequence_length", type=positive)
    add("--mixed_precision", choices=sorted(COMPUTE_DTYPES))
    add(
        "--match_published",
        action="store_const",
        const=True,
        help=f"as the published evaluation script: {PUBLISHED_LENGTH} T5 tokens, whole-numbered "
        "timesteps, transformer weights in float32 (docs/evaluation.md)",
    )


def add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that the scripts which evaluate share."""
    add = parser.add_argument
    add("--output_dir", type=user_path)
    add("--seed", type=int, help="of the noise")
    add("--batch_size", dest="eval.batch_size", type=positive, help="images at once")
    add("--limit", type=positive, default=0, help="only so many lines of a test set, drawn")
    add("--skip_rewards", default="", help="comma-separated")
    add("--max_unscored", type=natural, help="images that may have no score; others: an error")
    for flag, kind, form, text in (
        (
            "--reward_servers",
            _served,
            "NAME=URL",
            "served rewards; NAME=local: scored here after all",
        ),
        ("--option", _reward_option, "NAME.KEY=VALUE", "an option of a reward, before the run's"),
    ):
        add(flag, type=kind, nargs="+", action="extend", default=[], metavar=form, help=text)


def named_rewards(args: argparse.Namespace) -> set[str]:
    """The rewards that --reward_servers and --option name."""
    return {name for name, _ in args.reward_servers} | {key.split(".")[1] for key, _ in args.option}


def _served(text: str) -> tuple[str, tuple[str, ...]]:
    """argparse's type of a served reward: NAME=URL, with commas between several addresses, or
    NAME=local.
    """
    name, _, addresses = text.partition("=")
    if addresses == "local":
        return name, ()
    if complaint := reward_addresses({name: tuple(addresses.split(","))}):
        raise argparse.ArgumentTypeError(complaint)
    return name, tuple(addresses.split(","))


def _reward_option(text: str) -> tuple[str, Any]:
    """argparse's type of NAME.KEY=VALUE: the setting by dotted key, and its value."""
    key, value = parse_option(text)
    name, _, option = key.partition(".")
    if complaint := reward_options({name: {option: value}}):
        raise argparse.ArgumentTypeError(complaint)
    return f"reward_options.{key}", value


@dataclass(frozen=True)
class EvalOptions:
    """Resolved evaluation options."""

    config: ConfigDict  # DEFAULTS, then ``run``, the script's own settings, the flags given
    run: dict[str, Any]  # flat configuration of the checkpoint's run; empty without a checkpoint
    checkpoint: Path | None
    lora: str  # local path or hub name; empty: the base model
    adapter: str
    name: str  # of the model, for people and file names
    usual: dict[str, Any]  # the settings without run and flags, flat
    served: dict[str, tuple[str, ...]]  # rewards that servers score, and where

    def folder_name(self, limit: int) -> str:
        """For an evaluation of ``limit`` lines (0: all) of a test set: the model, guidance and
        seed, and what differs from the usual settings."""
        settings = flatten(self.config)
        parts = [self.name, f"cfg{settings['eval.guidance_scale']:g}", f"seed{settings['seed']}"]
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
        """All that decides the numbers of an evaluation, to be kept with them."""
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
        """Those of a served reward are its server's."""
        options = self.config.get("reward_options", {})
        return {name: dict(own) for name, own in options.items() if name not in self.served}

    def check_test_prompts(
        self, names: Iterable[str], prompts: Sequence[Prompt], lines: Sequence[int]
    ) -> None:
        """Raises as ``rewards.check_prompts`` for the ``lines`` of a test set."""
        check_prompts(
            names,
            [prompt.text for prompt in prompts],
            [prompt.metadata for prompt in prompts],
            options=self._options,
            reward_servers=self.served,
            lines=lines,
        )

    def rewards(self, weights: Mapping[str, float], dist: Distributed) -> RewardSet:
        """The rewards of ``weights``.  Raises what ``rewards.build_reward`` raises."""
        # They may score without a model, whose loading would have set it.
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
        """The local file of the LoRA, downloaded if need be.  Raises OSError or ValueError."""
        assert self.lora, "the base model has no LoRA"
        with dist.main_first():
            return lora_file(fetch_lora(self.lora), self.adapter)

    def model(self, dist: Distributed) -> Any:
        """The base model with the LoRA, if there is one, active.  Raises OSError or ValueError."""
        model = load_model(self.config, dist)
        self.policy(model, dist)
        return model

    def policy(self, model: Any, dist: Distributed) -> Policy | None:
        """The LoRA's policy on ``model``, active; None for the base model.

        Prints how it differs from those that training makes, and whether it names another base.
        Raises OSError or ValueError, naming the LoRA, if it cannot be had or does not fit.
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
            dist.print_once(f"{self.lora}: {note}")
        if difference := unusual_modules(model, lora.modules):
            dist.print_once(
                f"{self.lora}: on other layers than those that training adapts: {difference}"
            )
        return policy


def resolve_options(
    args: argparse.Namespace, script: Mapping[str, Any] | None = None
) -> EvalOptions:
    """Joins the parsed flags (settings by their dotted keys) with the checkpoint's run.

    ``script``: settings of the script's own, which go before the run's.  Raises ValueError, naming
    them, for settings that cannot be or have no such checkpoint.
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
    script, family, published = script or {}, {}, {}
    if _join(DEFAULTS, run, script, given)["pretrained.model"] == BUILT_IN_MODEL:
        family = BUILT_IN_SETTINGS
    elif "match_published" in given:
        published = {"pretrained.max_sequence_length": PUBLISHED_LENGTH}
    usual = _join(DEFAULTS, family, script, published)
    # Flags that only scripts which evaluate have.
    options, servers = (dict(getattr(args, flag, ())) for flag in ("option", "reward_servers"))
    settings = _join(DEFAULTS, family, run, script, published, given, options)
    validate_settings({key: settings[key] for key in DEFAULTS})
    lora = str(checkpoint or args.lora_hf_path or "")
    name += f"-{args.adapter}" if args.adapter != DEFAULT_ADAPTER else ""
    served = {
        name: addresses
        for name, addresses in ({**unflatten(run).get("reward_servers", {})} | servers).items()
        if addresses
    }
    if idle := sorted({key.split(".")[1] for key in options} & served.keys()):
        raise ValueError(
            f"--option {idle[0]}...: its options go to its server, {served[idle[0]][0]}; "
            f"--reward_servers {idle[0]}=local scores here"
        )
    config = unflatten(settings)
    return EvalOptions(config, run, checkpoint, lora, args.adapter, name, usual, served)


def _model_name(given: str) -> str:
    """A hub repository's or a path's: of a path more than its last part, which is often "lora"."""
    parts = Path(given).parts
    if os.path.exists(given):
        # As the user named it: links are not followed.
        parts = Path(os.path.abspath(given)).parts[1:]
        # Of a checkpoint in a run directory, that and the run.
        parts = parts[-3:] if parts[-2:-1] == ("checkpoints",) else parts[-4:]
    return "-".join(part for part in parts if part not in ("/", "checkpoints"))


def _join(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping of all; the later ones win."""
    return {key: value for layer in layers for key, value in layer.items()}
