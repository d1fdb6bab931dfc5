"""Estimated memory against real allocations."""

import json
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from diffusion_nft.benchmarks.epochs import make_config
from diffusion_nft.benchmarks.memory import (
    LiveBytes,
    MemoryEstimate,
    peak_bytes,
    text_encoders_gb,
)
from diffusion_nft.benchmarks.models import Setup
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.policy import Policy
from tests.launch import LORA_TARGETS, one_thread
from tests.scripts.in_process import call, script

PIXELS = 96


def tiny_config(tmp_path):
    changes = [("resolution", PIXELS), ("mixed_precision", "bf16"), ("train.lora_rank", 8)]
    return make_config("sd3.5-tiny", str(tmp_path), changes=changes)


@pytest.fixture(scope="module")
def estimated(tmp_path_factory):
    return MemoryEstimate(tiny_config(tmp_path_factory.mktemp("run")), "sd3.5-tiny")


def allocated(work) -> int:
    """Peak bytes in ``work()`` according to torch's profiler."""
    with one_thread(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_a_forward_and_backward_pass_allocates_the_estimate(estimated, tmp_path):
    setup = Setup.of(tiny_config(tmp_path), Distributed(0, 1, 0, torch.device("cpu")), "sd3.5-tiny")
    model = setup.load()
    policy = Policy(
        model.transformer,
        targets=LORA_TARGETS,
        rank=8,
        alpha=8,
        seed=0,
        dtype=torch.float32,
    )
    for weight in policy.parameters():
        weight.grad = torch.zeros_like(weight)
    size = 3
    x, sigma = torch.randn(size, *model.latent_shape((PIXELS, PIXELS))), torch.full((size,), 0.5)
    cond = model.encode(["a", "b", "c"])

    def real():
        model.velocity(x, sigma, cond).sum().backward()

    empty = estimated._inputs(size)
    expected = peak_bytes(lambda: estimated.model.velocity(*empty).sum().backward())
    assert expected == pytest.approx(allocated(real), rel=0.03)
    with torch.no_grad():
        assert estimated.decoding(2) * 1e9 == pytest.approx(
            allocated(lambda: model.decode(x[:2])), rel=0.1
        )


@pytest.mark.slow
def test_memory_grows_with_the_batch_and_checkpointing_saves_it(estimated):
    plain = [estimated.training(size, checkpointing=False) for size in (1, 2, 4)]
    assert plain[2] - plain[1] == pytest.approx(2 * (plain[1] - plain[0]), rel=0.01)
    assert estimated.training(4, checkpointing=True) < 0.7 * plain[2]
    assert estimated.sampling(4) < 0.25 * plain[2]


def test_live_bytes_are_of_storages_not_of_views():
    def work():
        x = torch.empty(10)  # 40 bytes
        y = x.view(2, 5).add_(1)
        z = y + 1  # 40 more
        del x, y
        return z.new_empty(5)  # 20 more, 40 fewer

    with LiveBytes() as live:
        result = work()
    assert (live.peak, live.now) == (80, result.nbytes)


def test_text_encoders_have_the_published_sizes():
    # Bytes of text_encoder, text_encoder_2 and text_encoder_3 of SD3.5-Medium, float16.
    halves = 0.247 + 1.39 + 9.52
    assert text_encoders_gb(torch.bfloat16) == pytest.approx(halves, rel=0.005)
    # 24 second projections of T5 stay in float32.
    wide = 24 * 10240 * 4096 * 2 / 1e9
    assert text_encoders_gb(torch.float16) == pytest.approx(halves + wide, rel=0.005)


def test_the_script_prints_a_table_and_json(tmp_path, capsys):
    module = script("benchmark_memory")
    output = tmp_path / "new" / "memory.json"
    flags = ["--arch", "sd3.5-tiny", "--resolution", "64", "--rank", "4", "--sizes", "1"]
    call(module, *flags, "--output", output)
    printed = capsys.readouterr().out
    results = json.loads(output.read_text())
    row = results["activations_gb"]["1"]
    assert row["training"] > row["training, gradient checkpointing"] > row["sampling"] > 0
    assert printed.startswith(output.read_text())
    assert re.search(r"\| 1 +(\| 0.00 +){4}\|", printed)
    with pytest.raises(SystemExit):
        call(module, *flags[:-1], "0")
    assert "--sizes: must be at least 1, not 0" in capsys.readouterr().err
