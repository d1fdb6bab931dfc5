"""Phases of an epoch, and their roofline from measured peaks of the machine."""

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
from diffusion_nft.models.embeddings import PromptEmbeds
from diffusion_nft.models.flops import Cost, backward_cost, decode_cost, forward_cost
from diffusion_nft.rewards.combine import RewardSet

# A phase slower than its roofline by this factor is bound by overhead.
OVERHEAD_FACTOR = 3.0
# AdamW reads weight, gradient and two moments, and writes all but the gradient.
ADAM_PASSES = 7
# Bounds of the phases without a formula.
BOUNDS_WITHOUT_FORMULA = {
    "encode": "the text encoders, or the lookup of cached embeddings",
    "reward": "the rewards, in the background of sampling",
    "reward wait": "rewards that are not ready after the last image",
    "policy switch": "overhead: a walk over the adapted layers, or merging their weights",
    "collectives": "the network, and waiting for the slowest rank",
    "checkpoint": "the disk, and hashing",
    "sample: rest": "overhead: noise, the solver's element-wise steps, 8-bit images",
    "train: rest": "overhead: noise drawn on the CPU, the loss, EMA, the gradient's norm",
}


@dataclass
class Phase:
    """Time and cost of a phase: ``rows`` samples in ``calls``; FLOPs and bytes are 0 if unknown."""

    seconds: float = 0.0
    calls: int = 0
    rows: int = 0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Peaks:
    """Measured peaks of the machine: FLOP/s of a matrix product, byte/s of a large copy."""

    flops: float
    bandwidth: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype) -> "Peaks":
        """The best of several sizes and tries, in about a second.

        Products are ``x W^T`` as in a layer.  float32 is tried as well, as it is faster on machines
        without units for ``dtype``.
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Observer:
    """Times the phases of an epoch of ``Product`` or ``Published`` by patching their methods.

    The device is synchronised before and after each phase, so an observed epoch is slower.
    """

    def __init__(self, way: Any):
        self.way, self.device = way, way.setup.dist.device
        self._rank = way.setup.config.train.lora_rank
        self.phases: dict[str, Phase] = {}
        self._part = ""
        self._inside = 0.0  # seconds of the phases in the current part
        self._policies = ["current"]
        self._ranks: dict[str, int] = {}  # policy -> LoRA rank, 0 if merged or off
        self._awaiting: list[tuple[Cost, int]] = []  # costs of the next backward pass

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

    def timed(
        self,
        name: str,
        function: Callable[..., Any],
        count: Callable[..., None] = lambda phase, *args: None,
    ) -> Callable[..., Any]:
        """``function`` as phase ``name``; ``count(phase, *args)`` adds rows and costs."""

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

        def call(x: Tensor, sigma: Tensor, cond: PromptEmbeds) -> Tensor:
            shape = (transformer.config, x.shape[-1], cond.prompt_embeds.shape[1])
            policy = self._policies[-1]
            if policy not in self._ranks:
                # Not timed as part of the epoch.
                one = cond.select([0])
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
        """LoRA rank in a forward pass of one sample, from its FLOPs; 0 if merged or off."""
        # The counter does not support fused attention on CPUs.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            forward()
        without, beside = (forward_cost(*shape, rank).flops for rank in (0, self._rank))
        return self._rank if counter.get_total_flops() > (without + beside) / 2 else 0

    def _reward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Runs in a separate thread, so without synchronising the device.
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
            self.timed("policy switch", switch.__enter__)()
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
        """Patches the methods in the block."""
        way = self.way
        timed = self.timed
        wrapped = [
            (way, "sample", partial(self._whole, "sample")),
            (way, "train", partial(self._whole, "train")),
            (*way.encoder, partial(timed, "encode", count=self._count_texts)),
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


def roofline(name: str, phase: Phase, peaks: Peaks) -> dict[str, Any]:
    """Roofline of a phase: FLOP per byte, share of the roof, the bound, and a sentence on it."""
    if not phase.bytes or not phase.seconds:
        return {"bound": None, "sentence": f"no formula; bound by {BOUNDS_WITHOUT_FORMULA[name]}"}
    compute, memory = phase.flops / peaks.flops, phase.bytes / peaks.bandwidth
    intensity, ridge = phase.flops / phase.bytes, peaks.flops / peaks.bandwidth
    roof, share = max(compute, memory), max(compute, memory) / phase.seconds
    bound = "compute" if compute >= memory else "memory"
    if phase.seconds > OVERHEAD_FACTOR * roof:
        bound = "overhead"
    sentence = (
        f"{bound}-bound: {intensity:.1f} FLOP per byte (ridge of the machine: {ridge:.1f}), "
        f"{share:.0%} of the roofline, {phase.flops / phase.seconds / peaks.flops:.0%} of the "
        "peak FLOP/s"
    )
    return {
        "intensity": intensity,
        "roof_seconds": roof,
        "share_of_roof": share,
        "bound": bound,
        "sentence": sentence,
    }


def with_rooflines(phases: dict[str, Phase], peaks: dict[str, Peaks]) -> dict[str, dict[str, Any]]:
    """Each phase with its roofline; ``peaks``: those of the phase "decode" and of the "others"."""
    rows = {}
    for name, phase in phases.items():
        peak = peaks["decode" if name == "decode" else "others"]
        rows[name] = asdict(phase) | roofline(name, phase, peak)
    return rows
