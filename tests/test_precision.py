"""Precisions on a CPU: dtypes, autocast, and fp16's loss scaling."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_nft.distributed import Distributed
from diffusion_nft.models import build_model
from diffusion_nft.policy import Policy
from diffusion_nft.precision import Precision, keeps_small_changes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "compute", "trained"),
    [
        ("fp16", torch.float16, torch.float32),
        ("bf16", torch.bfloat16, torch.float32),
        ("no", torch.float32, torch.float32),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_dtypes_and_scaler(name, compute, trained):
    precision = Precision(name, CPU)
    assert (precision.compute_dtype, precision.trained_dtype) == (compute, trained)
    assert precision.scaler.is_enabled() == (name == "fp16")
    with precision.autocast():
        product = torch.ones(2, 2, dtype=trained) @ torch.ones(2, 2, dtype=trained)
    assert product.dtype == compute


def build(name: str):
    return build_model(
        "sd3",
        name="shapes",
        max_sequence_length=8,
        resolution=48,
        dist=Distributed(0, 1, 0, CPU),
        precision=Precision(name, CPU),
    )


def test_bf16_stores_frozen_weights_in_bf16_and_trains_in_fp32(shapes_model):
    model = build("bf16")
    assert {p.dtype for p in model.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    policy = Policy(
        model.transformer, targets=model.lora_targets, rank=4, alpha=8, seed=0, dtype=torch.float32
    )
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.4])
    texts = ["a red circle", "two blue squares"]
    v = model.velocity(x, sigma, model.encode(texts))
    assert v.dtype == torch.float32
    v.square().mean().backward()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    assert {g.dtype for g in gradients} == {torch.float32}
    assert any(bool(g.any()) for g in gradients)
    with torch.no_grad():
        exact = shapes_model.velocity(x, sigma, shapes_model.encode(texts))
    error = (v.detach() - exact).norm() / exact.norm()
    assert 1e-5 < float(error) < 0.05


def test_fp64_computes_in_fp64(shapes_model):
    model = build("fp64")
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma, texts = torch.tensor([0.6]), ["a red circle"]
    with torch.no_grad():
        v = model.velocity(x.double(), sigma.double(), model.encode(texts))
        single = shapes_model.velocity(x, sigma, shapes_model.encode(texts))
    assert v.dtype == torch.float64
    difference = (v - single).norm() / v.norm()
    assert 1e-9 < float(difference) < 1e-4


@pytest.mark.parametrize(
    ("on_gpu", "tf32", "weight", "trained", "expected"),
    [
        (False, True, torch.float32, torch.float32, True),
        (False, True, torch.float64, torch.float64, True),
        (False, True, torch.bfloat16, torch.float32, False),
        (True, False, torch.float16, torch.float32, False),
        (True, True, torch.float32, torch.float32, False),
        (True, False, torch.float32, torch.float32, True),
        (True, True, torch.float64, torch.float64, True),
    ],
)
def test_small_changes_survive_in_full_precision_only(on_gpu, tf32, weight, trained, expected):
    tensor: Any = SimpleNamespace(is_cuda=on_gpu, dtype=weight)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        assert keeps_small_changes(tensor, trained) == expected
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
