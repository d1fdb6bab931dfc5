"""The embedding cache: each text once, least recently used out first, within its bytes."""

import torch

from diffusion_nft.models.embeddings import EmbeddingCache, PromptEmbeds, stack

ROW = PromptEmbeds.of_text(torch.zeros(1, 2, 3), torch.zeros(1, 4)).nbytes


class Encoder:
    def __init__(self):
        self.asked: list[list[str]] = []

    def __call__(self, texts):
        self.asked.append(list(texts))
        return [
            PromptEmbeds.of_text(
                torch.full((1, 2, 3), float(len(t))), torch.full((1, 4), float(ord(t[0])))
            )
            for t in texts
        ]


def test_each_unique_text_is_encoded_once_and_rows_are_in_order():
    encoder = Encoder()
    cache = EmbeddingCache(encoder, 1e9)
    found = cache(["bb", "a", "bb", "ccc"])
    assert found.prompt_embeds[:, 0, 0].tolist() == [2, 1, 2, 3]
    assert found.pooled[:, 0].tolist() == [ord(c) for c in "babc"]
    cache(["a", "ccc", "d"])
    assert encoder.asked == [["bb", "a", "ccc"], ["d"]]


def test_the_least_recently_used_goes_first():
    encoder = Encoder()
    cache = EmbeddingCache(encoder, 2 * ROW)
    for texts in (["a"], ["b"], ["a"], ["c"]):  # b is the oldest now, and goes
        cache(texts)
    cache(["a"])
    cache(["c"])
    assert encoder.asked == [["a"], ["b"], ["c"]]
    cache(["b"])
    assert encoder.asked[-1] == ["b"]
    assert cache._bytes == 2 * ROW == sum(item.nbytes for item in cache._items.values())


def test_more_texts_than_the_budget_holds_still_all_come():
    for budget in (0, ROW, 2.5 * ROW):
        encoder = Encoder()
        cache = EmbeddingCache(encoder, budget)
        for _ in range(2):
            found = cache(["a", "bb", "ccc", "a"])
            assert found.prompt_embeds[:, 0, 0].tolist() == [1, 2, 3, 1]
            assert cache._bytes <= budget
        # Within one call each is encoded once all the same.
        assert all(len(set(texts)) == len(texts) for texts in encoder.asked)


def test_select_and_stack():
    cond = EmbeddingCache(Encoder(), 1e9)(["a", "bb"])
    assert cond.select([1, 1, 0]).prompt_embeds[:, 0, 0].tolist() == [2, 2, 1]
    assert cond.nbytes == 2 * ROW
    assert len(stack([])) == 0


def test_rows_of_different_lengths_are_padded_masked_and_cut():
    rows = [PromptEmbeds.of_text(torch.ones(1, n, 2)) for n in (2, 4, 3)]
    both = stack(rows)
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    assert torch.equal(both.mask, expected) and torch.equal(
        both.prompt_embeds[..., 0], 1.0 * expected
    )
    short = both.select([2, 0])
    assert short.prompt_embeds.shape == (2, 3, 2) and short.lengths == (3, 2)
    assert both.select([1]).mask is None
