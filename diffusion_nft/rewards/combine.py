"""Several rewards as one: the weighted sum, and every reward's own scores and components."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice
from typing import Any, Self

import torch
from torch import Tensor

from diffusion_nft.images import Images
from diffusion_nft.rewards import REWARD_SERVER_TIMEOUT, Reward, RewardOutput, build_reward

# Their squares are summed in standard deviations and errors.
MAX_SCORE_MAGNITUDE = 1e100


# Failures of a reward's surroundings, which say nothing of single images.
ENVIRONMENT_ERRORS = (OSError, ImportError, MemoryError, torch.OutOfMemoryError)
# Images without a score that an error names.
MAX_NAMED = 3


class RewardError(RuntimeError):
    """A reward failed or returned something that is no score."""


class UnscoredError(RewardError):
    """More images have no score than ``max_unscored`` allows."""


@dataclass(frozen=True)
class Scores:
    """Of B images: ``total: [B]``, the weighted sum, and ``parts``: every reward's scores and
    components (``name`` and ``name/component``) ``[B]``; float64 on the CPU.

    A total of NaN: the image has no score; ``reasons`` says why, by row.
    """

    total: Tensor
    parts: dict[str, Tensor]
    reasons: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def concatenate(items: "list[Scores]") -> "Scores":
        """Scores of consecutive batches as one; no items give no rows."""
        if not items:
            return Scores(torch.zeros(0, dtype=torch.float64), {})
        # A batch without any score may lack the components.
        names = {frozenset(item.parts) for item in items if not item.total.isnan().all()}
        if len(names) > 1:
            raise RewardError(f"components differ between batches: {sorted(map(sorted, names))}")
        keys = dict.fromkeys(key for item in items for key in item.parts)
        parts = {
            key: torch.cat([item.parts.get(key, item.total * math.nan) for item in items])
            for key in keys
        }
        starts = accumulate((len(item.total) for item in items), initial=0)
        reasons = {
            start + row: reason
            for start, item in zip(starts, items, strict=False)
            for row, reason in item.reasons.items()
        }
        return Scores(torch.cat([item.total for item in items]), parts, reasons)

    def check_unscored(self, limit: int) -> None:
        """Raises UnscoredError, naming the first of them, if more than ``limit`` have no score."""
        if len(self.reasons) > limit:
            named = "; ".join(islice(self.reasons.values(), MAX_NAMED))
            raise UnscoredError(
                f"{len(self.reasons)} of {len(self.total)} images have no score, more than "
                f"max_unscored = {limit}: {named}"
            )


def build_rewards(
    names: Iterable[str],
    device: torch.device,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    reward_servers: Mapping[str, Sequence[str]] | None = None,
    timeout: float = REWARD_SERVER_TIMEOUT,
) -> dict[str, Reward]:
    """The rewards ``names``, each built once, by name: served where ``reward_servers`` has
    addresses for it, else in this process with its ``options``.  Raises what ``build_reward``
    raises.
    """
    options, reward_servers = options or {}, reward_servers or {}
    return {
        name: build_reward(
            name, device, options.get(name), reward_servers.get(name, ()), timeout=timeout
        )
        for name in dict.fromkeys(names)
    }


class RewardSet:
    """The weighted sum of ``rewards``, and the scores of each.

    ``weights``: reward name -> weight; 0 holds a reward out: it is scored and logged, and is no
    part of the total.  ``rewards`` may hold more than the weights name: sets of different weights
    share them.  ``options``: what rewards of this process were built with, by name; half-made
    evaluations are recognised by it.  ``max_unscored``: how many images of a call may have no
    score, because they have NaN or infinite values or because a reward fails on them.

    Rewards receive the float32 values of 8-bit images, which are also what is saved as PNG or sent
    to a server: a score does not depend on where or when it is computed.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        rewards: Mapping[str, Reward],
        options: Mapping[str, Mapping[str, Any]] | None = None,
        max_unscored: int = 0,
    ):
        self.weights, self.options = dict(weights), options or {}
        self.max_unscored = max_unscored
        self._rewards = {name: rewards[name] for name in self.weights}

    @classmethod
    def build(
        cls,
        weights: Mapping[str, float],
        device: torch.device,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        reward_servers: Mapping[str, Sequence[str]] | None = None,
        timeout: float = REWARD_SERVER_TIMEOUT,
        max_unscored: int = 0,
    ) -> Self:
        """A set of its own rewards; the other arguments are those of ``build_rewards``."""
        rewards = build_rewards(
            weights, device, options=options, reward_servers=reward_servers, timeout=timeout
        )
        own = {
            k: v
            for k, v in (options or {}).items()
            if k in weights and k not in (reward_servers or {})
        }
        return cls(weights, rewards, own, max_unscored)

    @torch.no_grad()
    def __call__(
        self,
        images: Images,
        prompts: list[str],
        metadata: list[dict],
        names: Sequence[str] | None = None,
    ) -> Scores:
        """Scores B ``images`` on any device.  ``names``: of the images, for errors.

        Raises RewardError, naming the reward, if one raises or returns anything but B scores and
        components of B numbers within MAX_SCORE_MAGNITUDE or NaN; also if the weighted sum is
        beyond it.  Raises UnscoredError if more than ``max_unscored`` images have no score.
        """
        names = names or [f"image {row}" for row in range(len(prompts))]
        scores = Scores(torch.zeros(len(prompts), dtype=torch.float64), {})

        def leave_out(row: int, why: str) -> None:
            scores.total[row] = math.nan
            scores.reasons.setdefault(row, f"{names[row]} ({prompts[row]!r}): {why}")

        valid = images.finite.tolist()
        for row in (row for row, sound in enumerate(valid) if not sound):
            leave_out(row, "it has NaN or infinite values")
        scores.check_unscored(self.max_unscored)
        if scores.reasons:  # the others alone are scored
            kept = [row for row, sound in enumerate(valid) if sound]
            images = images[kept]
            here, lines = [prompts[row] for row in kept], [metadata[row] for row in kept]
        else:
            kept, here, lines = [*range(len(prompts))], prompts, metadata
        values = images.to_float()
        for name, reward in self._rewards.items() if kept or not prompts else ():
            output = self._score(name, reward, values, here, lines)
            for key, column in _checked(name, output, len(kept)).items():
                scores.parts[key] = torch.full_like(scores.total, math.nan)
                scores.parts[key][kept] = column
            scores.total.add_(self.weights[name] * scores.parts[name])
            for i in output.scores.isnan().nonzero().flatten().tolist():
                leave_out(kept[i], f"reward {name!r} {output.reasons.get(i, 'returned NaN')}")
            scores.check_unscored(self.max_unscored)
        if (wrong := scores.total.abs() > MAX_SCORE_MAGNITUDE).any():
            raise RewardError(
                f"the weighted sum of the rewards {self.weights} is {_first(scores.total, wrong)}"
            )
        # An image that one reward could not score is out of the others' statistics, too.
        for column in scores.parts.values():
            column[scores.total.isnan()] = math.nan
        return scores

    def _score(
        self, name: str, reward: Reward, images: Tensor, prompts: list[str], metadata: list[dict]
    ) -> RewardOutput:
        """What ``reward`` returns; RewardError if it fails."""
        call = partial(score_apart, reward) if self.max_unscored else reward
        try:
            return call(images, prompts, metadata)
        except Exception as error:
            raise RewardError(f"reward {name!r} failed: {type(error).__name__}: {error}") from error


def score_apart(
    reward: Reward, images: Tensor, prompts: list[str], metadata: list[dict]
) -> RewardOutput:
    """What ``reward`` returns; if it raises, it is asked image by image, and those on which it
    raises have no score.

    Raises its error if that is not an image's (ENVIRONMENT_ERRORS).
    """
    try:
        return reward(images, prompts, metadata)
    except Exception as error:
        if isinstance(error, ENVIRONMENT_ERRORS):
            raise
        if len(prompts) == 1:
            missing = torch.full((1,), math.nan, dtype=torch.float64)
            return RewardOutput(missing, reasons={0: f"failed: {type(error).__name__}: {error}"})
    outputs = [
        score_apart(reward, images[row : row + 1], [prompt], [line])
        for row, (prompt, line) in enumerate(zip(prompts, metadata, strict=True))
    ]
    joined = Scores.concatenate(
        [
            Scores(o.scores.cpu(), {k: v.cpu() for k, v in o.components.items()}, o.reasons)
            for o in outputs
        ]
    )
    return RewardOutput(joined.total, joined.parts, joined.reasons)


def _first(values: Tensor, wrong: Tensor) -> str:
    """The first of ``values: [B]`` where ``wrong: [B]`` holds, in words."""
    row = int(wrong.nonzero()[0])
    value = float(values[row])
    complaint = f"beyond ±{MAX_SCORE_MAGNITUDE:g}" if math.isfinite(value) else "not finite"
    return f"{value} for image {row}, which is {complaint}"


def _checked(name: str, output: object, count: int) -> dict[str, Tensor]:
    """Scores and components of ``output``, which the reward ``name`` returned for ``count``
    images, as ``Scores.parts`` holds them.
    """
    if not isinstance(output, RewardOutput):
        raise RewardError(f"reward {name!r} returned {type(output).__name__}, no RewardOutput")
    if not isinstance(output.components, Mapping):
        kind = type(output.components).__name__
        raise RewardError(f"reward {name!r} returned components as {kind}, no mapping")
    if not isinstance(output.reasons, Mapping):
        kind = type(output.reasons).__name__
        raise RewardError(f"reward {name!r} returned reasons as {kind}, no mapping")
    values = {name: output.scores}
    values |= {f"{name}/{key}": value for key, value in output.components.items()}
    checked: dict[str, Tensor] = {}
    for key, value in values.items():
        if not isinstance(value, Tensor) or value.is_complex():
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise RewardError(f"reward {key!r} returned {kind}, no tensor of real numbers")
        if value.shape != (count,):
            raise RewardError(
                f"reward {key!r} returned shape {tuple(value.shape)} for {count} images"
            )
        checked[key] = value.detach().to("cpu", torch.float64)
        if (wrong := checked[key].abs() > MAX_SCORE_MAGNITUDE).any():
            raise RewardError(f"reward {key!r} returned {_first(checked[key], wrong)}")
    return checked
