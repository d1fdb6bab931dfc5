"""diffusers schedulers for flow sigmas, by class name: the paper's "black-box solvers".

A scheduler has its own grid of sigmas; those visited are returned for training.  The velocity is
evaluated at the scheduler's float sigmas, because some schedulers round timesteps to integers.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from diffusion_nft.flow import expand, x0_from_velocity
from diffusion_nft.solvers.common import Generators, Velocity, at_least_float32, batch_sigma

SCHEDULER_EXAMPLES = (
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
)


def solve_with_scheduler(
    name: str,
    velocity: Velocity,
    x: Tensor,
    num_steps: int,
    *,
    shift: float,
    generator: Generators = None,
) -> tuple[Tensor, Tensor]:
    """Runs scheduler ``name`` from noise ``x: [B, C, h, w]`` on its own grid of ``num_steps``.

    Returns x0 and the distinct sigmas at which the velocity was evaluated: ``[K]``, decreasing,
    non-zero, float32 on the CPU.  Multi-stage schedulers need more than ``num_steps`` evaluations.
    """
    x = at_least_float32(x)
    scheduler = build_scheduler(name, shift)
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)  # avoids the lookup of timesteps, which may repeat when rounded
    stochastic = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if stochastic else {}

    sigmas = scheduler.sigmas.tolist()
    last = len(scheduler.timesteps) - 1
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = batch_sigma(sigmas[i], x)
        v = velocity(x, sigma).to(x.dtype)
        if i == last and sigmas[-1] > 0:
            # DEIS and SA-Solver repeat the last sigma: their last step would not remove its noise.
            x = x0_from_velocity(x, v, sigma)
        else:
            x = scheduler.step(v, timestep, x, return_dict=False, **options)[0]
    visited = dict.fromkeys(sigmas[: last + 1])
    return x, torch.tensor(list(visited), dtype=torch.float32)


def build_scheduler(name: str, shift: float) -> Any:
    """The diffusers scheduler ``name``, configured for flow matching with ``shift``.  Raises
    ValueError if it does not support that.
    """
    from diffusers import schedulers  # a local import, because it takes seconds

    if name not in dir(schedulers):
        raise ValueError(f"solver '{name}' is not a scheduler of the installed diffusers")
    scheduler = getattr(schedulers, name)
    parameters = inspect.signature(scheduler.__init__).parameters
    forward = "Inverse" not in name  # inverse schedulers solve from images to noise
    if forward and {"use_flow_sigmas", "flow_shift", "prediction_type"} <= parameters.keys():
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        return scheduler(**options, flow_shift=shift, lower_order_final=True)
    if name.startswith("FlowMatch") and "shift" in parameters:
        return scheduler(shift=shift)
    raise ValueError(f"solver '{name}' is a diffusers scheduler that does not take flow sigmas")


def check_scheduler(name: str) -> None:
    """Raises ValueError unless scheduler ``name`` samples a flow; needs no model.

    For data ~ N(1/2, 1/4), whose velocity is known, 20 steps must result in about that mean and
    standard deviation.  FlowMatchLCMScheduler, made for consistency models, fails.
    """
    mean, std = 0.5, 0.5

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        s = expand(sigma, x)
        slope = (s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2)
        return slope * (x - (1 - s) * mean) - mean

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 64, 64, generator=generator)
    x0, _ = solve_with_scheduler(name, velocity, x, 20, shift=1.0, generator=generator)
    if not (abs(x0.mean() - mean) < 0.1 * std and abs(x0.std() - std) < 0.1 * std):
        raise ValueError(f"solver '{name}' is a diffusers scheduler that does not sample a flow")
