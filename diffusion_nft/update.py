"""The policy's update: every optimizer step of an epoch over (sample, sigma) pairs.

The batch of an optimizer step is global.  Its loss is the mean over all pairs of all ranks, built
up micro-batch by micro-batch with exact weights, so neither the number of ranks nor the micro-batch
size changes it; gradients cross the ranks once per step.
"""

import math
from copy import deepcopy
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from diffusion_nft.algorithms import Algorithm, Batch, Velocity
from diffusion_nft.checkpoint import flatten_optimizer, unflatten_optimizer
from diffusion_nft.distributed import Distributed
from diffusion_nft.flow import add_noise
from diffusion_nft.models.embeddings import Conditioning
from diffusion_nft.policy import Policy
from diffusion_nft.precision import Precision
from diffusion_nft.preemption import Preempted, requested
from diffusion_nft.randomness import generator, normal
from diffusion_nft.rollout import Samples


def learning_rate(initial: float, half_life: float, epoch: int) -> float:
    """The rate of ``epoch``: it halves every ``half_life`` epochs, or is constant if that is 0."""
    return initial * 0.5 ** (epoch / half_life) if half_life else initial


class Updater:
    """Optimizer, loss scaling, EMA and the counters of optimizer steps."""

    def __init__(
        self,
        config: ConfigDict,
        *,
        dist: Distributed,
        precision: Precision,
        model: Any,
        policy: Policy,
        algorithm: Algorithm,
    ):
        self.config, self.dist, self.precision = config, dist, precision
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
        self.skipped = 0  # updates skipped for a non-finite gradient, in all
        self.skipped_in_row = 0

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values that ``load_state_dict`` continues from."""
        tensors, groups = flatten_optimizer(self.optimizer.state_dict())
        return tensors, {
            "optimizer": groups,
            "scaler": self.precision.scaler.state_dict(),
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
        }

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continues from a former ``state_dict``."""
        self.optimizer.load_state_dict(unflatten_optimizer(tensors, state["optimizer"]))
        self.precision.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped = state["step"], state["skipped"]
        self.skipped_in_row = state["skipped_in_row"]

    def train_epoch(self, samples: Samples, r: Tensor, *, epoch: int) -> dict[str, float]:
        """Updates ``current``, ``ema`` and ``old`` from an epoch's samples; returns ``loss/*``,
        ``optim/*``.

        ``r: [N]`` is the optimality of all samples.  Raises FloatingPointError after more than
        ``train.max_skipped_steps`` skipped updates in a row.  If any rank was asked to stop, raises
        Preempted on every rank, with weights, moments and counters as before the epoch.
        """
        if self.config.train.num_inner_epochs * self.config.train.gradient_step_per_epoch == 1:
            return self._train_epoch(samples, r, epoch)
        before = self._copy()
        try:
            return self._train_epoch(samples, r, epoch)
        except Preempted:
            self._undo(before)
            raise

    def _copy(self) -> tuple[dict[str, list[Tensor]], tuple[dict[str, Tensor], dict[str, Any]]]:
        """What the steps of an epoch change, in host memory: weights, and ``state_dict()``."""
        weights = {
            name: [weight.detach().to("cpu", copy=True) for weight in self.policy.parameters(name)]
            for name in ("current", "ema")
        }
        tensors, state = self.state_dict()
        tensors = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
        return weights, (tensors, deepcopy(state))

    @torch.no_grad()
    def _undo(self, before: tuple) -> None:
        """Goes back to a ``_copy()``."""
        weights, state = before
        for name, values in weights.items():
            for weight, value in zip(self.policy.parameters(name), values, strict=True):
                weight.copy_(value)
        self.load_state_dict(*state)

    def _train_epoch(self, samples: Samples, r: Tensor, epoch: int) -> dict[str, float]:
        config = self.config.train
        rate = learning_rate(config.learning_rate, config.lr_half_life, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, Tensor] = {}
        norms: list[float] = []
        before = self.step
        for inner in range(config.num_inner_epochs):
            steps = self._split(len(r), (epoch, inner))
            for part in range(config.gradient_step_per_epoch):
                norm, parts = self._step(samples, r, steps == part, (epoch, inner))
                if math.isfinite(norm):
                    norms.append(norm)
                    for key, value in parts.items():
                        sums[key] = sums.get(key, 0) + value
        decay = self.algorithm.old_policy_decay(self.step)
        if self.step > before:
            self.policy.blend("old", decay)
        totals: dict[str, float] = {}
        for local in self.dist.gather_objects({key: float(value) for key, value in sums.items()}):
            for key, value in local.items():
                totals[key] = totals.get(key, 0.0) + value
        pairs = totals.pop("pairs", 0.0)
        return {key: value / pairs for key, value in totals.items()} | {
            "optim/grad_norm": sum(norms) / len(norms) if norms else math.nan,
            "optim/learning_rate": rate,
            "optim/old_policy_decay": decay,
            "optim/skipped_steps": self.skipped,
            "optim/loss_scale": self.precision.scaler.get_scale(),
        }

    def _split(self, num_samples: int, key: tuple[int, int]) -> Tensor:
        """The optimizer step of each sample ``[N]``; every step takes an equal share of every
        group.
        """
        size = self.config.sample.num_image_per_prompt
        parts = self.config.train.gradient_step_per_epoch
        steps = torch.empty(num_samples // size, size, dtype=torch.long)
        for group, row in enumerate(steps):
            shuffled = torch.randperm(
                size, generator=generator(self.config.seed, *key, group, "split")
            )
            row[shuffled] = (torch.arange(size) + group) % parts
        return steps.reshape(-1)

    def _sigmas_per_sample(self, samples: Samples) -> int:
        return max(1, int(len(samples.sigmas) * self.config.train.timestep_fraction))

    def _pairs(
        self, samples: Samples, chosen: Tensor, key: tuple[int, int]
    ) -> list[tuple[int, int]]:
        """(row of this rank's share, index of a sigma) of every pair of an optimizer step."""
        available, used = len(samples.sigmas), self._sigmas_per_sample(samples)
        pairs = []
        for row, index in enumerate(samples.indices):
            if chosen[index]:
                rng = generator(self.config.seed, *key, index, "sigmas")
                slots = torch.randperm(available, generator=rng)[:used]
                pairs += [(row, slot) for slot in slots.tolist()]
        return pairs

    def _step(
        self,
        samples: Samples,
        r: Tensor,
        chosen: Tensor,
        key: tuple[int, int],
    ) -> tuple[float, dict[str, Tensor]]:
        """One update over the samples ``chosen: [N]`` (bool).

        Returns the gradient's norm, and the sums of losses and metrics over this rank's pairs.
        A non-finite gradient is the same on every rank, so all of them skip the update alike.
        Raises Preempted on every rank, before the update, if any was asked to stop.
        """
        sums: dict[str, Tensor] = {}
        scaler, parameters = self.precision.scaler, self.policy.parameters()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        pairs = self._pairs(samples, chosen, key)
        # Every chosen sample has equally many pairs: the global count needs no collective.
        total = self._sigmas_per_sample(samples) * int(chosen.sum())
        size = self.config.train.batch_size
        for start in range(0, len(pairs), size):
            if requested():
                break
            batch, cond = self._batch(samples, r, pairs[start : start + size], key)
            losses, metrics = self.algorithm.loss(self._velocity(batch, cond), batch)
            scaler.scale(losses.sum() / total).backward()
            values = {"loss/total": losses.detach(), "pairs": torch.ones_like(losses), **metrics}
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.detach().sum()
        gradients = [p.grad for p in parameters if p.grad is not None]
        stop = gradients[0].new_full((1,), float(requested()))
        self.dist.all_reduce_sum([*gradients, stop])
        scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.train.max_grad_norm)
        finite = bool(torch.isfinite(norm))  # waits for the device: what follows costs nothing
        if stop.item():
            raise Preempted
        if finite:
            scaler.step(self.optimizer)
            self.step += 1
            self.skipped_in_row = 0
            decay = min((1 + self.step) / (10 + self.step), self.config.train.ema_decay)
            self.policy.blend("ema", decay)
        else:
            self.skipped += 1
            self.skipped_in_row += 1
        scaler.update()
        limit = self.config.train.max_skipped_steps
        if self.skipped_in_row > limit:
            raise FloatingPointError(
                f"{self.skipped_in_row} updates in a row had a non-finite gradient "
                f"(train.max_skipped_steps = {limit}); the last checkpoint is as it was: allow "
                "more of them, or begin another run with resume_from = this one's save_dir and a "
                "lower train.learning_rate or mixed_precision = 'bf16'"
            )
        return float(norm), sums

    def _batch(
        self, samples: Samples, r: Tensor, pairs: list[tuple[int, int]], key: tuple[int, int]
    ) -> tuple[Batch, Conditioning]:
        """Noisy latents of ``pairs``; the noise is keyed by (seed, epoch, pass, sample, sigma)."""
        rows = torch.tensor([row for row, _ in pairs])
        slots = torch.tensor([slot for _, slot in pairs])
        noise = normal(
            self.model.latent_shape,
            [
                generator(self.config.seed, *key, samples.indices[row], slot, "noise")
                for row, slot in pairs
            ],
        )
        dtype = self.precision.trained_dtype
        on_device = self._to_device(rows)
        x0 = samples.x0[on_device]
        noise = self._to_device(noise).to(dtype)
        sigma = self._to_device(samples.sigmas[slots]).to(dtype)
        batch = Batch(
            x0=x0,
            noise=noise,
            xt=add_noise(x0, noise, sigma),
            sigma=sigma,
            optimality=self._to_device(r[rows + samples.indices.start]),
        )
        return batch, samples.cond.select(samples.cond_rows[on_device])

    def _to_device(self, tensor: Tensor) -> Tensor:
        """A copy that does not wait for the device."""
        if self.dist.device.type == "cuda":
            return tensor.pin_memory().to(self.dist.device, non_blocking=True)
        return tensor

    def _velocity(self, batch: Batch, cond: Conditioning) -> Velocity:
        def velocity(policy: str) -> Tensor:
            with self.policy.using(policy), torch.set_grad_enabled(policy == "current"):
                return self.model.velocity(batch.xt, batch.sigma, cond)

        return velocity
