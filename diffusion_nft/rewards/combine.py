"""Weighted sum of several rewards, with the scores and components of each."""

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

# Larger scores would overflow where squares are summed (standard deviations, errors).
MAX_SCORE_MAGNITUDE = 1e100
# Errors of a reward's environment, not of single images.
ENVIRONMENT_ERRORS = (OSError, ImportError, MemoryError, torch.OutOfMemoryError)
# Images without a score that an error names.
MAX_NAMED = 3


class RewardError(RuntimeError):
    """A reward failed or returned invalid scores."""


class UnscoredError(RewardError):
    """More than ``max_unscored`` images have no score."""


@dataclass(frozen=True)
class Scores:
    """Scores of B images, float64 on the CPU.

    ``total: [B]``: the weighted sum, NaN for an image without a score.  ``parts``: scores and
    components ``[B]`` of every reward, named ``name`` and ``name/component``.  ``reasons``: by row,
    why an image has no score.
    """

    total: Tensor
    parts: dict[str, Tensor]
    reasons: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def concatenate(items: "list[Scores]") -> "Scores":
        """Joins the scores of consecutive batches."""
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
        """Raises UnscoredError if more than ``limit`` images have no score."""
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
    """Builds each of the rewards ``names`` once: as a client of its ``reward_servers``, if any,
    else in this process with its ``options`` (both by name).  Raises as ``build_reward``.
    """
    options, reward_servers = options or {}, reward_servers or {}
    return {
        name: build_reward(
            name, device, options.get(name), reward_servers.get(name, ()), timeout=timeout
        )
        for name in dict.fromkeys(names)
    }


class RewardSet:
    """Weighted sum of ``rewards``, with the scores of each.

    ``weights``: reward name -> weight; a reward of weight 0 is held out: scored and logged, but not
    part of the total.  ``rewards`` may have further entries, so that several sets can share them.
    ``options``: the options of local rewards, by name, which identify an unfinished evaluation.
    ``max_unscored``: number of images per call that may have no score, because they have NaN or
    infinite values or because a reward fails on them.

    Rewards receive float32 values of 8-bit images, the same that are saved as PNG or sent to a
    server, so that a score does not depend on where it is computed.
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
        """Builds the rewards, too; for the other arguments see ``build_rewards``."""
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
        """Scores B ``images`` on any device.  ``names``: names of the images, for errors.

        Raises RewardError if a reward raises, returns anything but B scores and components of B
        numbers each, or if a number or the weighted sum exceeds MAX_SCORE_MAGNITUDE.  Raises
        UnscoredError if more than ``max_unscored`` images have no score.
        """
        names = names or [f"image {row}" for row in range(len(prompts))]
        scores = Scores(torch.zeros(len(prompts), dtype=torch.float64), {})

        def leave_out(row: int, why: str) -> None:
            scores.total[row] = math.nan
            scores.reasons.setdefault(row, f"{names[row]} ({prompts[row]!r}): {why}")

        kept = []
        for row, finite in enumerate(images.finite.tolist()):
            if finite:
                kept.append(row)
            else:
                leave_out(row, "it has NaN or infinite values")
        scores.check_unscored(self.max_unscored)
        values = images[kept].to_float()
        batch = (values, [prompts[row] for row in kept], [metadata[row] for row in kept])
        for name, reward in self._rewards.items() if kept or not prompts else ():
            output = self._score(name, reward, *batch)
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
        # An image without a score is left out of the statistics of every reward.
        for column in scores.parts.values():
            column[scores.total.isnan()] = math.nan
        return scores

    def _score(
        self, name: str, reward: Reward, images: Tensor, prompts: list[str], metadata: list[dict]
    ) -> RewardOutput:
        call = partial(score_apart, reward) if self.max_unscored else reward
        try:
            return call(images, prompts, metadata)
        except Exception as error:
            raise RewardError(f"reward {name!r} failed: {type(error).__name__}: {error}") from error


def score_apart(
    reward: Reward, images: Tensor, prompts: list[str], metadata: list[dict]
) -> RewardOutput:
    """The output of ``reward``; if it raises, it is called per image, and images on which it raises
    have no score.

    Errors of the environment (ENVIRONMENT_ERRORS) are raised.
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
    """Describes the first of ``values: [B]`` where ``wrong: [B]`` is True."""
    row = int(wrong.nonzero()[0])
    value = float(values[row])
    complaint = f"beyond ±{MAX_SCORE_MAGNITUDE:g}" if math.isfinite(value) else "not finite"
    return f"{value} for image {row}, which is {complaint}"


def _checked(name: str, output: object, count: int) -> dict[str, Tensor]:
    """Scores and components of the reward ``name`` for ``count`` images, as in ``Scores.parts``."""
    if not isinstance(output, RewardOutput):
        raise RewardError(f"reward {name!r} returned {type(output).__name__}, not a RewardOutput")
    for key in ("components", "reasons"):
        if not isinstance(value := getattr(output, key), Mapping):
            kind = type(value).__name__
            raise RewardError(f"reward {name!r} returned {key} as {kind}, not as a mapping")
    values = {name: output.scores}
    values |= {f"{name}/{key}": value for key, value in output.components.items()}
    checked: dict[str, Tensor] = {}
    for key, value in values.items():
        if not isinstance(value, Tensor) or value.is_complex():
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise RewardError(f"reward {key!r} returned {kind}, not a tensor of real numbers")
        if value.shape != (count,):
            raise RewardError(
                f"reward {key!r} returned shape {tuple(value.shape)} for {count} images"
            )
        checked[key] = value.detach().to("cpu", torch.float64)
        if (wrong := checked[key].abs() > MAX_SCORE_MAGNITUDE).any():
            raise RewardError(f"reward {key!r} returned {_first(checked[key], wrong)}")
    return checked
