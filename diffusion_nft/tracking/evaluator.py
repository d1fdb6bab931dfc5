"""Evaluations during a run: schedule, logging, and the best score so far."""

from pathlib import Path

from diffusion_nft.data.prompts import Prompt, draw_lines
from diffusion_nft.evaluation.evaluate import evaluate
from diffusion_nft.evaluation.results import Evaluation, write_results
from diffusion_nft.rewards.combine import RewardSet
from diffusion_nft.runs.state import TrainingState
from diffusion_nft.tracking.grids import save_grid
from diffusion_nft.tracking.metrics import Metrics, Timer
from diffusion_nft.tracking.monitor import Monitor
from diffusion_nft.tracking.summary import TEST_SET, compare_images, images_file, result


def is_due(epoch: int, every: int) -> bool:
    """True every ``every`` epochs; never if 0."""
    return every > 0 and epoch % every == 0


class Evaluator:
    """Evaluates the policies of ``state`` on test ``prompts``; ``lines`` are their line numbers."""

    def __init__(
        self,
        state: TrainingState,
        rewards: RewardSet,
        prompts: list[Prompt],
        lines: list[int],
        *,
        metrics: Metrics,
        monitor: Monitor,
        timer: Timer,
    ):
        self.state, self.stage, self.config = state, state.stage, state.config
        self.policy, self.model = state.learner.policy, state.learner.model
        self.rewards, self.prompts, self.lines = rewards, prompts, lines
        self.dist, self.metrics, self.monitor, self.timer = state.dist, metrics, monitor, timer
        self.run_dir = Path(self.config.save_dir)
        self.before_after = self.run_dir / images_file(self.stage.number)

    def evaluate(self, number: int | None = None) -> Evaluation:
        """Evaluates the active policy on ``number`` test lines, or all."""
        count = len(self.prompts)
        chosen = draw_lines(self.prompts, count if number is None else number)
        return evaluate(
            self.model,
            [self.prompts[i] for i in chosen],
            self.rewards,
            self.config,
            dist=self.dist,
            lines=[self.lines[i] for i in chosen],
            num_images=self.config.log.num_images,
        )

    def evaluate_if_due(self) -> bool | None:
        """Evaluates the EMA weights if this epoch is due: True if they are the best so far, False
        if not, None if no evaluation is due.
        """
        config, state = self.config, self.state
        at_start = state.epoch == self.stage.first_epoch
        due = state.epoch >= config.num_epochs or is_due(state.epoch, config.eval_freq)
        if state.evaluated or not (config.eval.at_start if at_start else due):
            return None
        with self.timer.phase("eval"), self.policy.use_adapter("ema"):
            evaluation = self.evaluate()
        score = self._log(evaluation)
        best = state.best_score is None or score > state.best_score
        # The checkpoint at a later stage's start belongs to the previous stage.
        if best and not (at_start and state.epoch):
            state.best_score = score
        state.evaluated = True
        return best

    def _log(self, evaluation: Evaluation) -> float:
        """Logs and writes ``evaluation``; returns eval/total."""
        epoch, column = self.state.epoch, self.stage.column
        values = evaluation.metrics() | self.timer.pop() | self.monitor.evaluation(evaluation)
        if self.config.max_unscored:
            values["eval/unscored"] = evaluation.num_unscored
        if self.state.test_set:
            values[TEST_SET] = self.state.test_set
        self.metrics.log(column | values, step=self.state.learner.step, epoch=epoch)
        if self.dist.is_main:
            folder = self.run_dir / "eval" / self.stage.folder / f"epoch-{epoch:06d}"
            write_results(evaluation, folder, settings={"epoch": epoch} | column)
        lines, totals = evaluation.image_lines, evaluation.scores["total"]
        self.metrics.log_images(
            "/".join(filter(None, ("eval", self.stage.folder))),
            evaluation.images,
            [evaluation.prompts[line].text for line in lines],
            [totals[line] for line in lines],
            epoch=epoch,
        )
        score = values["eval/total"]
        self.dist.log(f"epoch {epoch}: eval/total {score:.4f}")
        return score

    def discard_result(self) -> None:
        if self.dist.is_main:
            self.before_after.unlink(missing_ok=True)

    def finish(self, *, trained: bool) -> None:
        """Draws the before/after images, by the base and the EMA weights, unless nothing was
        ``trained`` since they were drawn; prints the stage's result.
        """
        count = self.config.log.num_images
        drawn = self.dist.broadcast_object(self.before_after.exists())
        if count and (trained or not drawn):
            with self.policy.use_adapter("reference"):
                before = self.evaluate(count)
            with self.policy.use_adapter("ema"):
                after = self.evaluate(count)
            if self.dist.is_main:
                save_grid(compare_images(before, after), self.before_after)
        self.dist.print_once(result(self.run_dir, self.stage.number))
