"""The embedding cache: each text once, least recently used out first, within its bytes."""

import torch

from diffusion_nft.models.embeddings import Conditioning, EmbeddingCache, stack

ROW = Conditioning(torch.zeros(1, 2, 3), torch.zeros(1, 4)).nbytes


class Encoder:
    def __init__(self):
        self.asked: list[list[str]] = []

    def __call__(self, texts):
        self.asked.append(list(texts))
        return [
            Conditioning(torch.full((1, 2, 3), float(len(t))), torch.full((1, 4), float(ord(t[0]))))
            for t in texts
        ]


def test_each_unique_text_is_encoded_once_and_rows_are_in_order():
    encoder = Encoder()
    cache = EmbeddingCache(encoder, 1e9)
    found = cache(["bb", "a", "bb", "ccc"])
    assert found.prompt_embeds[:, 0, 0].tolist() == [2, 1, 2, 3]
    assert found.pooled_prompt_embeds[:, 0].tolist() == [ord(c) for c in "babc"]
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
    assert cond.select(torch.tensor([1, 1, 0])).prompt_embeds[:, 0, 0].tolist() == [2, 2, 1]
    assert cond.nbytes == 2 * ROW
    assert stack([]).prompt_embeds.shape[0] == 0
