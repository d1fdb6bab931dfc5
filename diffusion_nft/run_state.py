"""What continuing a run needs, on disk and back: the policies, the optimizer, the counters."""

from pathlib import Path

from ml_collections import ConfigDict

from diffusion_nft.checkpoint import (
    STATE,
    Checkpoint,
    Checkpointer,
    CheckpointError,
    load_checkpoint,
    read_json,
    resolve_checkpoint,
)
from diffusion_nft.distributed import Distributed
from diffusion_nft.lora import export_lora
from diffusion_nft.policy import ADAPTERS, Policy
from diffusion_nft.run_dir import flatten
from diffusion_nft.update import Updater

# What a LoRA's numbers mean depends on these.
SOURCE_KEYS = (
    "pretrained.model",
    "pretrained.revision",
    "pretrained.model_type",
    "train.lora_rank",
    "train.lora_alpha",
)


def newest_checkpoint(config: ConfigDict, dist: Distributed) -> Checkpoint | None:
    """The newest sound checkpoint of the run, the same one on every rank; None at a first start.

    Raises OSError if the ranks see different ones, or all are damaged.
    """
    own = Checkpointer(Path(config.save_dir)).load_latest()
    found = dist.gather_objects(own and own.path.name)
    if len(set(found)) > 1:
        raise OSError(
            f"ranks see different checkpoints in {config.save_dir} ({found}): save_dir must lie "
            "on a file system that all nodes share"
        )
    return own


def is_finished(config: ConfigDict) -> bool:
    """Whether the run in ``config.save_dir`` has made, and evaluated, its ``num_epochs``."""
    latest = Checkpointer(Path(config.save_dir)).latest()
    if latest is None:
        return False
    try:
        state = read_json(latest / STATE)
    except CheckpointError:  # damaged: an older one will be looked for
        return False
    return state["epoch"] >= config.num_epochs and state["evaluated"]


class RunState:
    """The run's counters beside ``policy`` and ``updater``, saved and restored together."""

    def __init__(self, config: ConfigDict, *, dist: Distributed, policy: Policy, updater: Updater):
        self.config, self.dist, self.policy, self.updater = config, dist, policy, updater
        self.checkpointer = Checkpointer(Path(config.save_dir), keep=config.checkpoint.keep)
        self.epoch = 0  # epochs made
        self.evaluated = False  # this epoch
        self.best_score: float | None = None  # of eval/total

    def start(self, checkpoint: Checkpoint | None) -> None:
        """Begins where ``checkpoint`` stands, or, without one, as the configuration asks."""
        if checkpoint is not None:
            self._restore(checkpoint)
        elif self.config.resume_from:
            source = load_checkpoint(resolve_checkpoint(Path(self.config.resume_from)))
            self._check_source(source)
            self._load_policies(source)
        elif self.config.train.lora_path:
            self.policy.load_lora(Path(self.config.train.lora_path))

    def _check_source(self, source: Checkpoint) -> None:
        """ValueError if the policies of ``source`` mean something else in this configuration."""
        ours, theirs = flatten(self.config), source.state["config"]
        wrong = [
            f"{key} = {ours[key]!r}, there {theirs.get(key)!r}"
            for key in SOURCE_KEYS
            if ours[key] != theirs.get(key)
        ]
        if wrong:
            raise ValueError(
                f"resume_from = {self.config.resume_from!r}: the policies of {source.path} do not "
                f"fit this run: {'; '.join(wrong)}"
            )

    def _load_policies(self, checkpoint: Checkpoint) -> None:
        for name in ADAPTERS:
            self.policy.load(name, checkpoint.tensors[name], others=False)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self._load_policies(checkpoint)
        self.updater.load_state_dict(checkpoint.tensors["optimizer"], state["updater"])
        self.epoch, self.evaluated = state["epoch"], state["evaluated"]
        now = flatten(self.config)
        # Under other evaluation settings the scores do not compare.
        settings = [key for key in state["config"] if key.startswith("eval.")]
        settings.remove("eval.batch_size")
        same = all(now.get(key) == state["config"][key] for key in settings)
        self.best_score = state["best_score"] if same else None
        self.dist.say(f"continuing from {checkpoint.path} (epoch {self.epoch})")

    def save(self, *, best: bool = False) -> None:
        """Writes a checkpoint of everything, and the LoRA for users; waits for all ranks."""
        tensors, updater = self.updater.state_dict()
        if self.dist.is_main:
            self.checkpointer.save(
                self.updater.step,
                tensors={name: self.policy.state(name) for name in ADAPTERS}
                | {"optimizer": tensors},
                state={
                    "epoch": self.epoch,
                    "best_score": self.best_score,
                    "evaluated": self.evaluated,
                    "updater": updater,
                    "config": flatten(self.config),
                },
                write_extra=self._export,
                best=best,
            )
        self.dist.barrier()

    def _export(self, folder: Path) -> None:
        export_lora(
            folder,
            self.policy.state("ema"),
            rank=self.policy.rank,
            alpha=self.policy.alpha,
            target_modules=self.policy.targets,
            base_model=self.config.pretrained.model,
        )
