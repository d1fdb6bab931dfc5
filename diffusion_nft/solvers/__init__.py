"""Solvers: from noise to a clean latent, with any velocity function.

``solve`` takes a name of the configuration: one of ``SOLVERS``, or the class name of a diffusers
scheduler for flow sigmas; ``check_solver`` validates the name without a model.  Policy gradients
also use ``sample_trajectory``, ``sde_step`` and ``log_prob`` of the stochastic solvers.
"""

from functools import partial

from torch import Tensor

from diffusion_nft.solvers.common import Generators, Solver, Velocity
from diffusion_nft.solvers.diffusers_scheduler import (
    SCHEDULER_EXAMPLES,
    check_scheduler,
    solve_with_scheduler,
)
from diffusion_nft.solvers.ode import dpm, heun
from diffusion_nft.solvers.sde import (
    SDE_RULES,
    Trajectory,
    check_noise_level,
    integrate,
    log_prob,
    sample_trajectory,
    sde_step,
)

__all__ = [
    "SOLVERS",
    "STOCHASTIC_SOLVERS",
    "Trajectory",
    "check_solver",
    "log_prob",
    "sample_trajectory",
    "sde_step",
    "solve",
]

SOLVERS: dict[str, Solver] = {
    **{name: partial(integrate, name) for name in SDE_RULES},
    "dpm1": partial(dpm, order=1),
    "dpm2": partial(dpm, order=2),
    "heun": heun,
}
STOCHASTIC_SOLVERS = frozenset(SDE_RULES)


def check_solver(name: str, noise_level: float = 0.0) -> None:
    """Raises ValueError if ``solve`` does not support ``name`` or its ``noise_level``."""
    if name in STOCHASTIC_SOLVERS:
        check_noise_level(name, noise_level)
    elif name not in SOLVERS:
        if not name.endswith("Scheduler"):
            raise ValueError(
                f"solver '{name}' is unknown; choose from {', '.join(SOLVERS)}, or the class name "
                f"of a diffusers scheduler for flow sigmas ({', '.join(SCHEDULER_EXAMPLES)}, ...)"
            )
        check_scheduler(name)


def solve(
    name: str,
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    *,
    generator: Generators = None,
    noise_level: float = 0.0,
    shift: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Solves from noise ``x: [B, C, h, w]``; returns clean latents and the sigmas visited.

    ``sigmas: [N+1]``, decreasing from 1 to 0.  Solvers of ``SOLVERS`` visit ``sigmas[:-1]``; a
    diffusers scheduler makes N steps on its own grid, which depends on ``shift``.  ``noise_level``:
    for ``STOCHASTIC_SOLVERS``, ignored by others.
    """
    if name in SOLVERS:
        x0 = SOLVERS[name](velocity, x, sigmas, generator=generator, noise_level=noise_level)
        return x0, sigmas[:-1]
    if not name.endswith("Scheduler"):
        check_solver(name)
    if shift is None:
        raise ValueError(f"solver '{name}' has its own sigmas and needs the model's shift")
    num_steps = len(sigmas) - 1
    return solve_with_scheduler(name, velocity, x, num_steps, shift=shift, generator=generator)
