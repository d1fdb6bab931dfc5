"""The loop: sample with the old policy, score, update, log, evaluate, save."""

import time
from pathlib import Path

import torch
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion_nft.advantages import group_advantages, optimality
from diffusion_nft.algorithms import build_algorithm
from diffusion_nft.checkpoint import (
    Checkpoint,
    Checkpointer,
    export_lora,
    load_checkpoint,
    resolve_checkpoint,
)
from diffusion_nft.data import epoch_prompts, load_prompts
from diffusion_nft.distributed import Distributed
from diffusion_nft.evaluate import Evaluation, evaluate, write_results
from diffusion_nft.metrics import Timer, make_metrics, write_environment
from diffusion_nft.models import build_model
from diffusion_nft.pictures import image_grid
from diffusion_nft.plan import describe
from diffusion_nft.policy import ADAPTERS, Policy
from diffusion_nft.precision import Precision
from diffusion_nft.report import compare_pictures, result_table
from diffusion_nft.rewards import check_prompts
from diffusion_nft.rewards.combine import RewardError, RewardSet
from diffusion_nft.rollout import Sampler, Samples, collect, summarise
from diffusion_nft.run_dir import check_run_dir, flatten, write_config
from diffusion_nft.update import Updater


class Trainer:
    """One run of a valid ``config``.  ``run()`` continues from wherever the run directory stands.

    Raises RunDirError if the run directory belongs to another configuration, and whatever a model
    or a reward that cannot be loaded raises, before any sampling.
    """

    def __init__(self, config: ConfigDict, dist: Distributed):
        self.config, self.dist = config, dist
        self.run_dir = Path(config.save_dir)
        check_run_dir(config)
        self.train_prompts = load_prompts(config.dataset, "train")
        self.test_prompts = load_prompts(config.dataset, "test")[: config.eval.num_prompts or None]
        for prompts in (self.train_prompts, self.test_prompts):
            check_prompts(config.reward_fn, [prompt.text for prompt in prompts])
        self.checkpointer = Checkpointer(self.run_dir, keep=config.checkpoint.keep)
        start = self._starting_point()
        self.rewards = RewardSet(config.reward_fn.to_dict(), dist.device)
        precision = Precision(config.mixed_precision, dist.device, allow_tf32=config.allow_tf32)
        self.model = build_model(
            config.pretrained.model_type,
            name=config.pretrained.model,
            revision=config.pretrained.revision,
            max_sequence_length=config.pretrained.max_sequence_length,
            resolution=config.resolution,
            dist=dist,
            precision=precision,
            **config.perf,
        )
        self.policy = Policy(
            self.model.transformer,
            targets=self.model.lora_targets,
            rank=config.train.lora_rank,
            alpha=config.train.lora_alpha,
            seed=config.seed,
            dtype=precision.trained_dtype,
        )
        self.updater = Updater(
            config,
            dist=dist,
            precision=precision,
            model=self.model,
            policy=self.policy,
            algorithm=build_algorithm(config),
        )
        self.timer = Timer(dist.device)
        self.epoch = 0
        self.evaluated = False  # this epoch
        self.trained = False  # by this process
        self.best_score: float | None = None
        if start is not None:
            self._restore(start)
        elif config.resume_from:
            self._start_from_run(Path(config.resume_from))
        elif config.train.lora_path:
            self.policy.load_lora(Path(config.train.lora_path))
        if dist.is_main:
            write_config(config)
            write_environment(self.run_dir)
        self.metrics = make_metrics(config, self.run_dir, dist.is_main)
        self.metrics.truncate(-1 if start is None else self.updater.step, self.epoch)

    def run(self) -> None:
        """Trains to ``num_epochs`` and says what it gained.

        A failing reward ends the run after its state is saved.
        """
        try:
            self._train()
        except RewardError:
            self.dist.say(f"a reward failed; the state of epoch {self.epoch} is being saved")
            self.save()
            self.metrics.close(failed=True)
            raise
        self._report()
        self.metrics.close()

    def _train(self) -> None:
        config = self.config
        if self.epoch < config.num_epochs:
            self.dist.say(describe(config, self.model, self.policy, self.dist))
        # At epoch 0, or where a failing reward left one out.
        best = self._evaluate_if_due()
        if best is not None and self.epoch:
            self.save(best=best)
        with tqdm(
            total=config.num_epochs,
            initial=self.epoch,
            desc="epochs",
            disable=not self.dist.is_main,
            dynamic_ncols=True,
        ) as progress:
            while self.epoch < config.num_epochs:
                values = self._run_epoch()
                self.metrics.log(values, step=self.updater.step, epoch=self.epoch)
                best = bool(self._evaluate_if_due())
                last = self.epoch == config.num_epochs
                if best or last or _due(self.epoch, config.save_freq):
                    self.save(best=best)
                progress.update()
                progress.set_postfix(reward=f"{values['reward/mean']:.3f}")

    def _run_epoch(self) -> dict[str, float]:
        config, started = self.config, time.perf_counter()
        samples = self._sample()
        size = config.sample.num_image_per_prompt
        advantages = group_advantages(
            samples.scores.total, size, global_std=config.sample.global_std
        )
        r = optimality(
            advantages, adv_clip_max=config.train.adv_clip_max, adv_mode=config.train.adv_mode
        )
        with self.timer.phase("train"):
            values = self.updater.train_epoch(samples, r, epoch=self.epoch)
        self.epoch += 1
        self.evaluated, self.trained = False, True
        if _due(self.epoch, config.log.image_freq):
            self._log_samples(samples)
        seconds = time.perf_counter() - started
        values |= summarise(samples, r, size) | self.timer.pop()
        values["time/epoch"] = seconds
        values["time/images_per_second"] = len(r) / seconds
        if self.dist.device.type == "cuda":
            values["time/peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        return values

    def _starting_point(self) -> Checkpoint | None:
        """The newest sound checkpoint of this run, the same one on every rank."""
        own = self.checkpointer.load_latest()
        found = self.dist.gather_objects(own and own.path.name)
        if len(set(found)) > 1:
            raise OSError(
                f"ranks see different checkpoints in {self.run_dir} ({found}): save_dir must lie "
                "on a file system that all nodes share"
            )
        return own

    def _start_from_run(self, path: Path) -> None:
        """The policies of another run; counters, optimizer and best score start anew."""
        tensors = load_checkpoint(resolve_checkpoint(path)).tensors
        for name in ADAPTERS:
            self.policy.load(name, tensors[name], others=False)

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors, state = checkpoint.tensors, checkpoint.state
        for name in ADAPTERS:
            self.policy.load(name, tensors[name], others=False)
        self.updater.load_state_dict(tensors["optimizer"], state["updater"])
        self.epoch, self.best_score = state["epoch"], state["best_score"]
        self.evaluated = state["evaluated"]
        now = flatten(self.config)
        if any(now.get(k) != v for k, v in state["config"].items() if k.startswith("eval.")):
            self.best_score = None  # other settings: the scores do not compare
        self.dist.say(f"continuing from {checkpoint.path} (epoch {self.epoch})")

    def _sample(self) -> Samples:
        config = self.config
        chosen = epoch_prompts(
            len(self.train_prompts), config.sample.num_groups, seed=config.seed, epoch=self.epoch
        )
        self.epoch_prompts = [self.train_prompts[i] for i in chosen]
        with self.timer.phase("sample"), self.policy.using("old"):
            return collect(
                self.model,
                self.epoch_prompts,
                self.rewards,
                config,
                epoch=self.epoch,
                dist=self.dist,
                num_pictures=config.log.num_images,
            )

    def _log_samples(self, samples: Samples) -> None:
        size = self.config.sample.num_image_per_prompt
        rows = samples.indices[: len(samples.pictures)]
        if rows and self.dist.is_main:
            grid = image_grid(
                samples.pictures,
                [self.epoch_prompts[i // size].text for i in rows],
                columns=4,
                scores=samples.scores.total[rows.start : rows.stop].tolist(),
            )
            self.metrics.log_images("train", grid, epoch=self.epoch)

    def evaluate(self, limit: int | None = None) -> Evaluation:
        """The first ``limit`` test lines under the evaluation settings, with the active policy."""
        config = self.config
        return evaluate(
            self.model,
            self.test_prompts[:limit],
            self.rewards,
            Sampler(config.eval.solver, config.eval.num_steps, config.eval.guidance_scale),
            seed=config.seed,
            batch_size=config.eval.batch_size,
            dist=self.dist,
            num_pictures=config.log.num_images,
        )

    def _evaluate_if_due(self) -> bool | None:
        """Evaluates the EMA weights where this epoch asks for it: True if they are the best so far,
        False if not, None if no evaluation is due."""
        config, epoch = self.config, self.epoch
        due = epoch == config.num_epochs or _due(epoch, config.eval_freq)
        if self.evaluated or not (due if epoch else config.eval.at_start):
            return None
        with self.timer.phase("eval"), self.policy.using("ema"):
            result = self.evaluate()
        values = result.metrics() | self.timer.pop()
        self.metrics.log(values, step=self.updater.step, epoch=self.epoch)
        if self.dist.is_main:
            folder = self.run_dir / "eval" / f"epoch-{self.epoch:06d}"
            write_results(result, folder, image_dir=None, settings={"epoch": self.epoch})
        score = values["eval/total"]
        self.dist.say(f"epoch {self.epoch}: eval/total {score:.4f}")
        best = self.best_score is None or score > self.best_score
        if best:
            self.best_score = score
        self.evaluated = True
        return best

    def save(self, *, best: bool = False) -> None:
        """Writes a checkpoint of everything that continuing needs, and the LoRA for users."""
        tensors, state = self.updater.state_dict()
        if self.dist.is_main:
            self.checkpointer.save(
                self.updater.step,
                tensors={name: self.policy.state(name) for name in ADAPTERS}
                | {"optimizer": tensors},
                state={
                    "epoch": self.epoch,
                    "best_score": self.best_score,
                    "evaluated": self.evaluated,
                    "updater": state,
                    "config": flatten(self.config),
                },
                write_extra=self._export,
                best=best,
            )
        self.dist.barrier()

    def _export(self, folder: Path) -> None:
        config = self.config
        export_lora(
            folder,
            self.policy.state("ema"),
            rank=config.train.lora_rank,
            alpha=config.train.lora_alpha,
            target_modules=list(self.model.lora_targets),
            base_model=config.pretrained.model,
        )

    def _report(self) -> None:
        """Says what the run gained, and draws the same test lines by the base and by the trained
        model.
        """
        path = self.run_dir / "before_after.png"
        count = self.config.log.num_images
        drawn = self.dist.gather_objects(path.exists())[0]
        if count and (self.trained or not drawn):
            with self.policy.using("reference"):
                before = self.evaluate(count)
            with self.policy.using("ema"):
                after = self.evaluate(count)
            if self.dist.is_main:
                compare_pictures(before, after).save(path)
        self.dist.say(result_table(self.run_dir))
        if path.exists():
            self.dist.say(f"before/after pictures: {path}")


def _due(epoch: int, every: int) -> bool:
    """True every ``every`` epochs; never if 0."""
    return every > 0 and epoch % every == 0
