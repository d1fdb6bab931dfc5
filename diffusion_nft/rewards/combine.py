"""Several rewards as one: the weighted sum, and every reward's own scores and components."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_nft.rewards import Reward, RewardOutput, build_reward


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


class RewardSet:
    """The rewards of a run, each built once: name -> weight."""

    def __init__(self, weights: Mapping[str, float], device: torch.device):
        self.weights = dict(weights)
        self._rewards: dict[str, Reward] = {
            name: build_reward(name, device) for name in self.weights
        }

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Scores:
        """Scores ``images: [B, 3, H, W]`` in [0, 1].

        Raises RewardError, naming the reward, if one raises, returns another number of scores than
        B, or a score that is not finite.
        """
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
