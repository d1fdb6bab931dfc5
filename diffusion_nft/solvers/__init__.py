"""Solvers: from noise to a clean latent, over any velocity function.

`solve` is the entry for a name from a config: one of `SOLVERS`, or the class name of a diffusers
scheduler that takes flow sigmas.  `check_solver` validates such a name without any model.  Policy
gradients also need `sample_trajectory`, `sde_step` and `log_prob` of the stochastic solvers.
"""

from torch import Tensor

from diffusion_nft.solvers.common import Generators, Solver, Velocity
from diffusion_nft.solvers.diffusers_scheduler import (
    SCHEDULER_EXAMPLES,
    check_scheduler,
    solve_with_scheduler,
)
from diffusion_nft.solvers.ode import dpm1, dpm2, heun
from diffusion_nft.solvers.sde import (
    SDE_RULES,
    Trajectory,
    check_noise_level,
    dance,
    ddim,
    draw_noise,
    flow,
    log_prob,
    sample_trajectory,
    sde_step,
)

__all__ = [
    "SOLVERS",
    "STOCHASTIC_SOLVERS",
    "Generators",
    "Solver",
    "Trajectory",
    "Velocity",
    "check_solver",
    "draw_noise",
    "log_prob",
    "sample_trajectory",
    "sde_step",
    "solve",
]

SOLVERS: dict[str, Solver] = {
    "flow": flow,
    "dance": dance,
    "ddim": ddim,
    "dpm1": dpm1,
    "dpm2": dpm2,
    "heun": heun,
}
STOCHASTIC_SOLVERS = frozenset(SDE_RULES)


def check_solver(name: str, noise_level: float = 0.0) -> None:
    """Raise a one-line ValueError unless `solve` can run ``name`` at ``noise_level``."""
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
    """Carry noise ``x: [B, C, h, w]`` to a clean latent; also return the sigmas visited.

    ``sigmas: [N+1]`` decrease from 1 to 0.  A solver of `SOLVERS` visits ``sigmas[:-1]``; a
    diffusers scheduler takes from them only the number of steps N, lays its own grid with
    ``shift`` and visits that.  ``noise_level`` matters to `STOCHASTIC_SOLVERS` alone.
    """
    if name in SOLVERS:
        x0 = SOLVERS[name](velocity, x, sigmas, generator=generator, noise_level=noise_level)
        return x0, sigmas[:-1]
    if not name.endswith("Scheduler"):
        check_solver(name)
    if shift is None:
        raise ValueError(f"solver '{name}' lays its own sigmas and needs the model's shift")
    num_steps = len(sigmas) - 1
    return solve_with_scheduler(name, velocity, x, num_steps, shift=shift, generator=generator)
