"""Every family against its own diffusers pipeline, on tiny random weights."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from ml_collections import ConfigDict
from peft import PeftModel

from diffusion_nft.data.prompts import Prompt
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models import build_model
from diffusion_nft.models.loading import check_distilled
from diffusion_nft.models.lora import export_lora
from diffusion_nft.models.precision import Precision
from diffusion_nft.models.sampling import Sampler
from diffusion_nft.policy import Policy, lora_layers
from diffusion_nft.randomness import generator, normal
from tests.models.tiny import FAMILIES, SIZE, save

CPU = torch.device("cpu")
STEPS = 3
PROMPTS = ["a red circle", "two blue squares and a much longer text", "x"]
NEGATIVE = "blurred"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    return save(family, tmp_path_factory.mktemp(family))


def load(family: str, folder: Path, precision: str = "no", **options: Any) -> Any:
    return build_model(
        family,
        folder=folder,
        name=str(folder),
        dist=Distributed(0, 1, 0, CPU),
        precision=Precision(precision, CPU),
        max_sequence_length=FAMILIES[family].tokens,
        embedded_guidance=3.5,
        **options,
    )


@pytest.fixture(scope="module")
def model(family, folder) -> Any:
    """In float32; the same everywhere, so without LoRA."""
    return load(family, folder)


@pytest.fixture(scope="module")
def double(family, folder) -> Any:
    return load(family, folder, "fp64")


@pytest.fixture(scope="module")
def adapted(family, folder) -> tuple[Any, Policy]:
    """In float64, with a LoRA whose weights are random in "current"."""
    model = load(family, folder, "fp64")
    targets = lora_layers(model, "attention+mlp")
    policy = Policy(
        model.transformer, targets=targets, rank=2, alpha=4, seed=0, dtype=torch.float64
    )
    with torch.no_grad():
        for i, weight in enumerate(policy.parameters()):
            weight.copy_(0.3 * normal(tuple(weight.shape), [generator("lora", i)])[0])
    return model, policy


def pipe_inputs(
    name: str, model: Any, prompts: list[str], size: tuple[int, int], guidance: float
) -> dict[str, Any]:
    """Arguments of the pipeline for what our sampler draws."""
    family = FAMILIES[name]
    negative = {}
    if guidance != 1:
        texts = [NEGATIVE] * len(prompts)
        negative = {"negative_prompt": texts}
        if name == "flux2_klein":  # takes embeddings alone
            negative = {"negative_prompt_embeds": model.encode(texts).prompt_embeds}
    keys = [generator("family", i) for i in range(len(prompts))]
    start = normal(model.latent_shape(size), keys)
    return dict(
        prompt=list(prompts),
        num_inference_steps=STEPS,
        height=size[0],
        width=size[1],
        max_sequence_length=family.tokens,
        latents=family.to_pipeline(start.to(model.precision.trained_dtype)),
        **family.options(guidance),
        **negative,
    )


@pytest.mark.parametrize("size", [SIZE, (32, 32)], ids=str)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=len)
def test_images_are_those_of_the_pipeline(family, model, prompts, guidance, size):
    sampler = Sampler("flow", STEPS, guidance, size, negative_prompt=NEGATIVE)
    cond = sampler.encode(model, [Prompt(text) for text in prompts])
    keys = [generator("family", i) for i in range(len(prompts))]
    ours = sampler(model, cond, keys)[0]
    inputs = pipe_inputs(family, model, prompts, size, guidance)
    latents = model.pipe(**copy.deepcopy(inputs), output_type="latent").images
    theirs = FAMILIES[family].from_pipeline(model.pipe, latents, ours.shape)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    images = model.pipe(**inputs, output_type="pt").images
    assert float((model.decode(ours).to_float() - images).abs().max()) <= 1.01 / 255


def test_velocities_are_those_of_the_pipelines_transformer(family, double):
    """In float64, from the inputs and outputs of its calls."""
    calls = []
    hook = double.pipe.transformer.register_forward_hook(
        lambda module, args, given, out: calls.append((bind(module, args, given), out)),
        with_kwargs=True,
    )
    double.pipe(**pipe_inputs(family, double, PROMPTS, SIZE, 1.0), output_type="latent")
    hook.remove()
    assert len(calls) == STEPS
    embeds = double.encode(PROMPTS)
    shape = torch.Size((len(PROMPTS), *double.latent_shape(SIZE)))
    for (given, out), sigma in zip(calls, double.pipe.scheduler.sigmas[:-1], strict=True):
        x, sigma, v = FAMILIES[family].call(given, out, shape, sigma)
        with torch.no_grad():
            ours = double.velocity(x, sigma, embeds)
        torch.testing.assert_close(
            ours, v, rtol=FAMILIES[family].exact, atol=FAMILIES[family].exact
        )


def bind(module: torch.nn.Module, args: tuple, given: dict[str, Any]) -> dict[str, Any]:
    return inspect.signature(module.forward).bind(*args, **given).arguments


def test_each_sample_of_a_batch_is_predicted_and_trained_as_alone(adapted):
    """Prompts of different lengths, in float64."""
    model, policy = adapted
    size, n = SIZE, len(PROMPTS)
    x = normal(model.latent_shape(size), [generator("x", i) for i in range(n)]).double()
    sigma = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    embeds = model.encode(PROMPTS)

    def run(rows: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        for weight in policy.parameters():
            weight.grad = torch.zeros_like(weight)
        v = model.velocity(x[rows], sigma[rows], embeds.select(rows))
        v.square().sum().backward()
        return v.detach(), [weight.grad.clone() for weight in policy.parameters()]

    together, gradients = run(list(range(n)))
    alone = [run([i]) for i in range(n)]
    torch.testing.assert_close(together, torch.cat([v for v, _ in alone]), rtol=1e-10, atol=1e-10)
    for gradient, *parts in zip(gradients, *(grads for _, grads in alone), strict=True):
        torch.testing.assert_close(gradient, sum(parts), rtol=1e-10, atol=1e-10)
    assert sum(float(g.abs().sum()) > 0 for g in gradients) > len(gradients) / 2


def test_gradient_checkpointing_changes_no_gradient(adapted):
    model, policy = adapted
    x = normal(model.latent_shape(SIZE), [generator("x", i) for i in range(2)]).double()
    sigma, embeds = torch.tensor([0.8, 0.3]).double(), model.encode(PROMPTS[:2])
    found = []
    for switch in ("enable", "disable"):
        getattr(model.transformer, f"{switch}_gradient_checkpointing")()
        for weight in policy.parameters():
            weight.grad = torch.zeros_like(weight)
        model.velocity(x, sigma, embeds).square().sum().backward()
        found.append([weight.grad for weight in policy.parameters()])
    for kept, again in zip(*found, strict=True):
        torch.testing.assert_close(kept, again, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_the_exported_lora_gives_our_velocities(family, adapted, folder, layout, tmp_path):
    model, policy = adapted
    export_lora(tmp_path, policy.lora("current", str(folder)))
    other = load(family, folder, "fp64")
    if layout == "diffusers":
        other.pipe.load_lora_weights(tmp_path)
    else:
        other.transformer = PeftModel.from_pretrained(other.transformer, tmp_path / "lora")
    x, sigma = torch.ones(2, *model.latent_shape(SIZE)).double(), torch.full((2,), 0.5).double()
    embeds = model.encode(PROMPTS[:2])
    with torch.no_grad():
        ours, theirs = (m.velocity(x, sigma, embeds) for m in (model, other))
        with policy.use_adapter("reference"):
            base = model.velocity(x, sigma, embeds)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert float((ours - base).abs().max()) > 1e-3


def test_models_distilled_to_few_steps_are_refused(family, folder, tmp_path, capsys):
    model, dist = load(family, folder), Distributed(0, 1, 0, CPU)
    config = ConfigDict({"pretrained": {"model": "owner/base", "allow_distilled": False}})
    check_distilled(model, config, dist)
    config.pretrained.model = "owner/Turbo"
    with pytest.raises(ValueError, match=r"'Turbo' in its name.*allow_distilled = True"):
        check_distilled(model, config, dist)
    config.pretrained.model = str(tmp_path / "turbo")
    (tmp_path / "turbo").mkdir()
    check_distilled(model, config, dist)
    assert "may be distilled" in capsys.readouterr().err
    if family == "flux1":
        model.transformer.register_to_config(guidance_embeds=False)
    elif family == "flux2_klein":
        model.pipe.register_to_config(is_distilled=True)
    else:
        return
    with pytest.raises(ValueError, match="distilled to few steps"):
        check_distilled(model, config, dist)
    config.pretrained.allow_distilled = True
    check_distilled(model, config, dist)


def test_sizes_that_cannot_be_drawn_are_refused(model):
    multiple = model.pipe.vae_scale_factor * model.patch_size
    with pytest.raises(ValueError, match=f"multiples of {multiple}"):
        model.latent_shape((32, 32 + multiple // 2))


SCHEDULERS = {
    "static": {"shift": 3.0, "use_dynamic_shifting": False},
    "exponential": {"use_dynamic_shifting": True, "time_shift_type": "exponential"},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    "karras": {"shift": 3.0, "use_karras_sigmas": True},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sigmas_are_those_of_the_pipeline_with_any_scheduler(family, folder, name):
    model = load(family, folder)
    model.pipe.scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULERS[name])
    model.pipe(**pipe_inputs(family, model, PROMPTS[:1], SIZE, 1.0), output_type="latent")
    theirs = model.pipe.scheduler.sigmas.double()
    assert len(theirs) == STEPS + 1
    torch.testing.assert_close(model.sigmas(STEPS, SIZE), theirs, rtol=1e-6, atol=0)
    if name == "terminal":  # diffusers divides 0 by 0
        with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match=r"1 steps .*nan, 0\.0"):
            model.sigmas(1, SIZE)
    if name in ("static", "exponential"):
        # The shift s of the grid u = 1, ..., 1/N: sigma = s u / (1 + (s - 1) u).
        u = torch.linspace(1, 1 / STEPS, STEPS, dtype=torch.float64)
        shift = model.shift(STEPS, SIZE)
        torch.testing.assert_close(theirs[:-1], shift * u / (1 + (shift - 1) * u))
