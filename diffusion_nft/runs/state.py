"""Saving and restoring the state of a run: policies, optimizer and counters."""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from ml_collections import ConfigDict
from torch import Tensor

from diffusion_nft.data.prompts import PromptHashes, changed_prompts
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models.hub import base_note
from diffusion_nft.models.lora import Lora, export_lora, load_lora, lora_modules
from diffusion_nft.policy import ADAPTERS
from diffusion_nft.runs.checkpoint import (
    Checkpoint,
    Checkpointer,
    CheckpointError,
    load_checkpoint,
    resolve_checkpoint,
)
from diffusion_nft.update import Learner
from diffusion_nft.validation.flat import flatten, with_defaults
from diffusion_nft.validation.stages import Stage

# Keys that must agree for a LoRA's weights to mean the same.
SOURCE_KEYS = (
    "pretrained.model",
    "pretrained.revision",
    "train.lora_rank",
    "train.lora_alpha",
    "train.lora_targets",
)


def newest_checkpoint(config: ConfigDict, dist: Distributed) -> Checkpoint | None:
    """The newest intact checkpoint of the run, the same one on every rank; None at a first start.

    Raises OSError if the ranks see different ones, or all are damaged.
    """
    own = Checkpointer(Path(config.save_dir)).load_latest()
    found = dist.gather_objects(own and own.path.name)
    if len(set(found)) > 1:
        raise OSError(
            f"ranks see different checkpoints in {config.save_dir} ({found}): save_dir must be on "
            "a file system that all nodes share"
        )
    return own


def stage_number(checkpoint: Checkpoint) -> int:
    """The stage of ``checkpoint``, from 1; 0 in a run without stages."""
    return checkpoint.state.get("stage", 0)


def is_finished(stage: Stage, checkpoint: Checkpoint | None) -> bool:
    """True if at ``checkpoint`` all epochs of ``stage`` are trained and evaluated."""
    if checkpoint is None:
        return False
    state = checkpoint.state
    done = state["epoch"] >= stage.config.num_epochs and state["evaluated"]
    return stage_number(checkpoint) > stage.number or done


def starting_modules(config: ConfigDict, checkpoint: Checkpoint | None) -> list[str]:
    """The modules with LoRA that the run continues from (``checkpoint``) or starts from; none for
    the base model.

    Raises ValueError or OSError if ``resume_from`` or ``train.lora_path`` cannot be used, as far as
    that is known without the model.
    """
    if checkpoint is None and config.resume_from:
        checkpoint = _source(config)
    if checkpoint is not None:
        return lora_modules(checkpoint.tensors["current"])
    return _lora(config).modules if config.train.lora_path else []


def _lora(config: ConfigDict) -> Lora:
    """The LoRA of ``train.lora_path``; ValueError if it is missing or of another rank."""
    path, rank = config.train.lora_path, config.train.lora_rank
    lora = load_lora(Path(path))
    if lora.rank != rank:
        raise ValueError(
            f"train.lora_rank = {rank}: the LoRA of train.lora_path = {path!r} has rank "
            f"{lora.rank}; use --config.train.lora_rank={lora.rank}"
        )
    return lora


def _source(config: ConfigDict) -> Checkpoint:
    """The checkpoint of ``resume_from``; ValueError if ``SOURCE_KEYS`` differ."""
    source = load_checkpoint(resolve_checkpoint(Path(config.resume_from)))
    ours, theirs = flatten(config), with_defaults(source.state["config"])
    wrong = [
        f"{key} = {ours[key]!r}, there {theirs[key]!r}"
        for key in SOURCE_KEYS
        if ours[key] != theirs[key]
    ]
    if wrong:
        raise ValueError(
            f"resume_from = {config.resume_from!r}: the policies of {source.path} do not "
            f"fit this run: {'; '.join(wrong)}"
        )
    return source


class KeepsBaselines(Protocol):
    """The part of ``Monitor`` that is saved with the run."""

    state: dict[str, Any]

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def forget(self, baseline: str) -> None: ...


class TrainingState:
    """``learner``, its policy and the run's counters, saved and restored together."""

    def __init__(
        self,
        stage: Stage,
        *,
        dist: Distributed,
        learner: Learner,
        monitor: KeepsBaselines,
        prompts: PromptHashes,
    ):
        self.prompts = prompts  # of this and later stages
        self.stage, self.config = stage, stage.config
        self.dist, self.monitor = dist, monitor
        self.learner, self.policy = learner, learner.policy
        self.checkpointer = Checkpointer(
            Path(self.config.save_dir), keep=self.config.checkpoint.keep
        )
        self.epoch = 0  # number of epochs trained
        self.evaluated = False  # at this epoch, in this stage
        self.best_score: float | None = None  # highest eval/total of this stage
        self.test_set = 0  # number of changes of the test prompts

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Restores ``checkpoint``, or without one starts as the configuration asks."""
        assert checkpoint is not None or not self.stage.first_epoch
        if checkpoint is not None:
            self._restore(checkpoint)
        elif self.config.resume_from:
            self._load_policies(_source(self.config))
        elif self.config.train.lora_path:
            lora = _lora(self.config)
            if note := base_note(lora, self.config.pretrained.model):
                self.dist.log(f"train.lora_path: {note}")
            self.policy.load_lora(lora)

    def _load_policies(self, checkpoint: Checkpoint) -> None:
        for name in ADAPTERS:
            self.policy.load(name, checkpoint.tensors[name], others=False)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if state["epoch"] < self.stage.first_epoch:
            raise CheckpointError(
                f"the newest intact checkpoint, {checkpoint.path}, is of epoch {state['epoch']}; "
                f"{self.stage.title} begins after epoch {self.stage.first_epoch}: rerun the same "
                "command to continue from that checkpoint"
            )
        self._on_main(partial(self.checkpointer.restore_best, checkpoint))
        self._load_policies(checkpoint)
        optimizer = unflatten_optimizer(
            checkpoint.tensors["optimizer"], state["updater"]["optimizer"]
        )
        self.learner.load_state_dict(state["updater"] | {"optimizer": optimizer})
        self.epoch = state["epoch"]
        self.dist.log(f"continuing from {checkpoint.path} (epoch {self.epoch})")
        changed = changed_prompts(state.get("prompts", {}), self.prompts)
        for dataset, split in changed:
            self.dist.log(f"dataset {dataset}: continuing with changed {split} prompts")
        dataset = self.config.dataset
        new_test_set = (dataset, "test") in changed
        self.test_set = state.get("test_set", 0) + new_test_set
        if stage_number(checkpoint) < self.stage.number:
            return  # scores of different stages are not comparable
        self.evaluated = state["evaluated"] and not new_test_set
        self.monitor.load_state_dict(state["monitor"])
        if (dataset, "train") in changed:
            self.monitor.forget("x0_rms")
        now, former = flatten(self.config), with_defaults(state["config"])
        # Scores under other evaluation settings or on other test prompts are not comparable.
        settings = [key for key in former if key.startswith("eval.") and key != "eval.batch_size"]
        same = not new_test_set and all(now.get(key) == former[key] for key in settings)
        self.best_score = state["best_score"] if same else None
        if not same:
            self.monitor.forget("evaluation")

    def save(self, *, best: bool = False) -> None:
        """Writes a checkpoint with the LoRA for users; waits for all ranks.

        Raises CheckpointError on every rank if the disk fails, or if ranks hold different weights.
        """
        self._check_ranks_agree()
        self._on_main(partial(self._write, best))

    def _check_ranks_agree(self) -> None:
        digest = hashlib.sha256()
        for name in ADAPTERS:
            weights = self.policy.state(name).values()
            digest.update(torch.cat([w.flatten() for w in weights]).cpu().numpy().tobytes())
        first, *others = self.dist.gather_objects(digest.hexdigest())
        if wrong := [str(rank) for rank, own in enumerate(others, start=1) if own != first]:
            raise CheckpointError(
                f"the trained weights of rank {', '.join(wrong)} differ from those of rank 0: "
                "nothing is saved; look for faulty hardware, and continue from the last checkpoint"
            )

    def _on_main(self, write: Callable[[], None]) -> None:
        """Calls ``write`` on the main rank; raises its CheckpointError on every rank."""
        failure = ""
        if self.dist.is_main:
            try:
                write()
            except CheckpointError as error:
                failure = str(error)
        if failure := self.dist.broadcast_object(failure):
            raise CheckpointError(failure)

    def _write(self, best: bool) -> None:
        learner = self.learner.state_dict()
        tensors, optimizer = flatten_optimizer(learner["optimizer"])
        self.checkpointer.save(
            self.learner.step,
            tensors={name: self.policy.state(name) for name in ADAPTERS} | {"optimizer": tensors},
            state={
                "epoch": self.epoch,
                "stage": self.stage.number,
                "best_score": self.best_score,
                "evaluated": self.evaluated,
                "updater": learner | {"optimizer": optimizer},
                "monitor": self.monitor.state,
                "config": flatten(self.config),
                "prompts": self.prompts,
                "test_set": self.test_set,
            },
            write_extra=self._export,
            best=best,
        )

    def _export(self, folder: Path) -> None:
        export_lora(folder, self.policy.lora("ema", self.config.pretrained.model))


def flatten_optimizer(state_dict: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``state_dict()`` of an Adam as tensors ``"<index>.<name>"`` and the rest for JSON."""
    entries = [(i, k, v) for i, entry in state_dict["state"].items() for k, v in entry.items()]
    tensors = {f"{i}.{k}": v for i, k, v in entries if isinstance(v, Tensor)}
    values: dict[str, dict[str, Any]] = {str(i): {} for i in state_dict["state"]}
    for i, k, v in entries:
        if not isinstance(v, Tensor):
            values[str(i)][k] = v
    return tensors, {"param_groups": state_dict["param_groups"], "state": values}


def unflatten_optimizer(tensors: dict[str, Tensor], state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten_optimizer``, also after safetensors and JSON."""
    entries = {int(index): dict(values) for index, values in state["state"].items()}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        entries[int(index)][name] = value
    # Adam's betas are a tuple, which JSON turns into a list.
    groups = [group | {"betas": tuple(group["betas"])} for group in state["param_groups"]]
    return {"state": entries, "param_groups": groups}
