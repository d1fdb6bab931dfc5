"""A whole run: its stages in order."""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from ml_collections import ConfigDict

from diffusion_nft.build import build_trainer
from diffusion_nft.distributed.preemption import Preempted, requested, stop_on_signals
from diffusion_nft.distributed.ranks import Distributed, LostContact, check_shared
from diffusion_nft.runs.checkpoint import Checkpoint
from diffusion_nft.runs.lock import only_writer
from diffusion_nft.runs.run_dir import check_run_dir
from diffusion_nft.runs.state import is_finished, newest_checkpoint, stage_number
from diffusion_nft.tracking.summary import images_file, result
from diffusion_nft.trainer import Trainer
from diffusion_nft.validation.inputs import build_named, load_checked_prompts, reward_weights
from diffusion_nft.validation.stages import Stage, stages_of


class StartError(Exception):
    """A run or one of its stages cannot start, for a reason that the user can fix."""


def run(config: ConfigDict, dist: Distributed) -> None:
    """Trains ``config`` to its end, continuing from its run directory.

    Each stage continues from the checkpoint that ends the previous one and loads the model again
    (in seconds), so that a run interrupted between stages ends with the same weights.  A finished
    run prints its result without loading a model.  Raises StartError, and as ``Trainer.run``.
    """
    dist.log(devices(dist))
    folder = Path(config.save_dir)
    with ExitStack() as held:
        with _start_errors():
            check_shared("save_dir", folder, dist)
            held.enter_context(only_writer("save_dir", folder, dist))
            check_run_dir(config)
            stages = stages_of(config)
            checkpoint = newest_checkpoint(config, dist)
            todo = _unfinished(stages, checkpoint, dist)
            if checkpoint is None:
                _check_ahead(todo, dist)
        if not todo:
            dist.print_once("\n".join(result(folder, stage.number) for stage in stages))
        for stage in todo:
            with _start_errors():
                if stage is not todo[0]:
                    checkpoint = newest_checkpoint(config, dist)
                trainer = build_trainer(config, dist, stage, checkpoint)
            checkpoint = None  # frees its tensors
            _train(trainer, dist, last=stage is todo[-1])
            # Frees the model before the next is loaded; a trainer's parts refer to each other.
            del trainer
            gc.collect()
            torch.cuda.empty_cache()


def devices(dist: Distributed) -> str:
    """The ranks' devices in one line, with a hint if a CUDA build of torch finds no GPU."""
    if dist.device.type == "cuda":
        return f"{dist.world_size} process(es), this one on {torch.cuda.get_device_name()}"
    build = f"torch {torch.__version__}"
    if torch.version.cuda:
        build += f", built for CUDA {torch.version.cuda}, finds no GPU that it can use"
    return f"{dist.world_size} process(es) on CPUs ({build})"


def _train(trainer: Trainer, dist: Distributed, *, last: bool) -> None:
    with stop_on_signals():
        trainer.run()
        # A request that came too late for this stage ends the run before the next.
        if not last and any(dist.gather_objects(requested())):
            raise Preempted
        if not last:
            trainer.monitor.stop_if_alarmed()


@contextmanager
def _start_errors() -> Iterator[None]:
    try:
        yield
    except LostContact:  # not an error of the user: the same command continues
        raise
    except (ValueError, OSError, ImportError) as error:
        raise StartError(f"{type(error).__name__}: {error}") from error


def _unfinished(
    stages: list[Stage], checkpoint: Checkpoint | None, dist: Distributed
) -> list[Stage]:
    """The stages with epochs to train, an evaluation to make, or images to draw."""

    def finished(stage: Stage) -> bool:
        images = Path(stage.config.save_dir, images_file(stage.number))
        # A stage's images can only be drawn while its own state is the newest.
        passed = checkpoint is not None and stage_number(checkpoint) > stage.number
        drawn = passed or not stage.config.log.num_images or images.exists()
        return all(dist.gather_objects(drawn and is_finished(stage, checkpoint)))

    return [stage for stage in stages if not finished(stage)]


def _check_ahead(stages: list[Stage], dist: Distributed) -> None:
    """Raises now what would stop a later one of ``stages``: missing or unfit prompts, and rewards
    whose package, weights or server are missing.
    """
    known: set[str] = set()
    for i, stage in enumerate(stages):
        names = set(reward_weights(stage.config)[1])
        if i > 0:
            load_checked_prompts(stage.config)
            # One at a time, so that each is freed before the next.
            for name in sorted(names - known):
                build_named(stage.config, [name], dist)
        known |= names
