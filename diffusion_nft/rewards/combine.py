"""Several rewards as one: the weighted sum, and every reward's own scores and components."""

import math
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


# Their squares are summed in standard deviations and errors.
LARGEST_SCORE = 1e100


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
    share them.  ``options``: what rewards of this process were built with, by name; half-made
    evaluations are recognised by it.

    Pictures are rounded to 8 bits a channel before any reward sees them.  What is scored is then
    what is saved as PNG or sent to a server, and a score does not depend on where or when it is
    made.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        rewards: Mapping[str, Reward],
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        self.weights, self.options = dict(weights), options or {}
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
        own = {k: v for k, v in (options or {}).items() if k in weights and k not in (remote or {})}
        return cls(weights, rewards, own)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Scores:
        """Scores ``images: [B, 3, H, W]`` in [0, 1], on any device.

        Raises RewardError, naming the reward, if one raises or returns anything but B scores and
        components of B numbers within LARGEST_SCORE, NaN among the components'; also if the
        weighted sum is beyond it.
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
            parts |= _checked(name, output, len(prompts))
            total += self.weights[name] * parts[name]
        if not (total.abs() <= LARGEST_SCORE).all():
            wrong = _first(total, ~(total.abs() <= LARGEST_SCORE))
            raise RewardError(f"the weighted sum of the rewards {self.weights} is {wrong}")
        return Scores(total, parts)


def _first(values: Tensor, wrong: Tensor) -> str:
    """The first of ``values: [B]`` where ``wrong: [B]`` holds, in words."""
    row = int(wrong.nonzero()[0])
    value = float(values[row])
    complaint = f"beyond ±{LARGEST_SCORE:g}" if math.isfinite(value) else "not finite"
    return f"{value} for picture {row}, which is {complaint}"


def _checked(name: str, output: object, count: int) -> dict[str, Tensor]:
    """Scores and components of ``output``, which the reward ``name`` returned for ``count``
    pictures, as ``Scores.parts`` holds them.
    """
    if not isinstance(output, RewardOutput):
        raise RewardError(f"reward {name!r} returned {type(output).__name__}, no RewardOutput")
    if not isinstance(output.components, Mapping):
        kind = type(output.components).__name__
        raise RewardError(f"reward {name!r} returned components as {kind}, no mapping")
    values = {name: output.scores}
    values |= {f"{name}/{key}": value for key, value in output.components.items()}
    checked: dict[str, Tensor] = {}
    for key, value in values.items():
        if not isinstance(value, Tensor) or value.is_complex():
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise RewardError(f"reward {key!r} returned {kind}, no tensor of real numbers")
        if value.shape != (count,):
            raise RewardError(
                f"reward {key!r} returned shape {tuple(value.shape)} for {count} pictures"
            )
        checked[key] = value.detach().to("cpu", torch.float64)
        # NaN in a component: it does not apply to this picture.
        valid = checked[key].abs() <= LARGEST_SCORE
        if key != name:
            valid |= checked[key].isnan()
        if not valid.all():
            raise RewardError(f"reward {key!r} returned {_first(checked[key], ~valid)}")
    return checked
