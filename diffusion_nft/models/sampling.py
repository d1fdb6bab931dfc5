"""Sampling latents from a model: solver, steps and classifier-free guidance."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusion_nft.models.embeddings import Conditioning, stack
from diffusion_nft.randomness import normal
from diffusion_nft.solvers import Trajectory, sample_trajectory, solve


@dataclass(frozen=True)
class Sampler:
    """How images are sampled: solver, steps, noise of a stochastic solver, guidance (1 = none)."""

    solver: str
    num_steps: int
    guidance_scale: float
    noise_level: float = 0.0

    @torch.no_grad()
    def __call__(
        self, model: Any, cond: Conditioning, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Latents x0 ``[B, C, h, w]`` of B prompts with the model's active adapter, and the
        distinct non-zero sigmas that the solver visited.  Row i depends on row i of ``cond`` and
        generator i alone.
        """
        return solve(
            self.solver,
            guided_velocity(model, cond, self.guidance_scale),
            self._start(model, generators),
            model.sigmas(self.num_steps),
            noise_level=self.noise_level,
            generator=generators,
            shift=model.shift,
        )

    @torch.no_grad()
    def trajectory(
        self, model: Any, cond: Conditioning, generators: list[torch.Generator]
    ) -> tuple[Trajectory, Tensor]:
        """The same latents with all that led to them, and the sigmas ``[N]`` of the steps.

        Raises ValueError if the solver is not a stochastic one.
        """
        sigmas = model.sigmas(self.num_steps)
        trajectory = sample_trajectory(
            self.solver,
            guided_velocity(model, cond, self.guidance_scale),
            self._start(model, generators),
            sigmas,
            noise_level=self.noise_level,
            generator=generators,
        )
        return trajectory, sigmas[:-1]

    def _start(self, model: Any, generators: list[torch.Generator]) -> Tensor:
        noise = normal(model.latent_shape, generators)
        return noise.to(model.device, model.precision.trained_dtype)


def guided_velocity(
    model: Any, cond: Conditioning, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """``velocity(x, sigma)`` of ``model`` at classifier-free guidance ``scale`` (1: none)."""
    if scale == 1:
        return lambda x, sigma: model.velocity(x, sigma, cond)
    device = cond.prompt_embeds.device
    rows = torch.zeros(len(cond.prompt_embeds), dtype=torch.long, device=device)
    both = stack([model.encode([""]).select(rows), cond])

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        v = model.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both)
        without, with_prompt = v.chunk(2)
        return without + scale * (with_prompt - without)

    return guided
