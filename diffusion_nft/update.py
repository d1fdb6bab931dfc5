"""The optimizer steps of an epoch.

The batch of an optimizer step is global.  Its loss is the mean over all (sample, sigma) pairs of
all ranks, accumulated over micro-batches with exact weights, so it depends neither on the number of
ranks nor on the micro-batch size.  Gradients are reduced over the ranks once per step.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor
from torch.utils._pytree import tree_map_only

from diffusion_nft.algorithms import Algorithm, PolicyVelocity, build_algorithm
from diffusion_nft.batches import EpochBatches, Pair, StepPairs, fitting_micro_batch
from diffusion_nft.distributed.preemption import Preempted, requested
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models import Model
from diffusion_nft.models.embeddings import Conditioning
from diffusion_nft.models.sampling import guided_velocity
from diffusion_nft.policy import Policy, lora_layers
from diffusion_nft.rollout import Rollout
from diffusion_nft.utils.devices import to_device


def learning_rate(initial: float, half_life: float, epoch: int) -> float:
    """Learning rate of ``epoch``: halved every ``half_life`` epochs, constant if that is 0."""
    return initial * 0.5 ** (epoch / half_life) if half_life else initial


class Learner:
    """Trains ``policy`` on ``model`` with the loss of ``algorithm``: optimizer, loss scaling,
    updates of the EMA and the old policy, and counters of optimizer steps.
    """

    def __init__(
        self,
        config: ConfigDict,
        *,
        dist: Distributed,
        model: Model,
        policy: Policy,
        algorithm: Algorithm,
    ):
        self.config, self.dist, self.precision = config, dist, model.precision
        self.model, self.policy, self.algorithm = model, policy, algorithm
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=config.train.learning_rate,
            betas=(config.train.adam_beta1, config.train.adam_beta2),
            weight_decay=config.train.adam_weight_decay,
            eps=config.train.adam_epsilon,
            fused=True,
        )
        self.step = 0  # updates made
        self.skipped = 0  # updates skipped because of a non-finite gradient
        self.skipped_in_row = 0
        self._micro_batch = config.train.batch_size  # 0: to be determined in the first epoch
        self._old_is_current = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped = state["step"], state["skipped"]
        self.skipped_in_row = state["skipped_in_row"]

    def train_epoch(self, rollout: Rollout, weights: Tensor, *, epoch: int) -> dict[str, float]:
        """Updates ``current``, ``ema`` and ``old`` on an epoch's samples; returns ``loss/*`` and
        ``optim/*``.

        ``weights: [N]``: from ``Algorithm.sample_weights``; samples with NaN are not used.

        Raises FloatingPointError after more than ``train.max_skipped_steps`` consecutive skipped
        updates.  If a stop was requested on any rank, raises Preempted on every rank, with weights,
        moments and counters restored to those before the epoch.
        """
        config = self.config.train
        rate = learning_rate(config.learning_rate, config.lr_half_life, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = EpochBatches(
            self.config,
            self.algorithm,
            rollout,
            weights,
            epoch=epoch,
            dtype=self.precision.trained_dtype,
        )
        if not self._micro_batch:
            self._micro_batch = self._find_micro_batch(batches)
        pairs = zip(self.policy.parameters("old"), self.policy.parameters(), strict=True)
        self._old_is_current = all(torch.equal(old, current) for old, current in pairs)
        sums: dict[str, Tensor] = {}
        norms: list[float] = []
        nonfinite = torch.zeros((), dtype=torch.long, device=self.dist.device)
        before = self.step
        one_step = config.num_inner_epochs * config.gradient_step_per_epoch == 1
        with self._restored_if_preempted(() if one_step else ("current", "ema")):
            for step in batches.steps():
                norm, parts = self._step(batches, step)
                nonfinite += parts.pop("nonfinite", 0)
                if math.isfinite(norm):
                    norms.append(norm)
                    for key, value in parts.items():
                        sums[key] = sums.get(key, 0) + value
        decay = self.algorithm.old_policy_decay(self.step)
        if self.step > before:
            self.policy.ema_update("old", decay)
        totals = self.dist.sum_numbers(sums | {"nonfinite": nonfinite})
        pairs, faults = totals.pop("pairs", 0.0), totals.pop("nonfinite")
        return {key: value / pairs for key, value in totals.items()} | {
            "optim/grad_norm": sum(norms) / len(norms) if norms else math.nan,
            "optim/learning_rate": rate,
            "optim/old_policy_decay": decay,
            "optim/skipped_steps": self.skipped,
            "optim/nonfinite_losses": int(faults),
            "optim/loss_scale": self.precision.scaler.get_scale(),
        }

    def _step(self, batches: EpochBatches, step: StepPairs) -> tuple[float, dict[str, Tensor]]:
        """One update.

        Returns the norm of the gradient, and the sums of losses and metrics over this rank's pairs.
        A non-finite gradient is the same on every rank, so all ranks skip the update together.
        Raises Preempted on every rank, before the update, if a stop was requested on any.
        """
        sums: dict[str, Tensor] = {}
        scaler, parameters = self.precision.scaler, self.policy.parameters()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        # The scaler requires a scaled loss, also on a rank without pairs.
        scaler.scale(torch.zeros((), device=self.dist.device))
        with self.dist.progress("pairs trained", len(step.pairs)) as trained:
            for start in range(0, len(step.pairs), self._micro_batch):
                if requested():
                    break
                pairs = step.pairs[start : start + self._micro_batch]
                losses, metrics = self._loss(batches, pairs, step.key)
                # Gradient checkpointing predicts again, with the policy that is active then.
                assert self.policy.active == "current"
                scaler.scale(losses.sum() / step.total).backward()
                values = {
                    "loss/total": losses.detach(),
                    "pairs": torch.ones_like(losses),
                    "nonfinite": ~losses.isfinite(),
                    **metrics,
                }
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + value.detach().sum()
                trained.update(len(pairs))
        gradients = [p.grad for p in parameters if p.grad is not None]
        stop = gradients[0].new_full((1,), float(requested()))
        self.dist.all_reduce_sum([*gradients, stop])
        scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.train.max_grad_norm)
        finite = bool(torch.isfinite(norm))  # synchronises: the next .item() is free
        if stop.item():
            raise Preempted
        if finite:
            scaler.step(self.optimizer)
            self._old_is_current = False
            self.step += 1
            self.skipped_in_row = 0
            decay = min((1 + self.step) / (10 + self.step), self.config.train.ema_decay)
            self.policy.ema_update("ema", decay)
        else:
            self.skipped += 1
            self.skipped_in_row += 1
        scaler.update()
        limit = self.config.train.max_skipped_steps
        if self.skipped_in_row > limit:
            raise FloatingPointError(
                f"{self.skipped_in_row} updates in a row had a non-finite gradient "
                f"(train.max_skipped_steps = {limit}); the last checkpoint is unchanged: raise the "
                "limit, or start another run with resume_from = this one's save_dir and a lower "
                "train.learning_rate or mixed_precision = 'bf16'"
            )
        return float(norm), sums

    def _loss(
        self, batches: EpochBatches, pairs: list[Pair], key: tuple[int, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch, cond = batches.batch(pairs, key)
        sigma = to_device(batch.sigma, self.dist.device).to(self.precision.trained_dtype)
        return self.algorithm.loss(self._velocity(batch.xt, sigma, cond), batch)

    def _velocity(self, xt: Tensor, sigma: Tensor, cond: Conditioning) -> PolicyVelocity:
        # Trajectories are trained with the guidance of the rollout, clean samples without any.
        guided = self.algorithm.on_trajectories
        scale = self.config.sample.guidance_scale if guided else 1.0
        predict = guided_velocity(self.model, cond, scale)

        def predicted(policy: str) -> Tensor:
            with self.policy.use_adapter(policy), torch.set_grad_enabled(policy == "current"):
                return predict(xt, sigma)

        if not self._old_is_current:
            return predicted
        # One prediction serves both policies, as before the first update.
        current = predicted("current")
        shared = {"current": current, "old": current.detach()}
        return lambda policy: shared[policy] if policy in shared else predicted(policy)

    def _find_micro_batch(self, batches: EpochBatches) -> int:
        def run(size: int) -> None:
            losses, _ = self._loss(batches, [(0, 0)] * size, (0, 0))
            losses.sum().backward()

        limit = batches.num_pairs
        with self.model.uncounted():
            found = fitting_micro_batch(run, limit, self.dist.device) if limit else 1
        self.dist.log(f"train.batch_size = 0: micro-batches of {found} pairs")
        return found

    @contextmanager
    def _restored_if_preempted(self, names: Iterable[str]) -> Iterator[None]:
        """Restores the policies ``names`` and the ``state_dict``, from copies in host memory, if
        the block raises Preempted.  Without names, nothing is copied or restored.
        """

        def copied(value: Any) -> Any:
            return tree_map_only(Tensor, lambda t: t.detach().to("cpu", copy=True), value)

        names = tuple(names)
        weights = {name: copied(self.policy.parameters(name)) for name in names}
        state = copied(self.state_dict()) if names else None
        try:
            yield
        except Preempted:
            with torch.no_grad():
                for name in names:
                    own = [weight.detach() for weight in self.policy.parameters(name)]
                    torch._foreach_copy_(own, weights[name])
            if state is not None:
                self.load_state_dict(state)
            raise


def build_learner(
    config: ConfigDict, dist: Distributed, model: Model, lora_modules: Iterable[str] = ()
) -> Learner:
    """A Learner with a new policy and algorithm.

    ``lora_modules``: layers with LoRA; by default those of ``train.lora_targets``.
    """
    policy = Policy(
        model.transformer,
        targets=list(lora_modules) or lora_layers(model, config.train.lora_targets),
        rank=config.train.lora_rank,
        alpha=config.train.lora_alpha,
        seed=config.seed,
        dtype=model.precision.trained_dtype,
    )
    algorithm = build_algorithm(config)
    return Learner(config, dist=dist, model=model, policy=policy, algorithm=algorithm)
