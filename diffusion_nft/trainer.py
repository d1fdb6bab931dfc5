"""The loop: sample with the old policy, score, update, log, evaluate, save."""

import time
from pathlib import Path

import torch
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion_nft.advantages import group_advantages, optimality, standardized_total
from diffusion_nft.algorithms import build_algorithm
from diffusion_nft.data.prompts import Prompt, draw_lines, epoch_prompts
from diffusion_nft.distributed.preemption import REASON, Preempted
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.evaluation.evaluate import evaluate
from diffusion_nft.evaluation.results import Evaluation, write_results
from diffusion_nft.images import Images
from diffusion_nft.models import load_model
from diffusion_nft.policy import Policy, unusual_modules
from diffusion_nft.rewards.combine import RewardError, RewardSet
from diffusion_nft.rollout import GRID_COLUMNS, Rollout, generate_rollouts, rollout_metrics
from diffusion_nft.runs.environment import write_environment
from diffusion_nft.runs.run_dir import check_prompts_kept, check_run_dir, write_config
from diffusion_nft.runs.state import (
    TrainingState,
    newest_checkpoint,
    stage_number,
    starting_modules,
)
from diffusion_nft.tracking.grids import image_grid, save_grid
from diffusion_nft.tracking.metrics import Timer, make_metrics
from diffusion_nft.tracking.monitor import Alarm, Monitor
from diffusion_nft.tracking.plan import describe
from diffusion_nft.tracking.summary import TEST_SET, compare_pictures, pictures_file, result
from diffusion_nft.update import Learner
from diffusion_nft.validation.flat import flatten
from diffusion_nft.validation.inputs import (
    build_named,
    hash_prompts,
    load_checked_prompts,
    reward_weights,
)
from diffusion_nft.validation.stages import Stage, stages_of


class Trainer:
    """One ``stage`` of the run of a valid ``config``; by default its first, which is all of a run
    without stages.  ``run()`` continues from wherever the run directory stands.

    Raises RunDirError if the run directory belongs to another configuration or to prompts that have
    changed since, and whatever a model or a reward that cannot be loaded raises, before any
    sampling.
    """

    def __init__(self, config: ConfigDict, dist: Distributed, stage: Stage | None = None):
        check_run_dir(config)
        whole, self.dist = config, dist
        self.stage = stage = stage or stages_of(config)[0]
        self.config = config = stage.config
        self.run_dir = Path(config.save_dir)
        self.train_prompts, self.test_prompts, self.test_lines = load_checked_prompts(config)
        trained, evaluated = reward_weights(config)
        ahead = [s.config.dataset for s in stages_of(whole) if s.number >= stage.number]
        prompts = hash_prompts(ahead, dist)
        start = newest_checkpoint(config, dist)
        if start is not None:
            check_prompts_kept(config, start.state.get("prompts", {}), prompts)
        modules = starting_modules(config, start)
        built = build_named(config, evaluated, dist)
        self.rewards, self.eval_rewards = (
            RewardSet(weights, built, max_unscored=config.max_unscored)
            for weights in (trained, evaluated)
        )
        self.model = load_model(flatten(config), dist)
        precision = self.model.precision
        self.policy = Policy(
            self.model.transformer,
            targets=modules or self.model.lora_targets,
            rank=config.train.lora_rank,
            alpha=config.train.lora_alpha,
            seed=config.seed,
            dtype=precision.trained_dtype,
        )
        if modules and (difference := unusual_modules(self.model, modules)):
            dist.print_once(
                f"the LoRA that the run starts from is on other layers than usual: {difference}"
            )
        self.algorithm = build_algorithm(config)
        self.learner = Learner(
            config,
            dist=dist,
            precision=precision,
            model=self.model,
            policy=self.policy,
            algorithm=self.algorithm,
        )
        self.monitor = Monitor(config, self.algorithm, dist.print_once)
        self.state = TrainingState(
            stage,
            dist=dist,
            policy=self.policy,
            learner=self.learner,
            monitor=self.monitor,
            prompts=prompts,
        )
        self.state.start(start)
        self.timer = Timer(dist.device)
        self.trained = False  # by this process
        if dist.is_main:
            write_config(whole)
            write_environment(self.run_dir)
        self.metrics = make_metrics(whole, self.run_dir, dist.is_main)
        if start is None:
            self.metrics.truncate(-1)
        else:
            self.metrics.truncate(self.learner.step, self.state.epoch, stage_number(start))

    def run(self) -> None:
        """Trains to the stage's ``num_epochs`` and says what it gained.

        A failing reward ends the run after its state is saved, and so does a request to stop, and
        an alarm where ``monitor.action`` says so.
        """
        try:
            self._train()
        except (RewardError, Preempted, Alarm) as error:
            why = {Preempted: REASON, Alarm: "an alarm"}.get(type(error), "a reward failed")
            self.dist.print_once(f"{why}; the state of epoch {self.state.epoch} is being saved")
            self.state.save()
            self.metrics.close(failed=not isinstance(error, Preempted))
            raise
        try:
            self._report()
        finally:
            self.metrics.close()

    def _train(self) -> None:
        config = self.config
        if self.state.epoch < config.num_epochs:
            if self.dist.is_main:  # those of a former end, before num_epochs was raised
                (self.run_dir / pictures_file(self.stage.number)).unlink(missing_ok=True)
            self.dist.print_once(describe(self.stage, self.model, self.policy, self.dist))
        # At the stage's start, or where a failing reward or a stop left one out.
        best = self._evaluate_if_due()
        if best is not None and self.state.epoch > self.stage.first_epoch:
            self.state.save(best=best)
        with tqdm(
            total=config.num_epochs,
            initial=self.state.epoch,
            desc=f"{self.stage.title} epochs".lstrip(),
            disable=not self.dist.is_main,
            dynamic_ncols=True,
        ) as progress:
            while self.state.epoch < config.num_epochs:
                self.monitor.stop_if_alarmed()
                values = self._run_epoch()
                values |= self.monitor.epoch(values)
                self._log(values)
                best = bool(self._evaluate_if_due())
                last = self.state.epoch == config.num_epochs
                if best or last or _due(self.state.epoch, config.save_freq):
                    self.state.save(best=best)
                progress.update()
                reward = {"reward": f"{values['reward/mean']:.3f}"}
                progress.set_postfix(reward | self.monitor.progress())

    def _log(self, values: dict[str, float]) -> None:
        values = self.stage.column | values
        self.metrics.log(values, step=self.learner.step, epoch=self.state.epoch)

    def _run_epoch(self) -> dict[str, float]:
        config, started = self.config, time.perf_counter()
        self.model.pop_forward_counts()
        rollout = self._sample()
        size = config.sample.num_image_per_prompt
        total = rollout.scores.total
        if config.sample.standardize_rewards:
            total = standardized_total(rollout.scores.parts, self.rewards.weights, size)
        advantages = group_advantages(total, size, global_std=config.sample.global_std)
        weights = self.algorithm.sample_weights(advantages, size)
        with self.timer.phase("train"):
            values = self.learner.train_epoch(rollout, weights, epoch=self.state.epoch)
        self.state.epoch += 1
        self.state.evaluated, self.trained = False, True
        if _due(self.state.epoch, config.log.image_freq):
            self._log_rollout(rollout)
        seconds = time.perf_counter() - started
        r = optimality(
            advantages, adv_clip_max=config.train.adv_clip_max, adv_mode=config.train.adv_mode
        )
        values |= rollout_metrics(rollout, r, size) | self.timer.pop()
        if config.max_unscored:
            values["reward/unscored"] = int(total.isnan().sum())
        forward_counts = self.dist.gather_objects(self.model.pop_forward_counts())
        values |= {key: sum(rank[key] for rank in forward_counts) for key in forward_counts[0]}
        values["time/epoch"] = seconds
        values["time/images_per_second"] = len(weights) / seconds
        if self.dist.device.type == "cuda":
            values["time/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        return values

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
                num_pictures=config.log.num_images,
                trajectories=self.algorithm.on_trajectories,
                ahead=self._prompts(epoch + 1) if epoch + 1 < config.num_epochs else (),
            )

    def _prompts(self, epoch: int) -> list[Prompt]:
        groups, seed = self.config.sample.num_groups, self.config.seed
        return epoch_prompts(self.train_prompts, groups, seed=seed, epoch=epoch)

    def _log_rollout(self, rollout: Rollout) -> None:
        size = self.config.sample.num_image_per_prompt
        prompts = [self.epoch_prompts[i // size] for i in rollout.shown]
        scores = rollout.scores.total[rollout.shown].tolist()
        self._log_pictures("train", rollout.pictures, prompts, scores)

    def _log_pictures(
        self, name: str, pictures: Images, prompts: list[Prompt], scores: list[float]
    ) -> None:
        if prompts and self.dist.is_main:
            texts = [prompt.text for prompt in prompts]
            grid = image_grid(pictures, texts, columns=GRID_COLUMNS, scores=scores)
            self.metrics.log_images(name, grid, epoch=self.state.epoch)

    def evaluate(self, number: int | None = None) -> Evaluation:
        """``number`` test lines, or all, under the evaluation settings, with the active policy."""
        count = len(self.test_prompts)
        chosen = draw_lines(self.test_prompts, count if number is None else number)
        return evaluate(
            self.model,
            [self.test_prompts[i] for i in chosen],
            self.eval_rewards,
            flatten(self.config),
            dist=self.dist,
            lines=[self.test_lines[i] for i in chosen],
            num_pictures=self.config.log.num_images,
        )

    def _evaluate_if_due(self) -> bool | None:
        """Evaluates the EMA weights where this epoch asks for it: True if they are the best so far,
        False if not, None if no evaluation is due."""
        config, epoch = self.config, self.state.epoch
        at_start = epoch == self.stage.first_epoch
        due = epoch >= config.num_epochs or _due(epoch, config.eval_freq)
        if self.state.evaluated or not (config.eval.at_start if at_start else due):
            return None
        with self.timer.phase("eval"), self.policy.use_adapter("ema"):
            evaluation = self.evaluate()
        values = evaluation.metrics() | self.timer.pop() | self.monitor.evaluation(evaluation)
        if config.max_unscored:
            values["eval/unscored"] = evaluation.num_unscored
        if self.state.test_set:
            values[TEST_SET] = self.state.test_set
        self._log(values)
        if self.dist.is_main:
            folder = self.run_dir / "eval" / self.stage.folder / f"epoch-{epoch:06d}"
            write_results(evaluation, folder, settings={"epoch": epoch} | self.stage.column)
        lines, totals = evaluation.picture_lines, evaluation.scores["total"]
        prompts = [evaluation.prompts[line] for line in lines]
        name = "/".join(filter(None, ("eval", self.stage.folder)))
        self._log_pictures(name, evaluation.pictures, prompts, [totals[line] for line in lines])
        score = values["eval/total"]
        self.dist.print_once(f"epoch {epoch}: eval/total {score:.4f}")
        best = self.state.best_score is None or score > self.state.best_score
        # The checkpoint at which a later stage starts is the former one's: none of its own.
        if best and not (at_start and epoch):
            self.state.best_score = score
        self.state.evaluated = True
        return best

    def _report(self) -> None:
        """Says what the run gained, and draws the same test lines by the base and by the trained
        model.
        """
        path = self.run_dir / pictures_file(self.stage.number)
        count = self.config.log.num_images
        drawn = self.dist.gather_objects(path.exists())[0]
        if count and (self.trained or not drawn):
            with self.policy.use_adapter("reference"):
                before = self.evaluate(count)
            with self.policy.use_adapter("ema"):
                after = self.evaluate(count)
            if self.dist.is_main:
                save_grid(compare_pictures(before, after), path)
        self.dist.print_once(result(self.run_dir, self.stage.number))


def _due(epoch: int, every: int) -> bool:
    """True every ``every`` epochs; never if 0."""
    return every > 0 and epoch % every == 0
