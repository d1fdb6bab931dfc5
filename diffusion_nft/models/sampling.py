"""Sampling latents from a model: solver, steps and classifier-free guidance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from ml_collections import ConfigDict
from torch import Tensor

from diffusion_nft.data.prompts import Prompt
from diffusion_nft.models import Model, Size, eval_size, image_size
from diffusion_nft.models.embeddings import Conditioning, stack
from diffusion_nft.randomness import normal
from diffusion_nft.solvers import Trajectory, sample_trajectory, solve
from diffusion_nft.utils.devices import to_device


@dataclass(frozen=True)
class Sampler:
    """Sampling options: solver, steps, classifier-free guidance (1: none), ``size`` in pixels, the
    noise level of a stochastic solver, and the negative prompt of lines without one.
    """

    solver: str
    num_steps: int
    guidance_scale: float
    size: Size
    noise_level: float = 0.0
    negative_prompt: str = ""

    @classmethod
    def for_rollouts(cls, config: ConfigDict) -> Self:
        own, size = config.sample, image_size(config)
        return cls(
            own.solver,
            own.num_steps,
            own.guidance_scale,
            size,
            own.noise_level,
            own.negative_prompt,
        )

    @classmethod
    def for_evaluation(cls, config: ConfigDict) -> Self:
        own, size, negative = config.eval, eval_size(config), config.sample.negative_prompt
        return cls(own.solver, own.num_steps, own.guidance_scale, size, negative_prompt=negative)

    def encode(self, model: Model, prompts: Sequence[Prompt]) -> Conditioning:
        """Embeddings of ``prompts``, in host memory."""
        prompt = model.encode_cached([p.text for p in prompts])
        if self.guidance_scale == 1:
            return Conditioning(prompt)
        negative = [self.negative_prompt if p.negative is None else p.negative for p in prompts]
        return Conditioning(prompt, model.encode_cached(negative))

    @torch.no_grad()
    def __call__(
        self, model: Model, cond: Conditioning, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Latents x0 ``[B, C, h, w]`` of B prompts with the model's active adapter, and the
        distinct non-zero sigmas visited by the solver.  Row i depends only on row i of ``cond`` and
        generator i.
        """
        return solve(
            self.solver,
            guided_velocity(model, cond, self.guidance_scale),
            self._start(model, generators),
            model.sigmas(self.num_steps, self.size),
            noise_level=self.noise_level,
            generator=generators,
            shift=model.shift(self.num_steps, self.size),
        )

    @torch.no_grad()
    def trajectory(
        self, model: Model, cond: Conditioning, generators: list[torch.Generator]
    ) -> tuple[Trajectory, Tensor]:
        """As ``__call__``, with the intermediate latents.  Raises ValueError if the solver is not
        stochastic.
        """
        sigmas = model.sigmas(self.num_steps, self.size)
        trajectory = sample_trajectory(
            self.solver,
            guided_velocity(model, cond, self.guidance_scale),
            self._start(model, generators),
            sigmas,
            noise_level=self.noise_level,
            generator=generators,
        )
        return trajectory, sigmas[:-1]

    def _start(self, model: Model, generators: list[torch.Generator]) -> Tensor:
        noise = normal(model.latent_shape(self.size), generators)
        return to_device(noise, model.device).to(model.precision.trained_dtype)


def guided_velocity(
    model: Model, cond: Conditioning, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """``velocity(x, sigma)`` of ``model`` at classifier-free guidance ``scale`` (1: none)."""
    if scale == 1:
        return lambda x, sigma: model.velocity(x, sigma, cond.prompt)
    assert cond.negative is not None
    both = stack([cond.negative, cond.prompt])

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        v = model.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both)
        without, with_prompt = v.chunk(2)
        return model.guided(without, with_prompt, scale)

    return guided
