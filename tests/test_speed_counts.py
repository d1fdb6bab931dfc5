"""The counts that make training fast: what is encoded, predicted, merged and reduced how often.

Clocks differ from machine to machine; a forward too many is one on every machine.
"""

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_nft import rollout
from diffusion_nft.data.prompts import epoch_prompts
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models.embeddings import Conditioning
from diffusion_nft.models.sampling import Sampler
from diffusion_nft.policy import LoraLinear
from diffusion_nft.trainer import Trainer
from tests.launch import make_trainer, one_thread, smoke

CPU = torch.device("cpu")
EPOCHS, STEPS, SAMPLES, SOLVER_STEPS, SIGMAS, EVALUATED = 2, 2, 12, 4, 2, 3
SETTINGS = {
    "num_epochs": EPOCHS,
    "eval.at_start": False,
    "eval_freq": 0,
    "eval.num_prompts": EVALUATED,
    "eval.num_steps": 1,
    "log.image_freq": 0,
    "train.gradient_step_per_epoch": STEPS,
}


@dataclass(frozen=True)
class Counting(Distributed):
    """A rank that counts its reductions, and the tensors in each."""

    reductions: list[int] = field(default_factory=list)

    def all_reduce_sum(self, tensors):
        self.reductions.append(len(tensors))


@dataclass
class Counts:
    """Of one run: rows and calls of the transformer by policy, encodings by text, ..."""

    rows: Counter = field(default_factory=Counter)
    calls: Counter = field(default_factory=Counter)
    with_grad: set = field(default_factory=set)
    encoded: Counter = field(default_factory=Counter)
    decoded: int = 0
    merged: Counter = field(default_factory=Counter)


def counting_trainer(tmp_path, **settings) -> Trainer:
    return make_trainer(smoke(tmp_path, SETTINGS | settings), Counting(0, 1, 0, CPU))


def counted_run(trainer: Trainer, monkeypatch) -> Counts:
    """Runs ``trainer`` to its end."""
    counts, model = Counts(), trainer.model
    velocity, decode, merge = model.velocity, model.decode, LoraLinear.merge_weight
    encode = model.pipe.encode_prompt

    def count_velocity(x, sigma, cond):
        name = trainer.policy._active
        counts.calls[name] += 1
        counts.rows[name] += len(x)
        if torch.is_grad_enabled():
            counts.with_grad.add(name)
        return velocity(x, sigma, cond)

    def count_decode(x0):
        counts.decoded += len(x0)
        return decode(x0)

    def count_encode(*, prompt, **options):
        counts.encoded[prompt] += 1
        return encode(prompt=prompt, **options)

    def count_merge(layer, name):
        counts.merged[name] += 1
        return merge(layer, name)

    monkeypatch.setattr(model, "velocity", count_velocity)
    monkeypatch.setattr(model, "decode", count_decode)
    monkeypatch.setattr(model.pipe, "encode_prompt", count_encode)
    monkeypatch.setattr(LoraLinear, "merge_weight", count_merge)
    # It times a forward before the first epoch.
    monkeypatch.setattr("diffusion_nft.trainer.describe", lambda *parts: "")
    with one_thread():
        trainer.run()
    return counts


@pytest.mark.parametrize("kl_weight", [0.1, 0.0])
def test_nothing_is_computed_twice(tmp_path, monkeypatch, kl_weight):
    trainer = counting_trainer(tmp_path, **{"nft.kl_weight": kl_weight})
    config = trainer.config
    counts = counted_run(trainer, monkeypatch)
    pairs = EPOCHS * SAMPLES * SIGMAS
    # A forward per sample and solver step, and one per policy and trained (sample, sigma) pair.
    expected = {
        # At the first update old and current are equal: one forward serves both.
        "old": EPOCHS * SAMPLES * SOLVER_STEPS + pairs - pairs // (EPOCHS * STEPS),
        "current": pairs,
        "reference": pairs if kl_weight else 0,
        "ema": EVALUATED,
    }
    assert counts.rows == Counter(expected)
    assert counts.with_grad == {"current"}
    # In as few calls as the batch sizes allow: 12 samples by 5, and the 12 pairs of a step by 7.
    micro_batches = EPOCHS * STEPS * 2
    assert counts.calls["current"] == micro_batches
    assert counts.calls["old"] == EPOCHS * 3 * SOLVER_STEPS + micro_batches - 2
    assert counts.decoded == EPOCHS * SAMPLES + EVALUATED
    # Every text once in the whole run.
    texts = {prompt.text for prompt in trainer.evaluator.prompts[:EVALUATED]}
    for epoch in range(EPOCHS):
        chosen = epoch_prompts(trainer.train_prompts, 3, seed=config.seed, epoch=epoch)
        texts |= {prompt.text for prompt in chosen}
    assert counts.encoded == Counter(texts)
    # An adapter is merged when it first samples after a change: old each epoch, EMA at the end.
    layers = sum(isinstance(m, LoraLinear) for m in trainer.model.transformer.modules())
    assert counts.merged == Counter(old=EPOCHS * layers, ema=layers)
    # One reduction per optimizer step, of all gradients and the request to stop.
    weights = len(trainer.policy.parameters())
    assert trainer.dist.reductions == [weights + 1] * (EPOCHS * STEPS)  # pyright: ignore


@pytest.mark.parametrize("offload", [False, True])
def test_the_next_prompts_are_encoded_during_scoring_unless_offloaded(
    tmp_path, monkeypatch, offload
):
    trainer = counting_trainer(tmp_path, **{"perf.offload_text_encoders": offload})
    encoded, encode, gather = [], trainer.model.pipe.encode_prompt, rollout.gather_scores
    seen = []

    def count_encode(*, prompt, **options):
        encoded.append(prompt)
        return encode(prompt=prompt, **options)

    def count_gather(*given):
        seen.append(len(encoded))
        return gather(*given)

    monkeypatch.setattr(trainer.model.pipe, "encode_prompt", count_encode)
    monkeypatch.setattr(rollout, "gather_scores", count_gather)
    with one_thread():
        trainer._sample()
    groups = trainer.config.sample.num_groups
    assert seen == [groups if offload else 2 * groups]


class Reads(TorchDispatchMode):
    """Counts where the host reads a tensor's value: on a GPU it waits there."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_reads_no_value_in_the_inner_loops(tmp_path):
    trainer = counting_trainer(tmp_path)
    with one_thread():
        samples = trainer._sample()
        r = torch.linspace(0.1, 0.9, SAMPLES)
        per_update = []
        for size in (SAMPLES * SIGMAS, 2):
            trainer.learner._micro_batch = size
            with Reads() as reads:
                trainer.learner.train_epoch(samples, r, epoch=0)
            per_update.append(reads.count)
        # Some at the end of each optimizer step and epoch, none for a micro-batch.
        assert per_update[0] == per_update[1] > 0
        per_solver = []
        for solver in ("dpm2", "flow"):
            for steps in (2, 5):
                sampler = Sampler(solver, steps, 1.0, (48, 48), noise_level=0.5)
                cond = Conditioning(trainer.model.encode(["a red circle"]))
                with Reads() as reads:
                    sampler(trainer.model, cond, [torch.Generator().manual_seed(0)])
                per_solver.append(reads.count)
        assert per_solver[0] == per_solver[1] and per_solver[2] == per_solver[3]
