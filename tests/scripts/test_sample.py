"""The sampling script."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image

from diffusion_nft.images import Images
from diffusion_nft.models.lora import Lora, export_lora, scaled
from diffusion_nft.models.sd3 import SD3Model
from diffusion_nft.randomness import generator, normal
from diffusion_nft.shapes.model import PIPELINE_DIR, load_shapes_pipeline
from diffusion_nft.utils.files import DiskError
from tests.launch import LORA_TARGETS
from tests.scripts.in_process import call, script

sample = script("sample")
PROMPTS = ("a red circle", "a blue square")
BASE = "--pretrained shapes --resolution 48 --max_sequence_length 8 --mixed_precision no"
BASE = (*BASE.split(), "--num_inference_steps", "4")


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """A random LoRA of the built-in model with a visible effect."""
    g = torch.Generator().manual_seed(0)
    state = {}
    for name, module in load_shapes_pipeline().transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(LORA_TARGETS):
            state[f"{name}.lora_A.weight"] = torch.randn(4, module.in_features, generator=g) / 8
            state[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=g) / 8
    path = tmp_path_factory.mktemp("lora")
    export_lora(path, Lora(scaled(state, 2.0), "shapes"))
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def draw(folder: Path, *flags: object) -> dict[str, np.ndarray]:
    """Name -> image written by the script."""
    call(sample, *BASE, *flags, "--output_dir", folder)
    return {path.stem: pixels(path) for path in folder.glob("*.png")}


def test_an_image_depends_on_its_prompt_and_seed_alone(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue square\n\na red circle\n a blue square \n")
    both = draw(tmp_path / "both", "--prompts_file", prompts, "--seeds", 0, 1)
    assert sorted(both) == [
        "000-a-blue-square-seed0",
        "000-a-blue-square-seed1",
        "001-a-red-circle-seed0",
        "001-a-red-circle-seed1",
        "grid",
    ]
    alone = draw(tmp_path / "alone", "--prompt", "a red circle", "--seeds", 1)
    same = both["001-a-red-circle-seed1"]
    assert same.shape == (48, 48, 3)
    assert np.array_equal(alone["000-a-red-circle-seed1"], same)
    assert not np.array_equal(both["001-a-red-circle-seed0"], same)


def test_prompts_come_by_the_reader_of_prompt_sets(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = '{"tag": "x", "prompt": "a red circle"}\n\n{"prompt": "一个 蓝色的_हिन्दी!"}\n'
    prompts.write_text(lines, encoding="utf-8")
    drawn = draw(tmp_path / "out", "--prompts_file", prompts)
    names = ["000-a-red-circle-seed0", "001-一个-蓝色的-हिन्दी-seed0", "grid"]
    assert sorted(drawn) == names
    prompts.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r'prompts.jsonl, line 2: no "prompt"'):
        draw(tmp_path / "none", "--prompts_file", prompts)


def test_a_failure_leaves_what_was_drawn_and_the_same_command_overwrites(tmp_path, monkeypatch):
    real, left = sample.save_png, [1]

    def full(image, path):
        if not left:
            raise DiskError(28, f"{path} could not be written")
        left.pop()
        real(image, path)

    monkeypatch.setattr(sample, "save_png", full)
    asked = ("--prompt", "a red circle", "--seeds", 0, 1)
    with pytest.raises(DiskError, match="000-a-red-circle-seed1"):
        draw(tmp_path, *asked)
    (kept,) = tmp_path.iterdir()
    assert kept.name == "000-a-red-circle-seed0.png"
    monkeypatch.setattr(sample, "save_png", real)
    whole = pixels(kept)
    Image.new("RGB", (1, 1)).save(kept)
    assert np.array_equal(draw(tmp_path, *asked)[kept.stem], whole)


def test_compare_draws_the_base_model_too(tmp_path, lora):
    asked = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    pairs = draw(tmp_path / "pairs", *asked, "--lora_hf_path", lora, "--compare")
    base = draw(tmp_path / "base", *asked)
    with_lora = draw(tmp_path / "lora", *asked, "--lora_hf_path", lora)
    for name in ("000-a-red-circle-seed0", "001-a-blue-square-seed0"):
        assert np.array_equal(pairs[f"{name}-base"], base[name])
        assert np.array_equal(pairs[name], with_lora[name])
        assert not np.array_equal(base[name], with_lora[name])
    assert len(pairs) == 2 * len(PROMPTS) + 1
    # The grid has both, enlarged by repeating pixels.
    for name in ("000-a-red-circle-seed0-base", "000-a-red-circle-seed0"):
        assert holds(pairs["grid"], np.kron(pairs[name], np.ones((3, 3, 1), np.uint8))), name


def holds(sheet: np.ndarray, image: np.ndarray) -> bool:
    """True if ``image`` occurs in ``sheet``."""
    height, width, _ = image.shape
    rows, columns = (sheet.shape[i] - image.shape[i] + 1 for i in (0, 1))
    corners = np.argwhere((sheet[:rows, :columns] == image[0, 0]).all(-1))
    return any(np.array_equal(sheet[y : y + height, x : x + width], image) for y, x in corners)


def test_the_lora_of_another_model_is_one_clear_line(tmp_path):
    key = "single_transformer_blocks.0.attn.to_q.lora_{}.weight"
    state = {key.format("A"): torch.zeros(4, 8), key.format("B"): torch.zeros(8, 4)}
    export_lora(tmp_path, Lora(state, "other"))
    with pytest.raises(ValueError) as caught:
        draw(tmp_path / "out", "--prompt", "x", "--lora_hf_path", tmp_path)
    said = str(caught.value)
    assert "\n" not in said and str(tmp_path) in said and "base model shapes" in said
    assert "does not fit this model" in said


def test_either_adapter_of_a_published_checkpoint(tmp_path):
    """Two adapters saved by PEFT, as in the published code."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(LORA_TARGETS), init_lora_weights=False
    )
    wrapped = get_peft_model(load_shapes_pipeline().transformer, config)
    wrapped.add_adapter("old", config)
    wrapped.save_pretrained(str(tmp_path / "checkpoint-30" / "lora"))
    folder = tmp_path / "checkpoint-30"
    asked = ("--prompt", PROMPTS[0], "--lora_hf_path")
    default = draw(tmp_path / "default", *asked, folder)
    old = draw(tmp_path / "old", *asked, folder, "--adapter", "old")
    by_path = draw(tmp_path / "path", *asked, folder / "lora" / "old")
    name = "000-a-red-circle-seed0"
    assert np.array_equal(old[name], by_path[name])
    assert not np.array_equal(old[name], default[name])


def test_a_lora_on_other_layers_is_drawn_as_diffusers_draws_it(tmp_path, capsys):
    pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR)
    layers = ["ff.net.0.proj", "norm1.linear", "proj_out"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    about = _collate_lora_metadata({"transformer": pipe.transformer})
    about["transformer_lora_adapter_metadata"]["base_model_name_or_path"] = "owner/other"
    state = get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(tmp_path, state, **about)
    drawn = draw(tmp_path / "out", "--prompt", PROMPTS[0], "--lora_hf_path", tmp_path)
    said = capsys.readouterr().err
    assert "the LoRA names owner/other as its base model; it is used on shapes" in said
    assert "on other layers than those that training adapts: 11 more (proj_out, ...), 39 " in said
    pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR)
    pipe.load_lora_weights(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPTS[0],
        latents=normal((4, 12, 12), [generator(0, "sample")]),
        num_inference_steps=4,
        guidance_scale=1.0,
        height=48,
        width=48,
        max_sequence_length=8,
        output_type="np",
    ).images[0]
    assert np.abs(drawn["000-a-red-circle-seed0"] / 255 - theirs).max() <= 0.51 / 255
    base = draw(tmp_path / "base", "--prompt", PROMPTS[0])
    assert not np.array_equal(base["000-a-red-circle-seed0"], drawn["000-a-red-circle-seed0"])


def test_a_non_finite_image_is_an_error(tmp_path, monkeypatch):
    real, calls = SD3Model.decode, []

    def decode(self, x0):
        calls.append(len(x0))
        images = real(self, x0)
        return Images(images.pixels, images.finite & (len(calls) != 2))

    monkeypatch.setattr(SD3Model, "decode", decode)
    with pytest.raises(ValueError, match=r"'b', seed 0, has NaN or inf.* the 1 images before"):
        draw(tmp_path, "--prompt", "a", "--prompt", "b", "--prompt", "c")
    assert [path.name for path in tmp_path.iterdir()] == ["000-a-seed0.png"]
