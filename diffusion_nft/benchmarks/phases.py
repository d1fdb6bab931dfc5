"""Where an epoch's time goes: phases of a running epoch, machine peaks, and what bounds a phase."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.images import Images
from diffusion_nft.models.embeddings import Conditioning
from diffusion_nft.models.flops import Cost, backward_cost, decode_cost, forward_cost
from diffusion_nft.rewards.combine import RewardSet

# A phase that needs this many times what its FLOPs or its bytes would take is bound by neither.
OVERHEAD_FACTOR = 3.0
# AdamW reads weight, gradient and two moments, and writes all but the gradient.
ADAM_PASSES = 7
# What bounds a phase that has no formula.
BOUNDS_WITHOUT_FORMULA = {
    "encode": "the text encoders' work, uncounted, or the lookup of cached embeddings",
    "reward": "the rewards' own work, in the background of sampling",
    "reward wait": "rewards that are not ready when the last image is",
    "policy switch": "overhead: a walk over the adapted layers, or merging their weights",
    "collectives": "the network, and waiting for the slowest rank",
    "checkpoint": "the disk, and hashing",
    "sample: rest": "overhead: noise, the solver's element-wise steps, 8-bit images",
    "train: rest": "overhead: noise drawn on the CPU, the loss, EMA, the gradient's norm",
}


@dataclass
class Phase:
    """``calls`` of a phase, ``rows`` samples in all of them; FLOPs and bytes by formula or 0."""

    seconds: float = 0.0
    calls: int = 0
    rows: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Peaks:
    """What this machine reaches: FLOP/s of a matrix product, byte/s of a large copy."""

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> "Peaks":
        """The best of several sizes and tries, in about a second.

        The products are a layer's, ``x W^T``.  A machine without units for ``dtype`` may be faster
        in float32, and some shapes have better kernels than the largest.
        """
        gpu = device.type == "cuda"
        sizes, elements = ((4096, 8192), 2**29) if gpu else ((256, 1024), 2**24)
        rates = []
        for size, kind in product(sizes, {dtype, torch.float32}):
            a = torch.randn(size, size, device=device).to(kind)
            seconds = _best(partial(torch.nn.functional.linear, a, a), device)
            rates.append(2 * size**3 / seconds)
        source = torch.zeros(elements, device=device)
        target = torch.empty_like(source)
        copy = _best(lambda: target.copy_(source), device)
        return cls(max(rates), 2 * source.nbytes / copy)


def _best(work: Callable[[], Any], device: torch.device, tries: int = 16) -> float:
    times = []
    with torch.no_grad():
        for _ in range(tries):
            synchronize(device)
            started = time.perf_counter()
            work()
            synchronize(device)
            times.append(time.perf_counter() - started)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Waits for what was queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Observer:
    """Phases of a way of running an epoch (``Product`` or ``Published``), timed from outside.

    Every phase begins and ends with the device's queue empty, so an observed epoch is slower.
    """

    def __init__(self, way: Any):
        self.way, self.device = way, way.setup.dist.device
        self._rank = way.setup.config.train.lora_rank
        self.phases: dict[str, Phase] = {}
        self._part = ""
        self._inside = 0.0  # seconds of the running part that are a phase's
        self._policies = ["current"]
        self._ranks: dict[str, int] = {}  # of adapters computed beside their layers, by policy
        self._awaiting: list[tuple[Cost, int]] = []  # a backward pass

    def _clock(self, function: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, float]:
        synchronize(self.device)
        started = time.perf_counter()
        result = function(*args, **options)
        synchronize(self.device)
        return result, time.perf_counter() - started

    def _add(self, name: str, seconds: float, calls: int = 1) -> Phase:
        phase = self.phases.setdefault(name, Phase())
        phase.seconds += seconds
        phase.calls += calls
        self._inside += seconds
        return phase

    def _add_cost(self, phase: Phase, cost: Cost, rows: int, module: torch.nn.Module) -> None:
        weight = next(module.parameters()).dtype.itemsize
        # The VAE computes in the dtype of its weights, the transformer under autocast.
        vae = module is self.way.model.vae
        element = weight if vae else self.way.model.precision.compute_dtype.itemsize
        phase.rows += rows
        phase.flops += rows * cost.flops
        phase.bytes += cost.bytes(rows, weight, element)

    def _timed(
        self,
        name: str,
        function: Callable[..., Any],
        count: Callable[..., None] = lambda phase, *args: None,
    ) -> Callable[..., Any]:
        """``function`` as phase ``name``; ``count(phase, *args)`` adds rows and costs of a call."""

        def call(*args: Any, **options: Any) -> Any:
            result, seconds = self._clock(function, *args, **options)
            count(self._add(name, seconds), *args)
            return result

        return call

    def _count_texts(self, phase: Phase, texts: list[str]) -> None:
        phase.rows += len(texts)

    def _count_decode(self, phase: Phase, x0: Tensor) -> None:
        vae = self.way.model.vae
        self._add_cost(phase, decode_cost(vae.config, x0.shape[-1]), len(x0), vae)

    def _count_backward(self, phase: Phase, *args: Any) -> None:
        for cost, rows in self._awaiting:
            self._add_cost(phase, cost, rows, self.way.model.pipe.transformer)
        self._awaiting.clear()

    def _count_step(self, phase: Phase, *args: Any) -> None:
        groups = self.way.optimizer.param_groups
        phase.bytes += ADAM_PASSES * sum(w.nbytes for group in groups for w in group["params"])

    def _velocity(self, function: Callable[..., Any]) -> Callable[..., Any]:
        transformer = self.way.model.pipe.transformer

        def call(x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
            shape = (transformer.config, x.shape[-1], cond.prompt_embeds.shape[1])
            policy = self._policies[-1]
            if policy not in self._ranks:
                # Not part of the epoch.
                one = cond.select(torch.zeros(1, dtype=torch.long, device=x.device))
                self._ranks[policy], seconds = self._clock(
                    self._rank_beside, partial(function, x[:1], sigma[:1], one), shape
                )
                self._inside += seconds
            result, seconds = self._clock(function, x, sigma, cond)
            cost = forward_cost(*shape, self._ranks[policy])
            name = "sample" if self._part == "sample" else f"{policy} forward"
            self._add_cost(self._add(name, seconds), cost, len(x), transformer)
            if result.requires_grad:
                self._awaiting.append((backward_cost(*shape, self._rank), len(x)))
            return result

        return call

    @torch.no_grad()
    def _rank_beside(self, forward: Callable[[], Any], shape: tuple[Any, int, int]) -> int:
        """The rank of adapters that a forward of one sample computes beside their layers; 0 if it
        does without: they are merged or off.  Whoever wrote the forward, its products tell.
        """
        # The counter knows no fused attention of CPUs.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            forward()
        without, beside = (forward_cost(*shape, rank).flops for rank in (0, self._rank))
        return self._rank if counter.get_total_flops() > (without + beside) / 2 else 0

    def _reward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # In a thread of its own, beside the phases of the main one, which has the device's queue.
        def call(rewards: RewardSet, images: Images, *args: Any) -> Any:
            started = time.perf_counter()
            scores = function(rewards, images, *args)
            phase = self.phases.setdefault("reward", Phase())
            phase.seconds += time.perf_counter() - started
            phase.calls += 1
            phase.rows += len(images)
            return scores

        return call

    def _use_adapter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def use_adapter(name: str) -> Iterator[None]:
            switch = function(name)
            self._timed("policy switch", switch.__enter__)()
            self._policies.append(name)
            try:
                yield
            finally:
                self._policies.pop()
                _, seconds = self._clock(switch.__exit__, None, None, None)
                self._add("policy switch", seconds, calls=0)

        return use_adapter

    def _whole(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self._part, self._inside = part, 0.0
            result, seconds = self._clock(function, *args)
            inside = self._inside
            self._add(f"{part}: rest", seconds - inside)
            self._part = ""
            return result

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts and times what the way does in the block."""
        way = self.way
        timed = self._timed
        wrapped = [
            (way, "sample", partial(self._whole, "sample")),
            (way, "train", partial(self._whole, "train")),
            (way.encoder, "encode", partial(timed, "encode", count=self._count_texts)),
            (way.model, "decode", partial(timed, "decode", count=self._count_decode)),
            (way.model, "velocity", self._velocity),
            (way.switch, "use_adapter", self._use_adapter),
            (way.optimizer, "step", partial(timed, "optimizer", count=self._count_step)),
            (*way.waiting, partial(timed, "reward wait")),
            (RewardSet, "__call__", self._reward),
            (torch.autograd, "backward", partial(timed, "backward", count=self._count_backward)),
            (Distributed, "all_reduce_sum", partial(timed, "collectives")),
            (Distributed, "gather_objects", partial(timed, "collectives")),
        ]
        with ExitStack() as stack:
            for owner, name, wrap in wrapped:
                stack.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))
            yield

    def time(self, name: str, function: Callable[[], Any]) -> None:
        """Runs ``function`` as phase ``name``."""
        self._timed(name, function)()


def verdict(name: str, phase: Phase, peaks: Peaks) -> dict[str, Any]:
    """The roofline of a phase: FLOP per byte, share of the roof, what bounds it, in a sentence."""
    if not phase.bytes or not phase.seconds:
        return {"bound": None, "sentence": f"no formula; bound by {BOUNDS_WITHOUT_FORMULA[name]}"}
    compute, memory = phase.flops / peaks.flops, phase.bytes / peaks.bandwidth
    intensity, ridge = phase.flops / phase.bytes, peaks.flops / peaks.bandwidth
    roof, share = max(compute, memory), max(compute, memory) / phase.seconds
    bound = "compute" if compute >= memory else "memory"
    if phase.seconds > OVERHEAD_FACTOR * roof:
        bound = "overhead"
    sentence = (
        f"{bound}-bound: {intensity:.1f} FLOP a byte, where the machine turns from memory- to "
        f"compute-bound at {ridge:.1f}; it reaches {share:.0%} of that roof, "
        f"{phase.flops / phase.seconds / peaks.flops:.0%} of the matrix product's peak"
    )
    return {
        "intensity": intensity,
        "roof_seconds": roof,
        "share_of_roof": share,
        "bound": bound,
        "sentence": sentence,
    }


def judged_phases(phases: dict[str, Phase], peaks: dict[str, Peaks]) -> dict[str, dict[str, Any]]:
    """Each phase with its verdict; ``peaks``: of the phase "decode", and of the "others"."""
    rows = {}
    for name, phase in phases.items():
        peak = peaks["decode" if name == "decode" else "others"]
        rows[name] = asdict(phase) | verdict(name, phase, peak)
    return rows
