"""The SD3 family against plain diffusers on the built-in pipeline."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models import build_model, pipeline
from diffusion_nft.models.embeddings import Conditioning
from diffusion_nft.models.hub import fetch_lora, fetch_pipeline
from diffusion_nft.models.loading import load_model
from diffusion_nft.models.pipeline import temporarily_on
from diffusion_nft.models.precision import Precision
from diffusion_nft.models.sampling import Sampler
from diffusion_nft.policy import ADAPTERS, REFERENCE, Policy, lora_layers
from diffusion_nft.randomness import generator
from diffusion_nft.shapes.model import PIPELINE_DIR
from tests.launch import build_shapes_model

CPU = torch.device("cpu")
TEXTS = ["a red circle", "two blue squares", "a green triangle"]


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_images_are_those_of_the_plain_pipeline(shapes_model, pipe):
    cond = shapes_model.encode(TEXTS)
    keys = [generator("same", i) for i in range(3)]
    x0, _ = Sampler("flow", 6, 1.0, (48, 48))(shapes_model, Conditioning(cond), keys)
    ours = shapes_model.decode(x0)
    start = torch.stack(
        [
            torch.randn(shapes_model.latent_shape((48, 48)), generator=generator("same", i))
            for i in range(3)
        ]
    )
    theirs = pipe(
        prompt=TEXTS,
        num_inference_steps=6,
        guidance_scale=1.0,
        latents=start,
        height=48,
        width=48,
        max_sequence_length=8,
        output_type="pt",
    ).images
    torch.testing.assert_close(ours.to_float(), theirs, rtol=0, atol=0.5 / 255 + 2e-3)


def test_a_texts_embedding_does_not_depend_on_its_neighbours(shapes_model):
    together = shapes_model.encode(TEXTS)
    shapes_model.encode_cached._items.clear()
    shapes_model.encode_cached._bytes = 0
    alone = shapes_model.encode(TEXTS[1:2])
    assert torch.equal(alone.prompt_embeds[0], together.prompt_embeds[1])
    assert torch.equal(alone.pooled[0], together.pooled[1])
    assert not torch.allclose(together.pooled[0], together.pooled[1])


def test_decoding_in_slices_changes_nothing(shapes_model):
    x0 = 3 * torch.randn(5, *shapes_model.latent_shape((48, 48)))
    images = shapes_model.decode(x0)
    assert images.pixels.shape == (5, 3, 48, 48) and images.pixels.dtype == torch.uint8
    each = torch.cat([shapes_model.decode(row[None]).pixels for row in x0])
    assert int((images.pixels.int() - each.int()).abs().max()) <= 1


def test_offloading_and_checkpointing_give_the_same_numbers(shapes_model, monkeypatch):
    other = build_shapes_model(
        offload_text_encoders=True,
        gradient_checkpointing=True,
        vae_batch_size=1,
        embed_cache_gb=0.0,
    )
    visits = []

    def recorded(modules, device):
        visits.append((modules, device))
        return temporarily_on(modules, device)

    monkeypatch.setattr(pipeline, "temporarily_on", recorded)
    ours, theirs = other.encode(TEXTS), shapes_model.encode(TEXTS)
    assert torch.equal(ours.prompt_embeds, theirs.prompt_embeds)
    # All texts are encoded in one visit; a model that does not offload makes none.
    assert visits == [(other.text_encoders(), CPU)]
    x, sigma = torch.ones(3, *other.latent_shape((48, 48))), torch.full((3,), 0.3)
    with torch.no_grad():
        assert torch.equal(other.velocity(x, sigma, ours), shapes_model.velocity(x, sigma, theirs))
    assert not any(p.requires_grad for p in other.transformer.parameters())


def test_temporarily_moved_weights_are_restored_without_a_copy(monkeypatch):
    """Also after an error.  A move to a GPU gives a parameter other data, as this one does."""

    def move(module, device):
        assert device == CPU
        for weight in module.parameters():
            weight.data = weight.data.clone()

    monkeypatch.setattr(torch.nn.Linear, "to", move)
    modules = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)]
    weights = [weight for module in modules for weight in module.parameters()]
    homes = [weight.data_ptr() for weight in weights]
    with pytest.raises(MemoryError), temporarily_on(modules, CPU):
        assert all(w.data_ptr() != home for w, home in zip(weights, homes, strict=True))
        raise MemoryError
    assert [weight.data_ptr() for weight in weights] == homes


def test_an_unavailable_model_is_an_error_with_advice(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for fetch in (fetch_pipeline, fetch_lora):
        with pytest.raises(OSError, match=r"nobody/nothing.*hf auth login"):
            fetch("nobody/nothing")


def test_the_published_evaluation_truncates_timesteps_and_keeps_the_transformer_in_fp32():
    seen = {}
    for published in (False, True):
        model = build_shapes_model("bf16", match_published=published)
        seen[published] = steps = []
        model.transformer.register_forward_pre_hook(
            lambda _, __, given, steps=steps: steps.append(float(given["timestep"][0])),
            with_kwargs=True,
        )
        stored = torch.float32 if published else torch.bfloat16
        assert {p.dtype for p in model.transformer.parameters()} == {stored}
        assert model.pipe.text_encoder.dtype == torch.bfloat16
        cond = model.encode(TEXTS[:1])
        v = model.velocity(
            torch.zeros(1, *model.latent_shape((48, 48))), torch.tensor([0.96013]), cond
        )
        assert v.dtype == torch.float32
    assert seen[False] == [pytest.approx(960.13)] and seen[True] == [960.0]


def test_a_resolution_beyond_the_position_table_is_refused(smoke_config):
    smoke_config.resolution = 65536
    with pytest.raises(ValueError, match=r"resolution = 65536: shapes supports at most \d+ pixels"):
        load_model(smoke_config, Distributed(0, 1, 0, CPU))


@pytest.fixture
def base(tmp_path) -> Path:
    """A copy of the built-in pipeline's folder."""
    return Path(shutil.copytree(PIPELINE_DIR, tmp_path / "base"))


def load(folder: Path):
    return build_model(
        "sd3",
        folder=folder,
        name=str(folder),
        dist=Distributed(0, 1, 0, CPU),
        precision=Precision("no", CPU),
        max_sequence_length=8,
    )


def change_index(folder: Path, **entries: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def as_variant(folder: Path) -> None:
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))


def as_sharded_variant(folder: Path) -> None:
    """The transformer in two shards, the other parts as they are."""
    whole = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights, name = load_file(whole), "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors"
    shards = {key: name.format(1 + i % 2) for i, key in enumerate(weights)}
    for shard in set(shards.values()):
        part = {key: value for key, value in weights.items() if shards[key] == shard}
        save_file(part, whole.with_name(shard), metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (whole.with_name(f"{whole.name}.index.fp16.json")).write_text(json.dumps(index))
    whole.unlink()


@pytest.mark.parametrize("store", [as_variant, as_sharded_variant])
def test_a_base_that_is_stored_in_a_variant_alone(store, base, shapes_model):
    store(base)
    model = load(base)
    cond, same = model.encode(TEXTS), shapes_model.encode(TEXTS)
    assert torch.equal(cond.prompt_embeds, same.prompt_embeds)
    assert torch.equal(cond.pooled, same.pooled)
    for ours, theirs in zip(
        model.transformer.parameters(), shapes_model.transformer.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def drop_t5(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder_3")


def null_t5(folder: Path) -> None:
    change_index(folder, text_encoder_3=[None, None], tokenizer_3=[None, None])


@pytest.mark.parametrize("remove", [drop_t5, null_t5])
def test_a_base_without_t5(remove, base, shapes_model, capsys):
    remove(base)
    cond, whole = load(base).encode(TEXTS), shapes_model.encode(TEXTS)
    assert f"{base} has no T5" in capsys.readouterr().err
    clip = whole.prompt_embeds.shape[1] - 8
    assert torch.equal(cond.pooled, whole.pooled)
    assert cond.prompt_embeds.shape == whole.prompt_embeds.shape
    assert torch.equal(cond.prompt_embeds[:, :clip], whole.prompt_embeds[:, :clip])
    assert not cond.prompt_embeds[:, clip:].any() and whole.prompt_embeds[:, clip:].any()


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_weight(path: Path) -> None:
    weights = load_file(path)
    weights.popitem()
    save_file(weights, path, metadata={"format": "pt"})


BROKEN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no transformer": ("has no transformer", lambda b: shutil.rmtree(b / "transformer")),
    "no VAE": ("has no vae", lambda b: change_index(b, vae=[None, None])),
    "no tokenizer": ("has no tokenizer_2", lambda b: shutil.rmtree(b / "tokenizer_2")),
    "T5's tokenizer": ("has no tokenizer_3", lambda b: shutil.rmtree(b / "tokenizer_3")),
    "no weights": ("transformer has no weights", lambda b: (b / TRANSFORMER).unlink()),
    "cut weights": (f"{TRANSFORMER} is damaged", lambda b: cut(b / TRANSFORMER)),
    "a lost weight": ("some weights are missing", lambda b: lose_a_weight(b / TRANSFORMER)),
    "no config": ("vae has no config.json", lambda b: (b / "vae" / "config.json").unlink()),
    "config": ("cannot be loaded", lambda b: (b / "vae" / "config.json").write_text("{")),
    "index": ("model_index.json is damaged", lambda b: (b / "model_index.json").write_text("{")),
    "another family": (
        "holds a FluxPipeline; a StableDiffusion3Pipeline is required",
        lambda b: change_index(b, _class_name="FluxPipeline"),
    ),
    "an unknown class": (
        "cannot be loaded: ValueError",
        lambda b: change_index(b, transformer=["diffusers", "Nothing"]),
    ),
    "an entry of text": ("has no transformer", lambda b: change_index(b, transformer="x")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_base_is_one_line_that_names_it(name, base):
    words, damage = BROKEN[name]
    damage(base)
    with pytest.raises(ValueError) as caught:
        load(base)
    said = str(caught.value)
    assert words in said and str(base) in said and "\n" not in said


@pytest.mark.slow
def test_compiled_blocks_predict_the_same_for_every_policy():
    # Compiling takes minutes; what it saves on a CPU is little (docs/benchmarks.md).
    both = []
    for compiled in (False, True):
        model = build_shapes_model(compile=compiled)
        policy = Policy(
            model.transformer,
            targets=lora_layers(model, "attention"),
            rank=4,
            alpha=8,
            seed=0,
            dtype=torch.float32,
        )
        with torch.no_grad():
            for name in ADAPTERS:
                for i, weight in enumerate(policy.parameters(name)):
                    rng = generator(name, i)
                    weight.copy_(0.05 * torch.randn(weight.shape, generator=rng))
        both.append((model, policy))
    x, sigma = torch.randn(4, *both[0][0].latent_shape((48, 48))), torch.full((4,), 0.5)
    torch._dynamo.utils.counters.clear()
    for name in (*ADAPTERS, REFERENCE):
        predicted, gradients = [], []
        for model, policy in both:
            cond = model.encode(["a red circle"] * 4)
            with policy.use_adapter(name), torch.set_grad_enabled(name == "current"):
                v = model.velocity(x, sigma, cond)
                if name == "current":
                    v.square().mean().backward()
                    gradients.append([weight.grad for weight in policy.parameters()])
            predicted.append(v.detach())
        torch.testing.assert_close(*predicted, rtol=1e-4, atol=1e-4)
        if gradients:
            for eager, compiled in zip(*gradients, strict=True):
                assert torch.norm(eager - compiled) <= 1e-4 * torch.norm(eager)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and 4 <= counters["stats"]["unique_graphs"] <= 16
