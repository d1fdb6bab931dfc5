"""Several rewards as one: the weighted sum, and every reward's own scores and components."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from diffusion_nft.pictures import to_uint8
from diffusion_nft.rewards import REMOTE_TIMEOUT, Reward, RewardOutput, build_reward

# The value of each of the 256 levels.  Divided on the CPU: CUDA multiplies by 1/255 instead, which
# is another float for some of them.
LEVELS = torch.arange(256, dtype=torch.float32) / 255


class RewardError(RuntimeError):
    """A reward failed or returned something that is no score."""


@dataclass(frozen=True)
class Scores:
    """Of B pictures: ``total: [B]``, the weighted sum, and ``parts``: every reward's scores and
    components (``name`` and ``name/component``) ``[B]``; float64 on the CPU."""

    total: Tensor
    parts: dict[str, Tensor]

    @staticmethod
    def concatenate(items: "list[Scores]") -> "Scores":
        """Scores of consecutive batches as one; no items give no rows."""
        if not items:
            return Scores(torch.zeros(0, dtype=torch.float64), {})
        names = {frozenset(item.parts) for item in items}
        if len(names) > 1:
            raise RewardError(f"components differ between batches: {sorted(map(sorted, names))}")
        parts = {key: torch.cat([item.parts[key] for item in items]) for key in items[0].parts}
        return Scores(torch.cat([item.total for item in items]), parts)


def build_rewards(
    names: Iterable[str],
    device: torch.device,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    remote: Mapping[str, Sequence[str]] | None = None,
    timeout: float = REMOTE_TIMEOUT,
) -> dict[str, Reward]:
    """The rewards ``names``, each built once, by name: served where ``remote`` has addresses for
    it, else in this process with its ``options``.  Raises what ``build_reward`` raises.
    """
    options, remote = options or {}, remote or {}
    return {
        name: build_reward(name, device, options.get(name), remote.get(name, ()), timeout=timeout)
        for name in dict.fromkeys(names)
    }


def quantized(images: Tensor) -> Tensor:
    """``images``, clamped to [0, 1] and rounded to 8 bits a channel: the float32 values k/255 that
    the same pictures have after a PNG, on the same device.
    """
    return LEVELS.to(images.device)[to_uint8(images).int()]


class RewardSet:
    """The weighted sum of ``rewards``, and the scores of each.

    ``weights``: reward name -> weight; 0 holds a reward out: it is scored and logged, and is no
    part of the total.  ``rewards`` may hold more than the weights name: sets of different weights
    share them.

    Pictures are rounded to 8 bits a channel before any reward sees them.  What is scored is then
    what is saved as PNG or sent to a server, and a score does not depend on where or when it is
    made.
    """

    def __init__(self, weights: Mapping[str, float], rewards: Mapping[str, Reward]):
        self.weights = dict(weights)
        self._rewards = {name: rewards[name] for name in self.weights}

    @classmethod
    def build(
        cls,
        weights: Mapping[str, float],
        device: torch.device,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        remote: Mapping[str, Sequence[str]] | None = None,
        timeout: float = REMOTE_TIMEOUT,
    ) -> Self:
        """A set of its own rewards; the arguments are those of ``build_rewards``."""
        rewards = build_rewards(weights, device, options=options, remote=remote, timeout=timeout)
        return cls(weights, rewards)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Scores:
        """Scores ``images: [B, 3, H, W]`` in [0, 1], on any device.

        Raises RewardError, naming the reward, if one raises, returns another number of scores than
        B, or a score that is not finite.
        """
        images = quantized(images)
        total = torch.zeros(len(prompts), dtype=torch.float64)
        parts: dict[str, Tensor] = {}
        for name, reward in self._rewards.items():
            try:
                output = reward(images, prompts, metadata)
            except Exception as error:
                raise RewardError(
                    f"reward {name!r} failed: {type(error).__name__}: {error}"
                ) from error
            if not isinstance(output, RewardOutput):
                raise RewardError(
                    f"reward {name!r} returned {type(output).__name__}, no RewardOutput"
                )
            values = {name: output.scores}
            values |= {f"{name}/{key}": value for key, value in output.components.items()}
            for key, value in values.items():
                if value.shape != (len(prompts),):
                    raise RewardError(
                        f"reward {key!r} returned shape {tuple(value.shape)} "
                        f"for {len(prompts)} pictures"
                    )
                parts[key] = value.detach().to("cpu", torch.float64)
            if not parts[name].isfinite().all():
                raise RewardError(
                    f"reward {name!r} returned scores that are not finite: {parts[name]}"
                )
            total += self.weights[name] * parts[name]
        return Scores(total, parts)
