"""The export script: exported files give the same images in diffusers."""

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models import build_model
from diffusion_nft.models.embeddings import Conditioning
from diffusion_nft.models.lora import load_lora
from diffusion_nft.models.precision import Precision
from diffusion_nft.models.sampling import Sampler
from diffusion_nft.policy import policy_of_lora
from diffusion_nft.randomness import generator, normal
from diffusion_nft.runs.checkpoint import resolve_checkpoint
from diffusion_nft.shapes.model import PIPELINE_DIR
from diffusion_nft.tracking.metrics import read_metrics
from diffusion_nft.utils.files import DiskError
from tests.launch import train_here
from tests.scripts.in_process import call, script

export = script("export_lora")
CPU = Distributed(0, 1, 0, torch.device("cpu"))
PROMPT, STEPS = "a red circle", 5
TRAINED = {
    "sample.num_groups": 1,
    "sample.num_image_per_prompt": 2,
    "eval.num_prompts": 2,
    "eval.num_steps": STEPS,
    "log.num_images": 2,
    "checkpoint.keep": 0,
    "save_freq": 1,
    "eval_freq": 1,
    # High, for a visible LoRA.
    "train.learning_rate": 0.03,
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_here(folder, TRAINED)
    return folder


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    call(export, "--checkpoint_path", run_dir, "--output_dir", folder, "--merge")
    return folder


@pytest.fixture(scope="module")
def ours(run_dir) -> torch.Tensor:
    """Latents with the LoRA of the checkpoint, sampled by this project."""
    about = {"folder": PIPELINE_DIR, "name": "shapes", "max_sequence_length": 8}
    model = build_model("sd3", **about, dist=CPU, precision=Precision("no", CPU.device))
    sampler = Sampler("flow", STEPS, 1.0, (48, 48))
    cond = Conditioning(model.encode([PROMPT]))

    def draw() -> torch.Tensor:
        return sampler(model, cond, [generator(0, "sample")])[0]

    base = draw()
    policy_of_lora(model, load_lora(resolve_checkpoint(run_dir)))
    image = draw()
    assert (image - base).abs().max() > 0.01
    return image


def theirs(pipe: StableDiffusion3Pipeline) -> torch.Tensor:
    """The same latents, sampled by diffusers."""
    pipe.set_progress_bar_config(disable=True)
    noise = normal((4, 12, 12), [generator(0, "sample")])
    return pipe(
        PROMPT,
        latents=noise,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        height=48,
        width=48,
        max_sequence_length=8,
        output_type="latent",
    ).images


def test_plain_diffusers_draws_our_image(exported, ours):
    pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR)
    pipe.load_lora_weights(exported)
    assert (theirs(pipe) - ours).abs().max() <= 1e-5


def test_the_merged_pipeline_draws_our_image(exported, ours):
    """Up to float32 rounding of merged weights (7e-7)."""
    pipe = StableDiffusion3Pipeline.from_pretrained(exported)
    assert pipe.transformer.dtype == torch.float32
    assert not [name for name, _ in pipe.transformer.named_parameters() if "lora" in name]
    assert (theirs(pipe) - ours).abs().max() <= 1e-5


def test_a_merged_half_precision_weight_is_rounded_once(run_dir, exported, tmp_path):
    half = ("--merge", "--mixed_precision", "bf16", "--output_dir", tmp_path)
    call(export, "--checkpoint_path", run_dir, *half)
    weights = "transformer/diffusion_pytorch_model.safetensors"
    rounded, exact = (load_file(folder / weights) for folder in (tmp_path, exported))
    assert rounded.keys() == exact.keys()
    assert all(torch.equal(rounded[key], exact[key].bfloat16()) for key in exact)
    assert "torch_dtype=torch.bfloat16" in (tmp_path / "README.md").read_text()


def test_all_but_the_transformer_is_the_base_as_it_is(exported):
    for path in PIPELINE_DIR.rglob("*"):
        name = path.relative_to(PIPELINE_DIR)
        if path.is_file() and name.parts[0] not in ("transformer", "README.md"):
            assert (exported / name).read_bytes() == path.read_bytes(), name


def test_both_layouts_hold_the_checkpoints_weights(run_dir, exported):
    state = load_lora(resolve_checkpoint(run_dir)).state
    for path in (exported / "lora", exported / "pytorch_lora_weights.safetensors"):
        loaded = load_lora(path).state
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_the_card(run_dir, exported):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "base_model:" not in card, "the built-in model is not on the hub"
    assert f"# {run_dir.name}-checkpoint-4\n\nA LoRA of `shapes`, rank 32. " in card
    assert "for diffusers (>= 0.33.1) and ComfyUI" in card and "for PEFT (>= 0.10.0)" in card
    assert re.search(r"\| shapes +\| 1 +\|", card) and "for 2 epochs (4 optimizer steps)" in card
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if "eval/total" in row]
    totals = [f"{row['eval/total']:.4f}" for row in (rows[0], rows[-1])]
    assert re.search(rf"\| total +\| {totals[0]} +\| {totals[1]} +\|", card)
    config = json.loads(re.findall(r"```json\n(.*?)```", card, re.DOTALL)[0])
    assert config["train.learning_rate"] == 0.03 and config["pretrained.model"] == "shapes"
    assert str(run_dir) not in card and "save_dir" not in config
    with Image.open(exported / "samples.png") as grid:
        assert grid.width > 2 * 48
    assert "](samples.png)" in card


def run_snippet(folder: Path, monkeypatch) -> Image.Image:
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    monkeypatch.chdir(folder)
    exec(compile(code[0], "README.md", "exec"), {})
    return Image.open(folder / "image.png")


def test_the_cards_snippet_runs(run_dir, exported, tmp_path, monkeypatch):
    call(export, "--checkpoint_path", run_dir, "--output_dir", tmp_path / "lora")
    lora = run_snippet(tmp_path / "lora", monkeypatch)
    merged = run_snippet(exported, monkeypatch)
    assert lora.size == merged.size == (48, 48)
    pairs = zip(lora.tobytes(), merged.tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1, "both show the LoRA"
    assert not (tmp_path / "lora" / "model_index.json").exists()


def test_an_earlier_checkpoint_shows_neither_later_numbers_nor_later_images(run_dir, tmp_path):
    earlier = run_dir / "checkpoints" / "checkpoint-2"
    call(export, "--checkpoint_path", earlier, "--output_dir", tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert re.search(r"\| epoch 0 +\| epoch 1 +\|", card) and "samples.png" not in card
    assert not (tmp_path / "samples.png").exists()


def test_a_card_names_no_folder_of_the_machine(tmp_path, exported):
    # A copy of a hub model in the hub cache, and elsewhere.
    for folder, name in (
        ("models--owner--base/snapshots/0a1b", "owner/base"),
        ("home/me/my-base", "my-base"),
    ):
        base, out = tmp_path / folder, tmp_path / name.replace("/", "-")
        shutil.copytree(PIPELINE_DIR, base)
        flags = ("--pretrained", base, "--resolution", 48, "--max_sequence_length", 8)
        call(export, "--lora_hf_path", exported, *flags, "--output_dir", out)
        card = (out / "README.md").read_text()
        assert f"# LoRA of {name}\n" in card
        assert str(tmp_path) not in card and tmp_path.name not in card and "snapshots" not in card
        described = json.loads((out / "lora" / "adapter_config.json").read_text())
        assert described["base_model_name_or_path"] == name


@pytest.mark.parametrize("sharded", [False, True])
def test_a_base_in_a_variant_alone_and_without_t5_is_merged_into_a_plain_folder(
    run_dir, exported, tmp_path, sharded
):
    base, out = shutil.copytree(PIPELINE_DIR, tmp_path / "base"), tmp_path / "out"
    shutil.rmtree(base / "text_encoder_3")
    shutil.rmtree(base / "tokenizer_3")
    for path in list(base.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    if sharded:
        vae = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR).vae
        shutil.rmtree(base / "vae")
        vae.save_pretrained(base / "vae", variant="fp16", max_shard_size="100KB")
        assert len(list((base / "vae").glob("*.fp16-*.safetensors"))) > 1
    asked = ("--checkpoint_path", run_dir, "--pretrained", base, "--merge", "--output_dir", out)
    call(export, *asked)
    assert not list(out.rglob("*fp16*"))
    assert '".", text_encoder_3=None, tokenizer_3=None, torch' in (out / "README.md").read_text()
    pipe = StableDiffusion3Pipeline.from_pretrained(out, text_encoder_3=None, tokenizer_3=None)
    whole = StableDiffusion3Pipeline.from_pretrained(exported)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = (getattr(p, part).state_dict() for p in (pipe, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_another_base_model_of_the_lora_is_printed(exported, tmp_path, capsys):
    base = "stabilityai/stable-diffusion-3.5-medium"
    said = {}
    for name in ("lora", "pytorch_lora_weights.safetensors"):
        flags = ("--pretrained", base, "--output_dir", tmp_path / name)
        call(export, "--lora_hf_path", exported / name, *flags)
        said[name] = capsys.readouterr().out
    assert f"the LoRA names shapes as its base model; it is used on {base}\n" in said["lora"]
    assert "as its base" not in said["pytorch_lora_weights.safetensors"], "diffusers' names none"


@pytest.mark.parametrize(("flags", "room"), [((), 10_000), (("--merge",), 500_000)])
def test_a_full_disk_is_one_line_and_leaves_nothing(run_dir, tmp_path, flags, room):
    asked = ("--checkpoint_path", run_dir, *flags, "--output_dir")
    here = tmp_path / "here"
    here.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        for folder in (here, tmp_path / "new" / "folder"):
            with pytest.raises(DiskError, match=r"could not be filled.*too large") as caught:
                call(export, *asked, folder)
            assert str(caught.value).startswith(f"{folder} ") and "\n" not in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(here.iterdir()) == [] and not (tmp_path / "new" / "folder").exists()
    (here / ".unfinished").mkdir()  # left by a killed command
    (here / ".unfinished" / "README.md").write_text("unfinished")
    call(export, *asked, here)
    assert "unfinished" not in (here / "README.md").read_text()
    assert not (here / ".unfinished").exists() and load_lora(here).rank == 32


def test_a_lora_of_others_gets_a_card_without_a_run(exported, tmp_path):
    source = exported / "pytorch_lora_weights.safetensors"
    base = "stabilityai/stable-diffusion-3.5-medium"
    call(export, "--lora_hf_path", source, "--pretrained", base, "--output_dir", tmp_path)
    card = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert (head["base_model"], head["base_model_relation"]) == (base, "adapter")
    assert f'from_pretrained("{base}", torch_dtype=torch.float16)' in card
    assert "Trained" not in card and "Evaluation" not in card and "Configuration" not in card
    # Without --pretrained, the base model is that named by the LoRA.
    call(export, "--lora_hf_path", tmp_path, "--output_dir", tmp_path / "again", "--adapter",
         "default")  # fmt: skip
    described = json.loads((tmp_path / "again" / "lora" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == base


class Hub:
    """Replacement of huggingface_hub's HfApi that records calls."""

    calls: tuple = ()

    def create_repo(self, repo_id, *, exist_ok):
        Hub.calls += (("create", repo_id, exist_ok),)

    def upload_folder(self, *, repo_id, folder_path):
        names = {path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*.*")}
        Hub.calls += (("upload", repo_id, names),)
        return "url"


def test_only_push_uploads(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", ())
    call(export, "--checkpoint_path", run_dir, "--output_dir", tmp_path / "kept")
    assert Hub.calls == ()
    pushed = ("--checkpoint_path", run_dir, "--output_dir", tmp_path / "pushed", "--push")
    call(export, *pushed, "me/shapes-lora")
    files = {
        "README.md",
        "samples.png",
        "pytorch_lora_weights.safetensors",
        "lora/adapter_model.safetensors",
        "lora/adapter_config.json",
    }
    expected = (("create", "me/shapes-lora", True), ("upload", "me/shapes-lora", files))
    assert Hub.calls == expected
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert "# me/shapes-lora" in card and 'load_lora_weights("me/shapes-lora"' in card
