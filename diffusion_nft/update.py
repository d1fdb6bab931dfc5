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

from diffusion_nft.advantages import flat_groups
from diffusion_nft.algorithms import Algorithm, Batch, PolicyVelocity, Transitions
from diffusion_nft.batches import fitting_micro_batch
from diffusion_nft.distributed.preemption import Preempted, requested
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.flow import add_noise
from diffusion_nft.models.embeddings import Conditioning
from diffusion_nft.models.precision import Precision
from diffusion_nft.models.sampling import guided_velocity
from diffusion_nft.policy import Policy
from diffusion_nft.randomness import generator, normal
from diffusion_nft.rollout import Rollout


def choose_sigma_indices(available: int, used: int, choice: str, rng: torch.Generator) -> list[int]:
    """``used`` of the ``available`` sigmas at which a sample is trained.

    random: any.  stratified: one of each of ``used`` equal stretches of the sampler's path, by
    systematic sampling, so that each sigma is as likely as another.  first: the noisiest.
    """
    if choice == "random":
        return torch.randperm(available, generator=rng)[:used].tolist()
    if choice == "first":
        return list(range(used))
    start = float(torch.rand((), generator=rng, dtype=torch.float64))
    return [int((start + i) * available / used) for i in range(used)]


def learning_rate(initial: float, half_life: float, epoch: int) -> float:
    """The rate of ``epoch``: it halves every ``half_life`` epochs, or is constant if that is 0."""
    return initial * 0.5 ** (epoch / half_life) if half_life else initial


class Learner:
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
        self._micro_batch = config.train.batch_size  # 0 until it is known

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

    def train_epoch(self, rollout: Rollout, weights: Tensor, *, epoch: int) -> dict[str, float]:
        """Updates ``current``, ``ema`` and ``old`` from an epoch's samples; returns ``loss/*``,
        ``optim/*``.

        ``weights: [N]`` are the algorithm's, of all samples; NaN leaves a sample out.

        Raises FloatingPointError after more than ``train.max_skipped_steps`` skipped updates in a
        row.  If any rank was asked to stop, raises Preempted on every rank, with weights, moments
        and counters as before the epoch.
        """
        if self.config.train.num_inner_epochs * self.config.train.gradient_step_per_epoch == 1:
            return self._train_epoch(rollout, weights, epoch)
        before = self._copy()
        try:
            return self._train_epoch(rollout, weights, epoch)
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

    def _train_epoch(self, rollout: Rollout, weights: Tensor, epoch: int) -> dict[str, float]:
        config = self.config.train
        rate = learning_rate(config.learning_rate, config.lr_half_life, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, Tensor] = {}
        norms: list[float] = []
        nonfinite = torch.zeros((), dtype=torch.long, device=self.dist.device)
        if not self._micro_batch:
            self._micro_batch = self._find_micro_batch(rollout, weights)
        before = self.step
        size = self.config.sample.num_image_per_prompt
        scored = ~weights.isnan()
        trained = scored.clone()
        if config.skip_flat_groups:
            flat = flat_groups(rollout.scores.total, size)
            trained &= ~flat.repeat_interleave(size)
        if self.algorithm.skips_weightless:
            trained &= weights != 0
        for inner in range(config.num_inner_epochs):
            steps = self._split(len(weights), (epoch, inner))
            for part in range(config.gradient_step_per_epoch):
                chosen = steps == part
                pairs = self._pairs(rollout, chosen & trained, (epoch, inner))
                # Every scored sample counts equally, also those that are skipped because they have
                # nothing to teach: the global count of pairs needs no collective.
                total = self._sigmas_per_sample(rollout) * int((chosen & scored).sum())
                norm, parts = self._step(rollout, weights, pairs, total, (epoch, inner))
                nonfinite += parts.pop("nonfinite", 0)
                if math.isfinite(norm):
                    norms.append(norm)
                    for key, value in parts.items():
                        sums[key] = sums.get(key, 0) + value
        decay = self.algorithm.old_policy_decay(self.step)
        if self.step > before:
            self.policy.ema_update("old", decay)
        totals: dict[str, float] = {}
        mine = {key: float(value) for key, value in (sums | {"nonfinite": nonfinite}).items()}
        for local in self.dist.gather_objects(mine):
            for key, value in local.items():
                totals[key] = totals.get(key, 0.0) + value
        pairs, faults = totals.pop("pairs", 0.0), totals.pop("nonfinite")
        return {key: value / pairs for key, value in totals.items()} | {
            "optim/grad_norm": sum(norms) / len(norms) if norms else math.nan,
            "optim/learning_rate": rate,
            "optim/old_policy_decay": decay,
            "optim/skipped_steps": self.skipped,
            "optim/nonfinite_losses": int(faults),
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

    def _sigmas_per_sample(self, rollout: Rollout) -> int:
        return max(1, int(len(rollout.sigmas) * self.config.train.timestep_fraction))

    def _pairs(
        self, rollout: Rollout, chosen: Tensor, key: tuple[int, int]
    ) -> list[tuple[int, int]]:
        """(row of this rank's share, index of a sigma) of every pair of an optimizer step."""
        available, used = len(rollout.sigmas), self._sigmas_per_sample(rollout)
        choice = self.config.train.sigma_choice
        pairs = []
        for row, index in enumerate(rollout.indices):
            if chosen[index]:
                rng = generator(self.config.seed, *key, self._noise_key(index), "sigmas")
                sigma_indices = choose_sigma_indices(available, used, choice, rng)
                pairs += [(row, sigma_index) for sigma_index in sigma_indices]
        return pairs

    def _noise_key(self, index: int) -> int:
        """What the noise and the sigmas of sample ``index`` are a function of: the sample, or the
        group's first one.
        """
        size = self.config.sample.num_image_per_prompt if self.config.train.shared_noise else 1
        return index - index % size

    def _step(
        self,
        rollout: Rollout,
        weights: Tensor,
        pairs: list[tuple[int, int]],
        total: int,
        key: tuple[int, int],
    ) -> tuple[float, dict[str, Tensor]]:
        """One update over this rank's ``pairs`` of ``total`` on all ranks.

        Returns the gradient's norm, and the sums of losses and metrics over this rank's pairs.
        A non-finite gradient is the same on every rank, so all of them skip the update alike.
        Raises Preempted on every rank, before the update, if any was asked to stop.
        """
        sums: dict[str, Tensor] = {}
        scaler, parameters = self.precision.scaler, self.policy.parameters()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        # A rank without pairs scales nothing, and unscales nothing, but the scaler wants both.
        scaler.scale(torch.zeros((), device=self.dist.device))
        size = self._micro_batch
        for start in range(0, len(pairs), size):
            if requested():
                break
            losses, metrics = self._loss(rollout, weights, pairs[start : start + size], key)
            scaler.scale(losses.sum() / total).backward()
            values = {
                "loss/total": losses.detach(),
                "pairs": torch.ones_like(losses),
                "nonfinite": ~losses.isfinite(),
                **metrics,
            }
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
            self.policy.ema_update("ema", decay)
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

    def _find_micro_batch(self, rollout: Rollout, weights: Tensor) -> int:
        """As many of this rank's pairs as the device can train at once."""

        def run(size: int) -> None:
            losses, _ = self._loss(rollout, weights, [(0, 0)] * size, (0, 0))
            losses.sum().backward()

        limit = len(rollout.indices) * self._sigmas_per_sample(rollout)
        forward_counts = self.model.pop_forward_counts()
        found = fitting_micro_batch(run, limit, self.dist.device) if limit else 1
        self.model.forward_counts = forward_counts  # the trials train nothing
        self.dist.print_once(f"train.batch_size = 0: {found} pairs at once")
        return found

    def _loss(
        self, rollout: Rollout, weights: Tensor, pairs: list[tuple[int, int]], key: tuple[int, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses and metrics ``[B]`` of ``pairs``."""
        if self.algorithm.on_trajectories:
            return self._trajectory_loss(rollout, weights, pairs)
        return self._forward_loss(rollout, weights, pairs, key)

    def _forward_loss(
        self, rollout: Rollout, weights: Tensor, pairs: list[tuple[int, int]], key: tuple[int, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of ``pairs`` of clean samples, noised anew; the noise is keyed by (seed, epoch,
        pass, sample, sigma).
        """
        rows, sigma_indices = torch.tensor(pairs).T.contiguous()
        noise = normal(
            self.model.latent_shape,
            [
                generator(self.config.seed, *key, self._noise_key(rollout.indices[row]), k, "noise")
                for row, k in pairs
            ],
        )
        dtype = self.precision.trained_dtype
        on_device = self._to_device(rows)
        x0 = rollout.x0[on_device]
        noise = self._to_device(noise).to(dtype)
        sigma = self._to_device(rollout.sigmas[sigma_indices]).to(dtype)
        batch = Batch(
            x0=x0,
            noise=noise,
            xt=add_noise(x0, noise, sigma),
            sigma=sigma,
            weight=self._to_device(weights[rows + rollout.indices.start]),
        )
        cond = rollout.cond.select(rollout.cond_rows[on_device])
        return self.algorithm.loss(self._velocity(batch.xt, sigma, cond), batch)

    def _trajectory_loss(
        self, rollout: Rollout, weights: Tensor, pairs: list[tuple[int, int]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses of ``pairs`` of samples and steps that the sampler took, under its guidance."""
        assert rollout.trajectory is not None
        rows, sigma_indices = torch.tensor(pairs).T.contiguous()
        on_device, steps = self._to_device(rows), self._to_device(sigma_indices)
        xs, log_probs = rollout.trajectory
        levels = torch.cat([rollout.sigmas, torch.zeros_like(rollout.sigmas[:1])])
        batch = Transitions(
            xt=xs[steps, on_device],
            xt_next=xs[steps + 1, on_device],
            sigma=levels[sigma_indices],
            sigma_next=levels[sigma_indices + 1],
            log_prob=log_probs[steps, on_device],
            weight=self._to_device(weights[rows + rollout.indices.start]),
        )
        sigma = self._to_device(batch.sigma).to(self.precision.trained_dtype)
        cond = rollout.cond.select(rollout.cond_rows[on_device])
        scale = self.config.sample.guidance_scale
        return self.algorithm.loss(self._velocity(batch.xt, sigma, cond, scale), batch)

    def _to_device(self, tensor: Tensor) -> Tensor:
        """A copy that does not wait for the device."""
        if self.dist.device.type == "cuda":
            return tensor.pin_memory().to(self.dist.device, non_blocking=True)
        return tensor

    def _velocity(
        self, xt: Tensor, sigma: Tensor, cond: Conditioning, guidance_scale: float = 1.0
    ) -> PolicyVelocity:
        predict = guided_velocity(self.model, cond, guidance_scale)

        def velocity(policy: str) -> Tensor:
            with self.policy.use_adapter(policy), torch.set_grad_enabled(policy == "current"):
                return predict(xt, sigma)

        return velocity


def flatten_optimizer(state_dict: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``state_dict()`` of an Adam as tensors ``"<index>.<name>"`` and the JSON-able rest."""
    entries = [(i, k, v) for i, entry in state_dict["state"].items() for k, v in entry.items()]
    tensors = {f"{i}.{k}": v for i, k, v in entries if isinstance(v, Tensor)}
    values: dict[str, dict[str, Any]] = {str(i): {} for i in state_dict["state"]}
    for i, k, v in entries:
        if not isinstance(v, Tensor):
            values[str(i)][k] = v
    return tensors, {"param_groups": state_dict["param_groups"], "state": values}


def unflatten_optimizer(tensors: dict[str, Tensor], state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten_optimizer``, also after safetensors and JSON: ready to be loaded."""
    entries = {int(index): dict(values) for index, values in state["state"].items()}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        entries[int(index)][name] = value
    # JSON knows no tuples; betas is the one that Adam has.
    groups = [group | {"betas": tuple(group["betas"])} for group in state["param_groups"]]
    return {"state": entries, "param_groups": groups}
