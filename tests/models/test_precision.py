"""Precisions on a CPU: dtypes, autocast, and fp16's loss scaling."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_nft.algorithms import Batch
from diffusion_nft.algorithms.nft import nft_loss
from diffusion_nft.flow import add_noise
from diffusion_nft.models.precision import Precision, resolves_lora_updates
from diffusion_nft.policy import Policy
from tests.launch import LORA_TARGETS, build_shapes_model

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
    for stored in (trained, compute):
        with precision.autocast(stored):
            product = torch.ones(2, 2, dtype=stored) @ torch.ones(2, 2, dtype=stored)
        assert product.dtype == compute


def test_bf16_stores_frozen_weights_in_bf16_and_trains_in_fp32(shapes_model):
    model = build_shapes_model("bf16")
    assert {p.dtype for p in model.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}
    policy = Policy(
        model.transformer, targets=LORA_TARGETS, rank=4, alpha=8, seed=0, dtype=torch.float32
    )
    x = torch.randn(2, *model.latent_shape((48, 48)), generator=torch.Generator().manual_seed(0))
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


# Of sd3_geneval: pairs an update, and values of a latent.
SD3_PAIRS, SD3_VALUES = 48 * 24 * 9, 16 * 64 * 64


def lora_gradient(name: str, scale: float) -> torch.Tensor:
    """That of four pairs among SD3_PAIRS, as small as at SD3_VALUES, with the loss times ``scale``
    on its way.
    """
    model = build_shapes_model(name)
    policy = Policy(
        model.transformer, targets=LORA_TARGETS, rank=4, alpha=8, seed=0, dtype=torch.float32
    )
    x0, noise = torch.randn(
        2, 4, *model.latent_shape((48, 48)), generator=torch.Generator().manual_seed(0)
    ).unbind()
    sigma = torch.tensor([0.95, 0.7, 0.4, 0.15])
    xt = add_noise(x0, noise, sigma)
    v = model.velocity(xt, sigma, model.encode(["a red circle"] * 4))
    losses, _ = nft_loss(
        v,
        v.detach(),
        v.detach(),
        Batch(x0, noise, xt, sigma, torch.tensor([0.6, 0.4, 0.55, 0.3])),
        beta=1.0,
        kl_weight=1e-4,
        adv_clip_max=5.0,
    )
    loss = losses.sum() / SD3_PAIRS * (x0[0].numel() / SD3_VALUES)
    (loss * scale).backward()
    return torch.cat([p.grad.flatten() / scale for p in policy.parameters() if p.grad is not None])


def test_the_first_loss_scale_keeps_small_gradients():
    exact = lora_gradient("no", 1.0)
    ours, torchs = (
        float((lora_gradient("fp16", scale) - exact).norm() / exact.norm())
        for scale in (Precision("fp16", CPU).scaler.get_scale(), 2.0**16)
    )
    assert ours < 0.0025 < 0.004 < torchs


def test_fp64_computes_in_fp64(shapes_model):
    model = build_shapes_model("fp64")
    x = torch.randn(1, *model.latent_shape((48, 48)), generator=torch.Generator().manual_seed(0))
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
        assert resolves_lora_updates(tensor, trained) == expected
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
