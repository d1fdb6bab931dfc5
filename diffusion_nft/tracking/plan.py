"""Estimates before a run: memory from tensor sizes, time per epoch from one measured forward."""

import math
import time

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from diffusion_nft.algorithms import build_algorithm
from diffusion_nft.batches import trained_sigmas
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models import Model, image_size
from diffusion_nft.policy import ADAPTERS, Policy
from diffusion_nft.solvers import solve
from diffusion_nft.validation.stages import Stage

# Forward-equivalents of training on one (sample, sigma) pair: the current policy's forward and its
# backward through activations and LoRA weights, by models/flops.py for SD3.5-Medium at 512 px.
CURRENT_FORWARDS = 2.14


def describe(stage: Stage, model: Model, policy: Policy, dist: Distributed) -> str:
    """Describes ``stage``: data, rewards, and this rank's estimated memory and time per epoch."""
    config = stage.config
    share = -(-config.sample.num_groups * config.sample.num_image_per_prompt // dist.world_size)
    seconds = share * forwards_per_sample(config) * _seconds_per_forward(config, model, share)
    lines = [
        outline(stage),
        "estimated memory, without activations, which grow with the micro-batches:",
    ]
    # A trajectory includes its start and its end, which is stored a second time.
    kept = config.sample.num_steps + 2 if build_algorithm(config).on_trajectories else 1
    latent_shape = model.latent_shape(image_size(config))
    sizes = memory(model, policy, share * kept, latent_shape)
    lines += [f"  {gigabytes:9.3f} GB  {what}" for what, gigabytes in sizes]
    if dist.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(dist.device)
        lines.append(f"  {free / 1e9:9.3f} GB  free of {total / 1e9:.1f} GB on the device now")
    lines.append(
        f"{share} samples per epoch on each of {dist.world_size} process(es), about "
        f"{seconds:.1f} s per epoch from one measured forward, without decoding and rewards"
    )
    return "\n".join(lines)


def outline(stage: Stage) -> str:
    """Epochs, prompts and rewards of ``stage`` in one line."""
    config, first = stage.config, stage.first_epoch
    rewards = " + ".join(f"{weight:g} {name}" for name, weight in config.reward_fn.items())
    return (
        f"{stage.title or 'the run'}: epochs {first + 1} to {config.num_epochs} "
        f"({config.num_epochs - first}) on the prompts of {config.dataset}, reward {rewards}"
    )


def forwards_per_sample(config: ConfigDict) -> float:
    """Forward-equivalents per sample and epoch: sampling, then training at its sigmas."""
    guided = 2 if config.sample.guidance_scale > 1 else 1
    calls, visited = _solver_calls(config.sample.solver, config.sample.num_steps)
    _, sigmas = trained_sigmas(visited, config.train)
    algorithm = build_algorithm(config)
    no_grad = len(algorithm.policies) - 1
    current = CURRENT_FORWARDS + config.perf.gradient_checkpointing  # recomputing
    training = sigmas * (no_grad + current) * config.train.num_inner_epochs
    return calls * guided + training * (guided if algorithm.on_trajectories else 1)


def _solver_calls(name: str, num_steps: int) -> tuple[int, int]:
    """Number of velocities that a solver evaluates, and of its sigmas."""
    calls = 0

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros_like(x)

    sigmas = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    _, visited = solve(name, velocity, torch.zeros(1, 1, 1, 1), sigmas, shift=1.0)
    return calls, len(visited)


def memory(
    model: Model, policy: Policy, num_latents: int, latent_shape: tuple[int, ...]
) -> list[tuple[str, float]]:
    """(name, GB) of all parts of known size, with ``num_latents`` of ``latent_shape`` stored per
    epoch.
    """
    parts = {what: sum(map(_nbytes, networks)) for what, networks in model.parts().items()}
    lora = sum(p.nbytes for p in policy.parameters())
    adapters = len(ADAPTERS) * lora
    where = "in host memory" if model.offload_text_encoders else "on the device"
    sizes = [
        ("frozen transformer", parts["transformer"] - adapters),
        (f"text encoders, {where}", parts["text encoders"]),
        ("VAE", parts["VAE"]),
        ("LoRA: current, old, EMA, gradients, two Adam moments", adapters + 3 * lora),
        ("an epoch's latents", num_latents * math.prod(latent_shape) * 4),
    ]
    return [(what, size / 1e9) for what, size in sizes]


def _nbytes(module: nn.Module) -> int:
    # With buffers, as the position embeddings are a tenth of SD3.5-Medium's transformer.
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def _seconds_per_forward(config: ConfigDict, model: Model, share: int) -> float:
    """Seconds per sample of a forward of ``sample.batch_size``, after a warm-up."""
    size = min(config.sample.batch_size, share)
    x = torch.zeros(size, *model.latent_shape(image_size(config)), device=model.device)
    x = x.to(model.precision.trained_dtype)
    sigma = torch.full((size,), 0.5, device=model.device, dtype=x.dtype)
    cond = model.encode([""] * size)
    float(model.velocity(x, sigma, cond).sum())
    started = time.perf_counter()
    # float() waits for the device.
    float(model.velocity(x, sigma, cond).sum())
    return (time.perf_counter() - started) / size
