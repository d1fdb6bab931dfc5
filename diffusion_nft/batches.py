"""Training batches of an epoch: the (sample, sigma) pairs of each optimizer step, the model's
inputs for them, and the search for the largest micro-batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from ml_collections import ConfigDict
from torch import Tensor

from diffusion_nft.advantages import zero_std_groups
from diffusion_nft.algorithms import Algorithm, Batch, Transitions
from diffusion_nft.flow import add_noise
from diffusion_nft.models.embeddings import Conditioning
from diffusion_nft.randomness import generator, normal
from diffusion_nft.rollout import Rollout
from diffusion_nft.utils.devices import to_device

# Index of a sample among this rank's, and index of a sigma.
Pair = tuple[int, int]

# Largest share of the device's memory for a trial; the rest allows for fragmentation.
USABLE_MEMORY = 0.9
# Enough pairs to keep any device busy; a higher limit only prolongs the search.
MAX_MICRO_BATCH = 256
# On CPUs, where memory is not the limit: within 13 % of the fastest size for the built-in model.
CPU_MICRO_BATCH = 96


def choose_sigma_indices(available: int, used: int, choice: str, rng: torch.Generator) -> list[int]:
    """Indices of the ``used`` sigmas, of ``available`` ones, at which a sample is trained.

    random: without replacement.  stratified: one from each of ``used`` equal parts of the sampler's
    path, by systematic sampling, so that all sigmas are equally likely.  first: the noisiest.
    """
    if choice == "random":
        return torch.randperm(available, generator=rng)[:used].tolist()
    if choice == "first":
        return list(range(used))
    start = float(torch.rand((), generator=rng, dtype=torch.float64))
    return [int((start + i) * available / used) for i in range(used)]


def trained_sigmas(num_sigmas: int, train: ConfigDict) -> tuple[int, int]:
    """How many of the sampler's sigmas, the noisiest, are trained on, and at how many of these each
    sample is.
    """
    available = max(1, int(num_sigmas * train.sigma_range))
    return available, max(1, int(available * train.timestep_fraction))


@dataclass(frozen=True)
class StepPairs:
    """The pairs of one optimizer step."""

    pairs: list[Pair]  # of this rank
    total: int  # divisor of the sum of losses over all ranks
    key: tuple[int, int]  # of the noise: epoch and pass over its samples


class EpochBatches:
    """The training data of an epoch: ``rollout`` and the algorithm's ``weights: [N]`` of its
    samples; those with NaN are not used.
    """

    def __init__(
        self,
        config: ConfigDict,
        algorithm: Algorithm,
        rollout: Rollout,
        weights: Tensor,
        *,
        epoch: int,
        dtype: torch.dtype,
    ):
        self.rollout, self.weights, self.epoch, self.dtype = rollout, weights, epoch, dtype
        self.train, self.seed = config.train, config.seed
        self.group_size = config.sample.num_image_per_prompt
        self.on_trajectories = algorithm.on_trajectories
        self.available, self.sigmas_per_sample = trained_sigmas(len(rollout.sigmas), config.train)
        self._scored = ~weights.isnan()
        self._trained = self._scored.clone()
        if config.train.filter_zero_std_groups:
            zero_std = zero_std_groups(rollout.scores.total, self.group_size)
            self._trained &= ~zero_std.repeat_interleave(self.group_size)
        if algorithm.skips_weightless:
            self._trained &= weights != 0

    @property
    def num_pairs(self) -> int:
        """This rank's pairs in one pass."""
        return len(self.rollout.indices) * self.sigmas_per_sample

    def steps(self) -> Iterator[StepPairs]:
        for inner in range(self.train.num_inner_epochs):
            key = (self.epoch, inner)
            parts = self._split(key)
            for part in range(self.train.gradient_step_per_epoch):
                chosen = parts == part
                # Scored samples count in the mean even if they are skipped for lack of a gradient,
                # so the global number of pairs is known without communication.
                total = self.sigmas_per_sample * int((chosen & self._scored).sum())
                yield StepPairs(self._pairs(chosen & self._trained, key), total, key)

    def _split(self, key: tuple[int, int]) -> Tensor:
        """Optimizer step of each sample, ``[N]``: every group is split equally among the steps."""
        steps = torch.empty(len(self.weights) // self.group_size, self.group_size, dtype=torch.long)
        for group, row in enumerate(steps):
            rng = generator(self.seed, *key, group, "split")
            order = torch.randperm(self.group_size, generator=rng)
            parts = torch.arange(self.group_size) + group
            row[order] = parts % self.train.gradient_step_per_epoch
        return steps.reshape(-1)

    def _pairs(self, chosen: Tensor, key: tuple[int, int]) -> list[Pair]:
        available, used = self.available, self.sigmas_per_sample
        pairs = []
        for row, index in enumerate(self.rollout.indices):
            if chosen[index]:
                rng = generator(self.seed, *key, self._noise_key(index), "sigmas")
                indices = choose_sigma_indices(available, used, self.train.sigma_choice, rng)
                pairs += [(row, sigma_index) for sigma_index in indices]
        return pairs

    def _noise_key(self, index: int) -> int:
        """Index that keys the noise and the sigmas of sample ``index``: its own, or that of the
        first sample in its group (``train.shared_noise``).
        """
        return index - index % (self.group_size if self.train.shared_noise else 1)

    def batch(
        self, pairs: list[Pair], key: tuple[int, int]
    ) -> tuple[Batch | Transitions, Conditioning]:
        rows, sigma_indices = torch.tensor(pairs).T.contiguous()
        device = self.rollout.x0.device
        on_device = to_device(rows, device)
        weight = to_device(self.weights[rows + self.rollout.indices.start], device)
        cond = self.rollout.cond.select([self.rollout.cond_rows[row] for row, _ in pairs])
        if self.on_trajectories:
            return self._transitions(on_device, sigma_indices, weight), cond
        return self._noised(pairs, key, on_device, sigma_indices, weight), cond

    def _noised(
        self,
        pairs: list[Pair],
        key: tuple[int, int],
        rows: Tensor,
        sigma_indices: Tensor,
        weight: Tensor,
    ) -> Batch:
        rollout = self.rollout
        x0 = rollout.x0[rows]
        samples = [(self._noise_key(rollout.indices[row]), sigma) for row, sigma in pairs]
        rngs = [generator(self.seed, *key, index, k, "noise") for index, k in samples]
        noise = to_device(normal(tuple(x0.shape[1:]), rngs), x0.device).to(self.dtype)
        sigma = to_device(rollout.sigmas[sigma_indices], x0.device).to(self.dtype)
        return Batch(x0, noise, add_noise(x0, noise, sigma), sigma, weight)

    def _transitions(self, rows: Tensor, sigma_indices: Tensor, weight: Tensor) -> Transitions:
        assert self.rollout.trajectory is not None
        xs, log_probs = self.rollout.trajectory
        steps = to_device(sigma_indices, rows.device)
        levels = torch.cat([self.rollout.sigmas, torch.zeros_like(self.rollout.sigmas[:1])])
        return Transitions(
            xt=xs[steps, rows],
            xt_next=xs[steps + 1, rows],
            sigma=levels[sigma_indices],
            sigma_next=levels[sigma_indices + 1],
            log_prob=log_probs[steps, rows],
            weight=weight,
        )


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest size up to ``limit``, to within 1/8, for which ``fits(size)``, which must be
    monotonic, is True; 0 if none.
    """
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def fitting_micro_batch(run: Callable[[int], None], limit: int, device: torch.device) -> int:
    """The largest size for which ``run(size)``, a forward and a backward, fits in the share
    USABLE_MEMORY of the memory of ``device``; of CPUs, at most CPU_MICRO_BATCH.

    Raises torch.OutOfMemoryError, with advice, if a size of 1 does not fit.
    """
    if device.type != "cuda":
        return min(limit, CPU_MICRO_BATCH)
    total = torch.cuda.get_device_properties(device).total_memory

    def fits(size: int) -> bool:
        torch.cuda.empty_cache()
        taken = total - torch.cuda.mem_get_info(device)[0]
        others = taken - torch.cuda.memory_reserved(device)  # the CUDA context, other processes
        torch.cuda.reset_peak_memory_stats(device)
        try:
            run(size)
        except torch.OutOfMemoryError:
            return False
        return torch.cuda.max_memory_reserved(device) + others <= USABLE_MEMORY * total

    found = largest(fits, min(limit, MAX_MICRO_BATCH))
    torch.cuda.empty_cache()
    if not found:
        raise torch.OutOfMemoryError(
            "a single (sample, sigma) pair does not fit in the GPU's memory; set "
            "perf.gradient_checkpointing = True and perf.offload_text_encoders = True"
        )
    return found
