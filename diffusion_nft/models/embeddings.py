"""Prompt embeddings and their cache."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_nft.utils.devices import to_device


@dataclass(frozen=True)
class PromptEmbeds:
    """Embeddings of B prompts.

    ``prompt_embeds: [B, L, D]``: rows of fewer than L tokens end in zeros.  ``lengths``: their B
    numbers of tokens.  ``pooled: [B, P]``; P is 0 for models without.
    """

    prompt_embeds: Tensor
    lengths: tuple[int, ...]
    pooled: Tensor

    @classmethod
    def of_text(cls, prompt_embeds: Tensor, pooled: Tensor | None = None) -> "PromptEmbeds":
        """One prompt, ``prompt_embeds: [1, L, D]``, in host memory."""
        pooled = prompt_embeds.new_zeros(1, 0) if pooled is None else pooled
        return cls(prompt_embeds.cpu(), (prompt_embeds.shape[1],), pooled.cpu())

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return self.prompt_embeds.nbytes + self.pooled.nbytes

    @cached_property
    def mask(self) -> Tensor | None:
        """``[B, L]``, True for tokens and False for padding; None without padding."""
        longest = self.prompt_embeds.shape[1]
        if all(length == longest for length in self.lengths):
            return None
        tokens = torch.arange(longest) < torch.tensor(self.lengths)[:, None]
        return to_device(tokens, self.prompt_embeds.device)

    def to(self, device: torch.device) -> "PromptEmbeds":
        embeds, pooled = (to_device(t, device) for t in (self.prompt_embeds, self.pooled))
        return PromptEmbeds(embeds, self.lengths, pooled)

    def select(self, rows: Sequence[int]) -> "PromptEmbeds":
        """Rows by index, possibly repeated."""
        lengths = tuple(self.lengths[row] for row in rows)
        there = to_device(torch.tensor(rows, dtype=torch.long), self.prompt_embeds.device)
        longest = max(lengths, default=0)
        return PromptEmbeds(self.prompt_embeds[:, :longest][there], lengths, self.pooled[there])


def stack(items: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """Concatenates ``items``, possibly none, along the batch."""
    if not items:
        return PromptEmbeds(torch.zeros(0, 0, 0), (), torch.zeros(0, 0))
    longest = max(item.prompt_embeds.shape[1] for item in items)
    padded = (F.pad(e, (0, 0, 0, longest - e.shape[1])) for e in (i.prompt_embeds for i in items))
    return PromptEmbeds(
        torch.cat(list(padded)),
        tuple(chain.from_iterable(item.lengths for item in items)),
        torch.cat([item.pooled for item in items]),
    )


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of B prompts and, for classifier-free guidance, of their negative prompts."""

    prompt: PromptEmbeds
    negative: PromptEmbeds | None = None

    def _map(self, function: Callable[[PromptEmbeds], PromptEmbeds]) -> "Conditioning":
        negative = None if self.negative is None else function(self.negative)
        return Conditioning(function(self.prompt), negative)

    def to(self, device: torch.device) -> "Conditioning":
        return self._map(lambda embeds: embeds.to(device))

    def select(self, rows: Sequence[int]) -> "Conditioning":
        """As ``PromptEmbeds.select``."""
        return self._map(lambda embeds: embeds.select(rows))


class EmbeddingCache:
    """Least-recently-used cache in host memory of at most ``budget_bytes``: text -> PromptEmbeds of
    one row.

    ``encode`` must encode each text alone: its embedding is then bitwise independent of the others,
    and a resumed run reproduces an uninterrupted one.
    """

    def __init__(self, encode: Callable[[list[str]], list[PromptEmbeds]], budget_bytes: float):
        self._encode = encode
        self._budget = budget_bytes
        self._bytes = 0
        self._items: OrderedDict[str, PromptEmbeds] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> PromptEmbeds:
        """One row per text, in order; each unique text that is not cached is encoded once."""
        unique = dict.fromkeys(texts)
        missing = [text for text in unique if text not in self._items]
        found = {text: self._items[text] for text in unique if text in self._items}
        if missing:
            found |= zip(missing, self._encode(missing), strict=True)
        for text in unique:
            self._remember(text, found[text])
        return stack([found[text] for text in texts])

    def _remember(self, text: str, item: PromptEmbeds) -> None:
        if text not in self._items:
            self._bytes += item.nbytes
        self._items[text] = item
        self._items.move_to_end(text)
        while self._bytes > self._budget and self._items:
            _, dropped = self._items.popitem(last=False)
            self._bytes -= dropped.nbytes
