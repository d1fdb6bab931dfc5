"""ImageReward against the package's scores, which golden/make_imagereward.py recorded."""

import json
from pathlib import Path

import pytest
import torch
from rewards.conftest import CPU
from safetensors.torch import load_file
from torch import Tensor
from transformers import BlipConfig

from diffusion_nft.rewards import imagereward
from diffusion_nft.rewards.imagereward import (
    ImageRewardModel,
    ImageRewardReward,
    convert,
    published_config,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
RECORD = json.loads((GOLDEN / "imagereward.json").read_text())
PROMPTS = RECORD["prompts"]
TEXT_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
)


def recorded(prefix: str) -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / "imagereward.safetensors")
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


IMAGES = {int(n): t.permute(2, 0, 1) / 255 for n, t in recorded("pictures/").items()}


def golden_config() -> BlipConfig:
    vision = RECORD["vision_config"]
    return BlipConfig(
        vision_config={
            "hidden_size": vision["embed_dim"],
            "intermediate_size": 4 * vision["embed_dim"],
            "num_hidden_layers": vision["depth"],
            "num_attention_heads": vision["num_heads"],
            "image_size": 224,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            **{name: RECORD["text_config"][name] for name in TEXT_NAMES},
            "bos_token_id": len(RECORD["vocabulary"]),
            "sep_token_id": 3,
        },
    )


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The recorded state dict as the package saved it: under its names, in float32."""
    state = recorded("weights/")
    return {n: t.float() if t.is_floating_point() else t for n, t in state.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights):
    """ImageReward.pt and a folder named bert, like the published ones."""
    root = tmp_path_factory.mktemp("imagereward")
    torch.save(weights, root / "ImageReward.pt")
    (root / "bert").mkdir()
    (root / "bert" / "vocab.txt").write_text("\n".join(RECORD["vocabulary"]) + "\n")
    settings = {"do_lower_case": True, "model_max_length": 512}
    (root / "bert" / "tokenizer_config.json").write_text(json.dumps(settings))
    return root


def build(folder: Path, **options) -> ImageRewardReward:
    options = {"weights": folder / "ImageReward.pt", "config": golden_config()} | options
    return ImageRewardReward(CPU, tokenizer=str(folder / "bert"), **options)


@pytest.fixture(scope="module")
def reward(folder):
    return build(folder)


def build_with(weights, folder: Path, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "changed.pt")
    build(folder, weights=tmp_path / "changed.pt")


@pytest.mark.parametrize("image", IMAGES)
def test_the_scores_are_the_packages(reward, image):
    images = IMAGES[image][None].expand(len(PROMPTS), -1, -1, -1)
    scores = reward(images, PROMPTS, [{}] * len(PROMPTS)).scores
    assert torch.allclose(scores, torch.tensor(RECORD["scores"][image]), rtol=0, atol=5e-6)


def test_the_package_scores_as_recorded(folder, tmp_path, monkeypatch):
    pytest.importorskip("ImageReward", reason="runs where make_imagereward.py does")
    from golden import make_imagereward
    from ImageReward.models.BLIP import blip_pretrain

    published_mlp = make_imagereward.package.MLP
    width = RECORD["text_config"]["hidden_size"]
    monkeypatch.setattr(blip_pretrain, "create_vit", make_imagereward.small_vision)
    monkeypatch.setattr(make_imagereward.package, "MLP", lambda _: published_mlp(width))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert-base-uncased").symlink_to(folder / "bert")
    (folder / "med_config.json").write_text(json.dumps(RECORD["text_config"]))
    reward = ImageRewardReward(
        CPU, backend="image-reward", weights=folder / "ImageReward.pt", batch_size=4
    )
    images = IMAGES[3][None].expand(len(PROMPTS), -1, -1, -1)
    scores = reward(images, PROMPTS, [{}] * len(PROMPTS)).scores
    assert torch.allclose(scores, torch.tensor(RECORD["scores"][3]), rtol=0, atol=5e-6)


def test_the_recorded_scores_tell_images_and_prompts_apart():
    scores = torch.tensor(RECORD["scores"])
    assert scores.std(0).min() > 0.1 and scores.std(1).min() > 0.05


def test_the_tokens_are_the_packages(folder):
    tokenizer = imagereward._load_tokenizer(str(folder / "bert"))
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35)
    assert tokens["input_ids"] == RECORD["tokens"]


def test_the_published_architecture_takes_every_published_tensor():
    with torch.device("meta"):
        model = ImageRewardModel(published_config())
        published = {n: torch.empty(shape) for n, shape in RECORD["published_shapes"].items()}
    target = model.state_dict()
    converted = convert(published, target, Path("ImageReward.pt"))
    assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in target.items()}
    # Neither the heads nor the numbers below show in the shapes.
    assert published_config().vision_config.num_attention_heads == 16
    assert published_config().vision_config.layer_norm_eps == 1e-6
    text = published_config().text_config
    assert {n: getattr(text, n) for n in TEXT_NAMES} == {
        n: RECORD["published_text_config"][n] for n in TEXT_NAMES
    }


def test_each_image_meets_its_own_prompt_alone(reward):
    """Two rows for two pairs, not four."""
    rows = []
    hook = reward.scorer.model.text.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    images = torch.stack([IMAGES[2], IMAGES[3]])
    pair = reward(images, PROMPTS[:2], [{}] * 2).scores
    hook.remove()
    assert rows == [2]
    assert torch.allclose(
        pair, torch.tensor([RECORD["scores"][2][0], RECORD["scores"][3][1]]), atol=1e-5
    )


def test_missing_unexpected_and_misshapen_weights_are_refused(weights, folder, tmp_path):
    key = "blip.visual_encoder.blocks.1.attn.qkv.bias"
    with pytest.raises(ValueError, match=rf"(?s)changed\.pt does not fit.*{key} is missing"):
        build_with({n: t for n, t in weights.items() if n != key}, folder, tmp_path)
    with pytest.raises(ValueError, match=r"(?s)does not fit.*blip\.itm_head\.bias is unexpected"):
        build_with({**weights, "blip.itm_head.bias": torch.zeros(2)}, folder, tmp_path)
    with pytest.raises(ValueError, match=r"(?s)does not fit.*size mismatch for mlp\.4\.weight"):
        build_with({**weights, "mlp.layers.7.weight": torch.zeros(1, 15)}, folder, tmp_path)
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        build_with([1], folder, tmp_path)


def test_what_does_not_touch_the_score_may_be_absent(weights, folder, tmp_path):
    unused = {"blip.text_encoder.embeddings.position_ids", "blip.text_proj.bias"}
    assert unused <= weights.keys()
    build_with({n: t for n, t in weights.items() if n not in unused}, folder, tmp_path)


def test_a_name_that_transformers_changed_is_an_error(weights):
    with pytest.raises(ValueError, match=r"vision\.encoder\.stage\.0\.weight has no counterpart"):
        convert(weights, ["vision.encoder.stage.0.weight"], Path("ImageReward.pt"))


def test_a_tokenizer_of_another_vocabulary_is_refused(folder, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(RECORD["vocabulary"][:-1]) + "\n")
    count = len(RECORD["vocabulary"]) + 1
    with pytest.raises(ValueError, match=f"has {count} tokens with .* the model has {count + 1}"):
        ImageRewardReward(
            CPU,
            tokenizer=str(tmp_path),
            weights=folder / "ImageReward.pt",
            config=golden_config(),
        )
