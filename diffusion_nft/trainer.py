"""The training loop (Algorithm 1 of the paper): sample with the old policy, score, update."""

import time
from typing import Any

import torch
from torch import Tensor

from diffusion_nft.advantages import group_advantages, optimality, standardized_total
from diffusion_nft.data.prompts import Prompt, epoch_prompts
from diffusion_nft.distributed.preemption import REASON, Preempted
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.rewards.combine import RewardError, RewardSet, Scores
from diffusion_nft.rollout import Rollout, generate_rollouts, rollout_metrics
from diffusion_nft.runs.state import TrainingState
from diffusion_nft.tracking.evaluator import Evaluator, is_due
from diffusion_nft.tracking.metrics import Metrics, Timer
from diffusion_nft.tracking.monitor import Alarm, Monitor
from diffusion_nft.tracking.plan import describe
from diffusion_nft.update import Learner
from diffusion_nft.validation.stages import Stage


class Trainer:
    """Trains one stage of a run, from epoch ``state.epoch`` to ``num_epochs``."""

    def __init__(
        self,
        stage: Stage,
        *,
        dist: Distributed,
        prompts: list[Prompt],
        rewards: RewardSet,
        learner: Learner,
        evaluator: Evaluator,
        monitor: Monitor,
        state: TrainingState,
        metrics: Metrics,
        timer: Timer,
    ):
        self.stage, self.config, self.dist = stage, stage.config, dist
        self.train_prompts, self.rewards, self.learner = prompts, rewards, learner
        self.model, self.policy, self.algorithm = learner.model, learner.policy, learner.algorithm
        self.evaluator, self.monitor, self.state = evaluator, monitor, state
        self.metrics, self.timer = metrics, timer
        self.epoch_prompts: list[Prompt] = []

    def run(self) -> None:
        """Trains, then prints the result and saves sample images from before and after training.

        The state is saved before RewardError (a reward failed), Preempted (a stop was requested) or
        Alarm (``monitor.action = "stop"``) is raised.
        """
        before = self.state.epoch
        try:
            self._train()
        except (RewardError, Preempted, Alarm) as error:
            why = {Preempted: REASON, Alarm: "an alarm"}.get(type(error), "a reward failed")
            self.dist.log(f"{why}; the state of epoch {self.state.epoch} is being saved")
            self.state.save()
            self.metrics.close(failed=not isinstance(error, Preempted))
            raise
        try:
            self.evaluator.finish(trained=self.state.epoch > before)
        finally:
            self.metrics.close()

    def _train(self) -> None:
        config, state = self.config, self.state
        if state.epoch < config.num_epochs:
            # Left by an earlier end of this run if num_epochs was raised since.
            self.evaluator.discard_result()
            self.dist.log(describe(self.stage, self.model, self.policy, self.dist))
        # Of the stage's start, or one missed because of a failed reward or a stop.
        best = self.evaluator.evaluate_if_due()
        if best is not None and state.epoch > self.stage.first_epoch:
            state.save(best=best)
        with self.dist.progress(
            f"{self.stage.title} epochs".lstrip(), config.num_epochs, done=state.epoch, outer=True
        ) as progress:
            while state.epoch < config.num_epochs:
                self.monitor.stop_if_alarmed()
                values = self._run_epoch()
                values |= self.monitor.epoch(values)
                values = self.stage.column | values
                self.metrics.log(values, step=self.learner.step, epoch=state.epoch)
                best = bool(self.evaluator.evaluate_if_due())
                last = state.epoch == config.num_epochs
                # An early checkpoint: a run killed before its first one would start over.
                first = state.epoch == 1 and config.save_freq > 0
                if best or last or first or is_due(state.epoch, config.save_freq):
                    state.save(best=best)
                reward = f"{values['reward/mean']:.3f}"
                progress.update(1, reward=reward, **self.monitor.progress())

    def _run_epoch(self) -> dict[str, Any]:
        started = time.perf_counter()
        self.model.pop_forward_counts()
        # Sample images of each prompt with the old policy, and score them.
        rollout = self._sample()
        # Normalise rewards per group; convert to optimality probabilities (or other weights).
        size = self.config.sample.num_image_per_prompt
        advantages = self._advantages(rollout.scores)
        weights = self.algorithm.sample_weights(advantages, size)
        # Gradient steps on the forward process, then the update of the old policy.
        with self.timer.phase("train"):
            values = self.learner.train_epoch(rollout, weights, epoch=self.state.epoch)
        self.state.epoch += 1
        self.state.evaluated = False
        self._log_images(rollout)
        seconds = time.perf_counter() - started
        return values | self._epoch_metrics(rollout, advantages, seconds)

    def _sample(self) -> Rollout:
        config, epoch = self.config, self.state.epoch
        self.epoch_prompts = self._prompts(epoch)
        with self.timer.phase("sample"), self.policy.use_adapter("old"):
            return generate_rollouts(
                self.model,
                self.epoch_prompts,
                self.rewards,
                config,
                epoch=epoch,
                dist=self.dist,
                num_images=config.log.num_images,
                trajectories=self.algorithm.on_trajectories,
                ahead=self._prompts(epoch + 1) if epoch + 1 < config.num_epochs else (),
            )

    def _prompts(self, epoch: int) -> list[Prompt]:
        groups, seed = self.config.sample.num_groups, self.config.seed
        return epoch_prompts(self.train_prompts, groups, seed=seed, epoch=epoch)

    def _advantages(self, scores: Scores) -> Tensor:
        config = self.config.sample
        size, total = config.num_image_per_prompt, scores.total
        if config.standardize_rewards:
            total = standardized_total(scores.parts, self.rewards.weights, size)
        return group_advantages(total, size, global_std=config.global_std)

    def _log_images(self, rollout: Rollout) -> None:
        if is_due(self.state.epoch, self.config.log.image_freq):
            size = self.config.sample.num_image_per_prompt
            captions = [self.epoch_prompts[i // size].text for i in rollout.shown]
            scores = rollout.scores.total[rollout.shown].tolist()
            self.metrics.log_images(
                "train", rollout.images, captions, scores, epoch=self.state.epoch
            )

    def _epoch_metrics(
        self, rollout: Rollout, advantages: Tensor, seconds: float
    ) -> dict[str, Any]:
        train = self.config.train
        r = optimality(advantages, adv_clip_max=train.adv_clip_max, adv_mode=train.adv_mode)
        values: dict[str, Any] = {}
        values |= rollout_metrics(rollout, r, self.config.sample.num_image_per_prompt)
        values |= self.timer.pop()
        if self.config.max_unscored:
            values["reward/unscored"] = int(rollout.scores.total.isnan().sum())
        counts = self.dist.sum_numbers(self.model.pop_forward_counts())
        values |= {key: int(count) for key, count in counts.items()}
        values["time/epoch"] = seconds
        values["time/images_per_second"] = len(advantages) / seconds
        if self.dist.device.type == "cuda":
            values["time/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        return values
