"""Records what the image-reward package scores with a small random model, for tests of the reward.

Writes imagereward.safetensors (weights and images) and imagereward.json (versions, architecture,
vocabulary, prompts, tokens, scores, and the state dict's shapes in the published size) beside this
file.  It runs in an environment of its own, of Python 3.11:

    pip install torch==2.13.0 torchvision==0.28.0 numpy pillow safetensors
    pip install image-reward==1.5 transformers==4.53.3 openai-clip "setuptools<81"
    python tests/golden/make_imagereward.py

All is the package's own, ``load`` and ``score`` included, but for what it fixes in its code and
would make the model large: the vision tower's width, depth and heads, the MLP's input width, and
the vocabulary (a local folder named bert-base-uncased).  The random weights are rounded to float16
before anything is computed, to be stored in half the space.
"""

import importlib
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

import ImageReward as RM
import torch
from ImageReward.models.BLIP import blip_pretrain
from ImageReward.models.BLIP.vit import VisionTransformer
from PIL import Image
from safetensors.torch import save_file

# By name: the package's attribute ImageReward is the class.
package = importlib.import_module("ImageReward.ImageReward")
HERE = Path(__file__).resolve().parent
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
WORDS = "the cat red two cube ##ing on of paint"
VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *LETTERS,
    *".,!'\"-:()[]",
    *(f"##{letter}" for letter in LETTERS),
    *WORDS.split(),
]
# BLIP's med_config.json; ImageReward-v1.0's is the same.
PUBLISHED_TEXT = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "vocab_size": len(VOCABULARY) + 2,  # [DEC] and [ENC]
}
VISION = {"embed_dim": 48, "depth": 2, "num_heads": 3}
# Height and width of two images each: resized up and down, with odd and even margins to crop.
SIZES = [(224, 224), (48, 48), (33, 32), (60, 97), (256, 310)]
PROMPTS = [
    "a cat",
    "Two RED cubes, painting!",
    "Café [ENC] of the cat [DEC]",
    "",
    'a "cat" (the red one) on two cubes: a painting of the cats, painted on a cube of the red cat, '
    "and the rest is cut off",
    "x",
]


def small_vision(vit, image_size, use_grad_checkpointing, ckpt_layer, drop_path_rate):
    """The package's create_vit with another width, depth and number of heads."""
    del vit, use_grad_checkpointing, ckpt_layer, drop_path_rate
    tower = VisionTransformer(img_size=image_size, patch_size=16, drop_path_rate=0.1, **VISION)
    return tower, VISION["embed_dim"]


def randomize(model, generator):
    """Random weights, rounded to float16, large enough to tell images and prompts apart."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            value = 0.2 * noise + ("norm" in name.lower() and name.endswith("weight"))
        elif "embed" in name and "patch" not in name:
            value = noise
        else:
            gain = 1.0 if name.startswith("mlp.") else 1.5
            value = gain * noise / parameter[0].numel() ** 0.5
        parameter.data = value.half().float()


def names_and_shapes(text, folder):
    """Those of the package's model with the text tower ``text``."""
    config = folder / "med_config.json"
    config.write_text(json.dumps(text))
    state = package.ImageReward(med_config=str(config)).state_dict()
    return {name: list(tensor.shape) for name, tensor in state.items()}


def image(size, generator):
    """A random image ``[H, W, 3]`` of 8 bits with coarse and fine detail."""
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    return (noisy[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8)


def main():
    """Writes the two files beside this script."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chdir(folder)
        tokenizer = folder / "bert-base-uncased"
        tokenizer.mkdir()
        (tokenizer / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
        published = names_and_shapes(PUBLISHED_TEXT, folder)

        blip_pretrain.create_vit = small_vision
        published_mlp = package.MLP
        package.MLP = lambda input_size: published_mlp(TEXT["hidden_size"])
        config = folder / "med_config.json"
        config.write_text(json.dumps(PUBLISHED_TEXT | TEXT))
        model = package.ImageReward(med_config=str(config))
        randomize(model, generator)
        torch.save(model.state_dict(), folder / "ImageReward.pt")
        model = RM.load(str(folder / "ImageReward.pt"), device="cpu", med_config=str(config))

        images = [image(size, generator) for size in SIZES for _ in range(2)]
        with torch.no_grad():
            scores = [
                [model.score(prompt, Image.fromarray(pixels.numpy())) for prompt in PROMPTS]
                for pixels in images
            ]
        tokens = model.blip.tokenizer(
            PROMPTS, padding="max_length", truncation=True, max_length=35
        ).input_ids

    tensors = {
        f"weights/{name}": tensor.half() if tensor.is_floating_point() else tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }
    tensors |= {f"pictures/{i}": pixels.contiguous() for i, pixels in enumerate(images)}
    save_file(tensors, HERE / "imagereward.safetensors")
    record = {
        "versions": {
            name: version(name)
            for name in ("image-reward", "transformers", "timm", "torch", "torchvision", "pillow")
        },
        "text_config": PUBLISHED_TEXT | TEXT,
        "vision_config": VISION,
        "vocabulary": VOCABULARY,
        "prompts": PROMPTS,
        "tokens": tokens,
        "mean": model.mean,
        "std": model.std,
        "scores": scores,
        "published_text_config": PUBLISHED_TEXT,
        "published_shapes": published,
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    (HERE / "imagereward.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
