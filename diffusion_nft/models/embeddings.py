"""Prompt embeddings and their cache."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings: ``prompt_embeds: [B, L, D]``, ``pooled_prompt_embeds: [B, P]``."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor

    @property
    def nbytes(self) -> int:
        return self.prompt_embeds.nbytes + self.pooled_prompt_embeds.nbytes

    def to(self, device: torch.device) -> "Conditioning":
        return Conditioning(self.prompt_embeds.to(device), self.pooled_prompt_embeds.to(device))

    def select(self, rows: Tensor) -> "Conditioning":
        """Rows by index, ``rows: [M]``, possibly repeated."""
        return Conditioning(self.prompt_embeds[rows], self.pooled_prompt_embeds[rows])


def stack(items: Sequence[Conditioning]) -> Conditioning:
    """Concatenates ``items``, possibly none, along the batch."""
    if not items:
        return Conditioning(torch.zeros(0, 0, 0), torch.zeros(0, 0))
    return Conditioning(
        torch.cat([c.prompt_embeds for c in items]),
        torch.cat([c.pooled_prompt_embeds for c in items]),
    )


class EmbeddingCache:
    """Least-recently-used cache in host memory of at most ``budget_bytes``: text -> Conditioning of
    one row.

    ``encode`` must encode each text alone: its embedding is then bitwise independent of the others,
    and a resumed run reproduces an uninterrupted one.
    """

    def __init__(self, encode: Callable[[list[str]], list[Conditioning]], budget_bytes: float):
        self._encode = encode
        self._budget = budget_bytes
        self._bytes = 0
        self._items: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """One row per text, in order; each unique text that is not cached is encoded once."""
        unique = dict.fromkeys(texts)
        missing = [text for text in unique if text not in self._items]
        found = {text: self._items[text] for text in unique if text in self._items}
        if missing:
            found |= zip(missing, self._encode(missing), strict=True)
        for text in unique:
            self._remember(text, found[text])
        return stack([found[text] for text in texts])

    def _remember(self, text: str, item: Conditioning) -> None:
        if text not in self._items:
            self._bytes += item.nbytes
        self._items[text] = item
        self._items.move_to_end(text)
        while self._bytes > self._budget and self._items:
            _, dropped = self._items.popitem(last=False)
            self._bytes -= dropped.nbytes
