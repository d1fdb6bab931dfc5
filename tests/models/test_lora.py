"""LoRA files against diffusers and PEFT themselves."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from diffusion_nft.models.hub import fetch_lora
from diffusion_nft.models.lora import Lora, export_lora, load_lora, lora_file, merge_lora, scaled

RANK, ALPHA = 2, 4
TARGETS = ["attn.to_q", "attn.to_k", "attn.to_out.0", "attn.add_q_proj", "attn.to_add_out"]


def tiny_transformer():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    ).eval()


@torch.no_grad()
def output(transformer) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return transformer(
        hidden_states=torch.randn(2, 16, 8, 8, generator=g),
        encoder_hidden_states=torch.randn(2, 5, 16, generator=g),
        pooled_projections=torch.randn(2, 8, generator=g),
        timestep=torch.tensor([500.0, 900.0]),
        return_dict=False,
    )[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with an exported LoRA, its state, and the wrapped model's output."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False)
    wrapped = get_peft_model(tiny_transformer(), config)
    state = {
        key.removeprefix("base_model.model."): value
        for key, value in get_peft_model_state_dict(wrapped).items()
    }
    # 5 modules in 2 blocks; the last block of SD3 has no to_add_out.  A and B each.
    assert len(state) == 2 * (5 + 4)
    path = tmp_path_factory.mktemp("checkpoint")
    export_lora(path, Lora(scaled(state, ALPHA / RANK), "stabilityai/x"))
    return path, state, output(wrapped)


def pipeline():
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    encoders = [f"{kind}{i}" for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
    return StableDiffusion3Pipeline(
        tiny_transformer(), FlowMatchEulerDiscreteScheduler(), vae=None, **dict.fromkeys(encoders)
    )


def test_diffusers_pipeline_loads_the_checkpoint_folder(exported):
    path, _, expected = exported
    pipe = pipeline()
    assert (output(pipe.transformer) - expected).abs().max() > 1e-2
    pipe.load_lora_weights(path)
    assert (output(pipe.transformer) - expected).abs().max() <= 1e-5
    plain = tiny_transformer()
    plain.load_lora_adapter(path, weight_name="pytorch_lora_weights.safetensors")
    assert (output(plain) - expected).abs().max() <= 1e-5


def test_readers_that_see_the_tensors_alone_apply_the_trained_strength(exported):
    path, _, expected = exported
    weights = safetensors.torch.load_file(path / "pytorch_lora_weights.safetensors")
    pipe = pipeline()
    pipe.load_lora_weights(dict(weights))
    assert (output(pipe.transformer) - expected).abs().max() <= 1e-5
    # ComfyUI: alpha / rank of "<module>.alpha", 1 without it.  In both files.
    peft_weights = safetensors.torch.load_file(path / "lora" / "adapter_model.safetensors")
    for prefix, found in (("transformer", weights), ("base_model.model", peft_weights)):
        transformer = tiny_transformer()
        for key in (key for key in found if key.endswith(".lora_A.weight")):
            name = key.removesuffix(".lora_A.weight")
            a, b = found[key], found[f"{name}.lora_B.weight"]
            strength = found[f"{name}.alpha"] / len(a) if f"{name}.alpha" in found else 1.0
            weight = transformer.get_submodule(name.removeprefix(f"{prefix}.")).weight
            weight.data += strength * b @ a
        assert (output(transformer) - expected).abs().max() <= 1e-5


# All fields of LoraConfig in PEFT 0.10.0, which raises TypeError at any other; that version reads
# the exported folder, and diffusers 0.33.1 the exported file (tried by hand).
KEYS_OF_PEFT_0_10 = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out"),
    *("inference_mode", "init_lora_weights", "layer_replication", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "megatron_config"),
    *("megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision"),
    *("target_modules", "task_type", "use_dora", "use_rslora"),
}


def test_the_peft_configuration_says_what_old_versions_know(exported):
    path, state, _ = exported
    described = json.loads((path / "lora" / "adapter_config.json").read_text())
    assert described.keys() <= KEYS_OF_PEFT_0_10
    assert described == {
        "peft_type": "LORA",
        "base_model_name_or_path": "stabilityai/x",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted({key.rsplit(".lora_", 1)[0] for key in state}),
        "inference_mode": True,
    }


def test_peft_loads_the_peft_folder(exported):
    path, state, expected = exported
    loaded = PeftModel.from_pretrained(tiny_transformer(), str(path / "lora"))
    assert (output(loaded) - expected).abs().max() <= 1e-5
    # On these modules alone: not, by the ends of their names, on those of attn2.
    assert get_peft_model_state_dict(loaded).keys() == {f"base_model.model.{key}" for key in state}


@pytest.mark.parametrize("where", ["", "lora", "pytorch_lora_weights.safetensors"])
def test_load_lora_reads_every_layout(exported, where):
    path, state, _ = exported
    lora = load_lora(path / where)
    assert lora.rank == RANK and len(lora.modules) == len(state) / 2
    assert holds(lora, state)
    assert lora.base_model == ("" if where.endswith(".safetensors") else "stabilityai/x")


def holds(lora: Lora, state: dict[str, torch.Tensor], strength: float = ALPHA / RANK) -> bool:
    """True if ``lora`` is bitwise that of ``state`` at ``strength``."""
    expected = {k: v * strength if ".lora_B." in k else v for k, v in state.items()}
    equal = all(torch.equal(lora.state[key], expected[key]) for key in expected)
    return lora.state.keys() == expected.keys() and equal


def test_load_lora_reads_files_of_others(exported, tmp_path):
    _, state, _ = exported
    named = {
        f"base_model.model.{key}".replace(".weight", ".default.weight"): value
        for key, value in state.items()
    }
    LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS).save_pretrained(str(tmp_path))
    safetensors.torch.save_file(named, tmp_path / "adapter_model.safetensors")
    assert holds(load_lora(tmp_path), state)
    # diffusers without metadata: alpha is the rank, the modules are those that have weights.
    bare = {f"transformer.{key}": value for key, value in state.items()}
    safetensors.torch.save_file(bare, tmp_path / "bare.safetensors")
    assert holds(load_lora(tmp_path / "bare.safetensors"), state, 1.0)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"no adapter_config.json"):
        load_lora(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert lora_file(tmp_path) == tmp_path / "bare.safetensors", "the only file of the folder"


def test_load_lora_reads_a_whole_description(exported, tmp_path):
    """diffusers' training scripts write all that PEFT knows of an adapter into the metadata."""
    _, state, _ = exported
    transformer = tiny_transformer()
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    metadata = _collate_lora_metadata({"transformer": transformer})
    SD3LoraLoaderMixin.save_lora_weights(tmp_path, state, **metadata)
    assert holds(load_lora(tmp_path), state)


def test_load_lora_reads_alphas_among_the_weights(exported, tmp_path):
    _, state, _ = exported
    plain = {f"transformer.{key}": value for key, value in state.items()}
    name = next(key for key in plain if "lora_A" in key).removesuffix(".lora_A.weight")
    safetensors.torch.save_file(
        plain | {f"{name}.alpha": torch.tensor(6.0)}, tmp_path / "x.safetensors"
    )
    lora = load_lora(tmp_path / "x.safetensors")
    for key, value in state.items():
        own = f"transformer.{key}" == f"{name}.lora_B.weight"
        assert torch.equal(lora.state[key], value * 3 if own else value)


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"attn.to_q": 5, "^transformer_blocks.1.attn.to_k": 1}},
        {"rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_q": 1, "0.attn.to_k": 7}},
        {"use_rslora": True},
    ],
    ids=["ranks", "ranks and alphas", "rslora"],
)
def test_ranks_and_alphas_of_single_modules_are_pefts(options, tmp_path):
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False, **options
    )
    wrapped = get_peft_model(tiny_transformer(), config)
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    expected = output(wrapped)
    lora = load_lora(tmp_path / "theirs")
    assert lora.rank == max(RANK, *options.get("rank_pattern", {"": 0}).values())
    assert (output(merge_lora(tiny_transformer(), lora)) - expected).abs().max() <= 1e-5
    export_lora(tmp_path, lora)
    pipe = pipeline()
    pipe.load_lora_weights(tmp_path)
    assert (output(pipe.transformer) - expected).abs().max() <= 1e-5


def test_load_lora_refuses_pickles_and_what_is_not_plain_lora(tmp_path):
    with pytest.raises(ValueError, match="has no LoRA"):
        load_lora(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle"):
            load_lora(path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    foreign = {"text_encoder.x.lora_A.weight": torch.zeros(2, 2)}
    safetensors.torch.save_file(foreign, file)
    with pytest.raises(ValueError, match=r"not a plain LoRA.*text_encoder"):
        load_lora(tmp_path)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint of the published code: adapters ``default`` and ``old``, saved by PEFT."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=False)
    wrapped = get_peft_model(tiny_transformer(), config)
    wrapped.add_adapter("old", config)
    wrapped.set_adapter("default")
    folder = tmp_path_factory.mktemp("hub")
    wrapped.save_pretrained(str(folder / "checkpoint-30" / "lora"))
    outputs = {}
    for name in ("default", "old"):
        wrapped.set_adapter(name)
        outputs[name] = output(wrapped)
    assert (outputs["default"] - outputs["old"]).abs().max() > 1e-3
    return folder, outputs


@pytest.mark.parametrize("where", ["checkpoint-30", "checkpoint-30/lora"])
@pytest.mark.parametrize("adapter", ["default", "old"])
def test_the_published_layout_holds_two_adapters(published, where, adapter):
    folder, outputs = published
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors")}
    assert files == {f"checkpoint-30/lora/{a}adapter_model.safetensors" for a in ("", "old/")}
    lora = load_lora(lora_file(folder / where, adapter))
    assert lora.rank == RANK
    merged = merge_lora(tiny_transformer(), lora)
    # The sum of the weights rounds elsewhere than the sum of the outputs.
    assert (output(merged) - outputs[adapter]).abs().max() <= 1e-5
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_a_hub_repository(published, monkeypatch):
    folder, _ = published
    asked = {}

    def snapshot(name, allow_patterns):
        asked[name] = allow_patterns
        return str(folder)

    monkeypatch.setattr("diffusion_nft.models.hub.snapshot_download", snapshot)
    assert fetch_lora("owner/name") == folder
    assert asked == {"owner/name": ["*.safetensors", "*.json"]}
    names = "choose one of its subfolders checkpoint-30/lora, checkpoint-30/lora/old"
    with pytest.raises(ValueError, match=names):
        lora_file(folder)
    with pytest.raises(ValueError, match=r"has no LoRA \(adapter 'new'"):
        lora_file(folder / "checkpoint-30", "new")


def test_files_with_several_adapters_or_half_a_lora_are_refused(exported, tmp_path):
    _, state, _ = exported
    file = tmp_path / "x.safetensors"
    plain = {f"transformer.{key}": value for key, value in state.items()}
    renamed = {
        key.replace(".weight", f".{name}.weight"): value.clone()
        for key, value in plain.items()
        for name in ("default", "old")
    }
    safetensors.torch.save_file(renamed, file)
    with pytest.raises(ValueError, match="several adapters"):
        load_lora(file)
    first = next(key for key in plain if "lora_A" in key)
    for number, words in ((torch.tensor(torch.nan), "finite"), (torch.ones(2), "finite number")):
        alpha = {first.replace("lora_A.weight", "alpha"): number}
        safetensors.torch.save_file(plain | alpha, file)
        with pytest.raises(ValueError, match=words):
            load_lora(file)
    safetensors.torch.save_file(plain | {"transformer.proj_out.alpha": torch.ones(())}, file)
    with pytest.raises(ValueError, match="an alpha for proj_out, but no LoRA weights"):
        load_lora(file)
    for wrong in ({first: torch.zeros(RANK + 1, 16)}, {first: None}):
        kept = {key: value for key, value in (plain | wrong).items() if value is not None}
        safetensors.torch.save_file(kept, file)
        with pytest.raises(ValueError, match=r"attn\.\w+ needs A and B of equal rank"):
            load_lora(file)


def test_a_folder_of_several_files_names_them(exported, tmp_path):
    path, _, _ = exported
    for name in ("a", "b"):
        shutil.copy(path / "pytorch_lora_weights.safetensors", tmp_path / f"{name}.safetensors")
    words = rf"has 2 safetensors files: choose one of {tmp_path}/a.safetensors, {tmp_path}/b\.safe"
    with pytest.raises(ValueError, match=words):
        load_lora(tmp_path)
    assert load_lora(tmp_path / "b.safetensors").rank == RANK


def test_dora_as_peft_writes_it_is_refused(tmp_path):
    config = LoraConfig(r=RANK, target_modules=TARGETS, use_dora=True)
    get_peft_model(tiny_transformer(), config).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"not a plain LoRA.*magnitude"):
        load_lora(tmp_path)


def test_merging_the_lora_of_another_model_names_what_differs(exported):
    _, state, _ = exported
    key = "transformer_blocks.0.attn.to_q.lora_A.weight"
    foreign = {f"single_{key}": state[key], f"single_{key}".replace("_A.", "_B."): state[key]}
    with pytest.raises(
        ValueError, match=r"does not fit.*no linear layers single_transformer_blocks"
    ):
        merge_lora(tiny_transformer(), Lora(foreign))
    for wrong in ({key: torch.zeros(RANK, 7)}, {key: None}):
        changed = {k: v for k, v in (state | wrong).items() if v is not None}
        with pytest.raises(ValueError, match=r"does not fit.*0\.attn\.to_q\.lora_A"):
            merge_lora(tiny_transformer(), Lora(changed))
