"""The policies: one frozen base transformer and LoRA adapters on it.

``current`` is trained, ``old`` samples, ``ema`` is evaluated and exported; the reference policy is
the base without LoRA.  Exactly one is active at a time; ``with policy.use_adapter("old"): ...``
switches and restores.

The two low-rank products of an adapter are slow for their FLOPs.  Adapters that are not trained are
therefore merged with the base into separate weights, unless this would lose precision; the weights
of the base are never written to.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from diffusion_nft.models.lora import Lora, check_modules, scaled
from diffusion_nft.models.precision import resolves_lora_updates
from diffusion_nft.randomness import generator

ADAPTERS = ("current", "old", "ema")
REFERENCE = "reference"


class LoraLinear(lora.Linear):
    """``x -> W x + b + scaling B A x``, or ``merged_weight x + b``.

    PEFT's forward converts ``x`` to the adapter's dtype and, under autocast, back; it scales and
    adds ``B A x`` in two more passes over memory.  On a GPU each takes about as long as ``W x``.
    Here the kernel of the second product scales and adds.
    """

    base_layer: nn.Linear
    # W + scaling B A while a merged adapter is active.
    merged_weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x: [..., in] -> [..., out]``."""
        if self.merged_weight is not None:
            return F.linear(x, self.merged_weight, self.base_layer.bias)
        y = self.base_layer(x)
        if self._disable_adapters:
            return y
        (name,) = self._active_adapter
        a, b, scaling = self._factors(name)
        low = F.linear(x, a.to(x.dtype)).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), low, b.t().to(y.dtype), alpha=scaling).view_as(y)

    def _factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        a = self.get_parameter(f"lora_A.{name}.weight")
        b = self.get_parameter(f"lora_B.{name}.weight")
        return a, b, self.scaling[name]

    @torch.no_grad()
    def merge_weight(self, name: str) -> Tensor:
        """``W + scaling B A`` of adapter ``name``, in the adapter's dtype."""
        a, b, scaling = self._factors(name)
        return torch.addmm(self.base_layer.weight, b, a, alpha=scaling)


class Policy:
    """LoRA adapters on ``transformer``, which is changed in place and otherwise frozen.

    ``targets``: names, or ends of names, of the linear layers with LoRA.  ``seed``: of the initial
    A matrices (Gaussian, std 1/rank; B is zero), which are equal on every rank.  ``dtype``: of the
    trained weights.  Raises ValueError if the transformer lacks a target.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        targets: Iterable[str],
        rank: int,
        alpha: int,
        seed: int,
        dtype: torch.dtype,
    ):
        targets = list(targets)
        check_modules(transformer, targets)
        self.rank, self.scaling = rank, alpha / rank
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
        config._register_custom_module({nn.Linear: LoraLinear})
        with warnings.catch_warnings():
            # PEFT warns of a second adapter on one model, which is intended here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            for name in ADAPTERS:
                transformer.add_adapter(config, adapter_name=name)  # pyright: ignore[reportCallIssue]
        self._layers = {
            name: module
            for name, module in transformer.named_modules()
            if isinstance(module, LoraLinear)
        }
        for layer in self._layers.values():
            for name in ADAPTERS:
                layer.lora_A[name].to(dtype)
                layer.lora_B[name].to(dtype)
        self._weights = {name: self._collect(name) for name in ADAPTERS}
        for name in ADAPTERS:
            for weight in self.parameters(name):
                weight.requires_grad_(name == "current")
        weights = [layer.base_layer.weight for layer in self._layers.values()]
        self._merges = all(resolves_lora_updates(weight, dtype) for weight in weights)
        # One adapter at a time: its name, the versions of its weights, the merged weights.
        self._merged: tuple[tuple[str, list[int]], list[Tensor]] | None = None
        self._activate("current")
        self.load("current", self._initial_state(seed, rank))

    def _collect(self, adapter: str) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{matrix}.weight": getattr(layer, matrix)[adapter].weight
            for name, layer in self._layers.items()
            for matrix in ("lora_A", "lora_B")
        }

    def _initial_state(self, seed: int, rank: int) -> dict[str, Tensor]:
        return {
            key: torch.randn(weight.shape, generator=generator(seed, "lora", key)) / rank
            if ".lora_A." in key
            else torch.zeros(weight.shape)
            for key, weight in self._weights["current"].items()
        }

    @property
    def active(self) -> str:
        """Name of the active policy."""
        return self._active

    def parameters(self, name: str = "current") -> list[nn.Parameter]:
        return list(self._weights[name].values())

    def state(self, name: str) -> dict[str, Tensor]:
        """``{"<module>.lora_A.weight": ...}`` of adapter ``name``: detached views, not copies."""
        return {key: weight.detach() for key, weight in self._weights[name].items()}

    @torch.no_grad()
    def load(self, name: str, state: dict[str, Tensor], *, others: bool = True) -> None:
        """Sets adapter ``name`` (and, if ``others``, every adapter) to ``state``.

        Raises ValueError if the keys or shapes of ``state`` differ from the adapter's.
        """
        weights = self._weights[name]
        wrong = sorted(
            key
            for key in weights.keys() | state.keys()
            if key not in weights or key not in state or weights[key].shape != state[key].shape
        )
        if wrong:
            raise ValueError(
                f"LoRA does not fit this model and rank; {len(wrong)} weights are missing, "
                f"unexpected or misshapen, such as {', '.join(wrong[:3])}"
            )
        for adapter in ADAPTERS if others else (name,):
            for key, weight in self._weights[adapter].items():
                weight.copy_(state[key])
        self._activate(self._active)

    def load_lora(self, lora: Lora) -> None:
        """Sets every adapter to ``lora``.  Raises ValueError if its modules or rank differ."""
        self.load("current", scaled(lora.state, 1 / self.scaling))

    def lora(self, name: str, base_model: str) -> Lora:
        """Adapter ``name`` as a LoRA with ``alpha = rank``."""
        return Lora(scaled(self.state(name), self.scaling), base_model)

    @torch.no_grad()
    def ema_update(self, name: str, decay: float) -> None:
        """``name <- decay name + (1 - decay) current``."""
        own = [weight.detach() for weight in self.parameters(name)]
        current = [weight.detach() for weight in self.parameters("current")]
        torch._foreach_lerp_(own, current, 1 - decay)
        self._activate(self._active)

    def _activate(self, name: str) -> None:
        # PEFT's set_adapter also sets requires_grad of every parameter, which is slower than a
        # small forward.  Here only "current" ever requires a gradient.
        merged = self._merged_weights(name) if self._merges and name in ("old", "ema") else None
        for i, layer in enumerate(self._layers.values()):
            layer.merged_weight = merged[i] if merged else None
            layer._disable_adapters = name == REFERENCE
            if name != REFERENCE:
                layer._active_adapter = [name]
        self._active = name

    def _merged_weights(self, name: str) -> list[Tensor]:
        """One per layer, of adapter ``name``; recomputed if its weights have changed."""
        # Every in-place write to a tensor increments its version.
        state = name, [weight._version for weight in self.parameters(name)]
        if self._merged is None or self._merged[0] != state:
            self._merged = None  # frees the memory before the next allocation
            self._merged = state, [layer.merge_weight(name) for layer in self._layers.values()]
        return self._merged[1]

    @contextmanager
    def use_adapter(self, name: str) -> Iterator[None]:
        """Runs the block with policy ``name``: ``current``, ``old``, ``ema`` or ``reference``."""
        before = self._active
        if name != before:
            self._activate(name)
        try:
            yield
        finally:
            if self._active != before:
                self._activate(before)


def lora_layers(model: Any, targets: str | Sequence[str]) -> list[str]:
    """Names of the linear layers with LoRA.  ``targets``: a key of ``model.lora_targets``, a
    regular expression of whole names, or ends of names.

    Raises ValueError if one of them matches no layer.
    """
    layers = (nn.Linear, LoraLinear)
    names = [
        name
        for name, module in model.transformer.named_modules()
        # Of a layer that has a LoRA already, the layer rather than its parts.
        if isinstance(module, layers) and ".base_layer" not in name and ".lora_" not in name
    ]
    if isinstance(targets, str):
        patterns = {targets: model.lora_targets.get(targets, targets)}
    else:
        patterns = {end: rf"(.*\.)?{re.escape(end)}" for end in targets}
    found: dict[str, None] = {}
    for target, pattern in patterns.items():
        matching = [name for name in names if re.fullmatch(pattern, name)]
        if not matching:
            raise ValueError(
                f"train.lora_targets: {target!r} matches no linear layer of {model.name} (one is "
                f"{names[len(names) // 2]}); choose from {', '.join(model.lora_targets)}, a tuple "
                "of ends of names, or a regular expression of whole names"
            )
        found |= dict.fromkeys(matching)
    return list(found)


def unusual_modules(model: Any, modules: Iterable[str], targets: str | Sequence[str]) -> str:
    """Differences between ``modules`` and the layers of ``targets``; "" if none."""
    usual, own = set(lora_layers(model, targets)), set(modules)
    return ", ".join(
        f"{len(found)} {what} ({min(found)}{', ...' if len(found) > 1 else ''})"
        for what, found in (("more", own - usual), ("fewer", usual - own))
        if found
    )


def policy_of_lora(model: Any, lora: Lora) -> Policy:
    """A policy on ``model``'s transformer, with the modules, rank and weights of ``lora``, active.

    Raises ValueError if it does not fit.
    """
    policy = Policy(
        model.transformer,
        targets=lora.modules,
        rank=lora.rank,
        alpha=lora.rank,
        seed=0,  # the initial weights are replaced
        dtype=model.precision.trained_dtype,
    )
    policy.load_lora(lora)
    # All adapters are equal; "ema" may be merged, as in evaluations during training.  Not under
    # autocast of float32 weights (``match_published``), which would round the merged weights.
    if model.precision.compute_dtype == model.precision.trained_dtype:
        policy._activate("ema")
    return policy
