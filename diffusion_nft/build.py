"""Builds the trainer of a stage from its configuration."""

from pathlib import Path

from ml_collections import ConfigDict

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models.loading import check_distilled, load_model
from diffusion_nft.policy import unusual_modules
from diffusion_nft.rewards.combine import RewardSet
from diffusion_nft.runs.checkpoint import Checkpoint
from diffusion_nft.runs.environment import write_environment
from diffusion_nft.runs.run_dir import check_prompts_kept, write_config
from diffusion_nft.runs.state import TrainingState, stage_number, starting_modules
from diffusion_nft.tracking.evaluator import Evaluator
from diffusion_nft.tracking.metrics import Metrics, Timer
from diffusion_nft.tracking.monitor import Monitor
from diffusion_nft.trainer import Trainer
from diffusion_nft.update import build_learner
from diffusion_nft.validation.inputs import (
    build_named,
    hash_prompts,
    load_checked_prompts,
    reward_weights,
)
from diffusion_nft.validation.stages import Stage, stages_of


def build_trainer(
    config: ConfigDict, dist: Distributed, stage: Stage, checkpoint: Checkpoint | None
) -> Trainer:
    """The trainer of ``stage`` of a valid ``config``, which continues from ``checkpoint``, the
    newest one, if any.

    Raises RunDirError if prompts have changed since, and errors of loading models and rewards.
    """
    own = stage.config
    train_prompts, test_prompts, test_lines = load_checked_prompts(own)
    ahead = [s.config.dataset for s in stages_of(config) if s.number >= stage.number]
    hashes = hash_prompts(ahead, dist)
    if checkpoint is not None:
        check_prompts_kept(own, checkpoint.state.get("prompts", {}), hashes)
    modules = starting_modules(own, checkpoint)
    trained, evaluated = reward_weights(own)
    dist.log(f"loading {', '.join(evaluated)} (rewards) and {own.pretrained.model}")
    built = build_named(own, evaluated, dist)
    rewards, eval_rewards = (
        RewardSet(weights, built, max_unscored=own.max_unscored) for weights in (trained, evaluated)
    )
    model = load_model(own, dist)
    check_distilled(model, own, dist)
    learner = build_learner(own, dist, model, modules)
    if modules and (difference := unusual_modules(model, modules, own.train.lora_targets)):
        dist.log(f"the LoRA that the run starts from is on other layers than usual: {difference}")
    monitor = Monitor(own, learner.algorithm, dist.log)
    state = TrainingState(stage, dist=dist, learner=learner, monitor=monitor, prompts=hashes)
    state.start(checkpoint)
    if dist.is_main:
        write_config(config)
        write_environment(Path(own.save_dir))
    metrics = Metrics(config, Path(own.save_dir), enabled=dist.is_main)
    if checkpoint is None:
        metrics.truncate(-1)
    else:
        metrics.truncate(learner.step, state.epoch, stage_number(checkpoint))
    timer = Timer(dist.device)
    evaluator = Evaluator(
        state,
        eval_rewards,
        test_prompts,
        test_lines,
        metrics=metrics,
        monitor=monitor,
        timer=timer,
    )
    return Trainer(
        stage,
        dist=dist,
        prompts=train_prompts,
        rewards=rewards,
        learner=learner,
        evaluator=evaluator,
        monitor=monitor,
        state=state,
        metrics=metrics,
        timer=timer,
    )
