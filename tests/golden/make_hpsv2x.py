"""Records what hpsv2x itself scores with a small random CLIP, for tests of the hpsv2 reward.

Writes hpsv2x.safetensors (weights and images) and hpsv2x.json (versions, architecture, prompts,
tokens, scores, and the state dict's shapes in the published size) beside this file.  It runs in an
environment of its own, of Python 3.11:

    pip install torch==2.13.0 torchvision==0.28.0 numpy safetensors
    pip install hpsv2x==1.2.0
    python tests/golden/make_hpsv2x.py

All is the package's own, ``score`` included, but for the architecture, a ViT-H-14 with fewer and
narrower layers, which is put where the package keeps its model.  The random weights are rounded to
float16 before anything is computed, to be stored in half the space.  Of the token embedding, only
the rows that the prompts use are random and stored; the others are zero.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from hpsv2 import img_score
from hpsv2.src import open_clip
from hpsv2.src.open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
NAME = "small-hpsv2x"
# Height and width: kept, enlarged, reduced; square, wide and tall, with odd and even padding.
SIZES = [(224, 224), (48, 48), (60, 97), (80, 33), (250, 310), (500, 40)]
PROMPTS = [
    "a cat",
    "Two RED cubes, painting!",
    "the café's   cat &amp; hat\n3 times, 日本 🙂",
    "",
    "an endless " + "very " * 90 + "long prompt",
]


def small_config():
    """ViT-H-14's, with fewer and narrower layers."""
    config = open_clip.get_model_config("ViT-H-14")
    config["embed_dim"] = 24
    config["vision_cfg"] |= {"layers": 2, "width": 48, "head_width": 16}
    config["text_cfg"] |= {"layers": 2, "width": 32, "heads": 4}
    return config


def randomize(model, token_ids, generator):
    """Random weights, rounded to float16, large enough to tell images and prompts apart."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "logit_scale":
            value = torch.tensor(4.5)
        elif "embedding" in name or name in ("visual.proj", "text_projection"):
            value = noise
        elif parameter.ndim < 2:
            value = 0.2 * noise + (".ln_" in f".{name}" and name.endswith("weight"))
        else:
            value = 1.5 * noise / parameter[0].numel() ** 0.5
        parameter.data = value.half().float()
    unused = torch.ones(len(model.token_embedding.weight), dtype=torch.bool)
    unused[token_ids] = False
    model.token_embedding.weight.data[unused] = 0


def image(size, generator):
    """A random image ``[H, W, 3]`` of 8 bits with coarse and fine detail."""
    coarse = torch.rand(1, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    return (noisy[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8)


def main():
    """Writes the two files beside this script."""
    generator = torch.Generator().manual_seed(0)
    tokens = open_clip.get_tokenizer("ViT-H-14")(PROMPTS)
    used = tokens.unique()
    with torch.device("meta"):
        published = CLIP(**open_clip.get_model_config("ViT-H-14")).state_dict()
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / f"{NAME}.json"
        file.write_text(json.dumps(small_config()))
        open_clip.add_model_config(file)
        model, _, preprocess = open_clip.create_model_and_transforms(
            NAME, precision="amp", light_augmentation=True, output_dict=True
        )
        randomize(model, used, generator)
        weights = model.state_dict()
        checkpoint = Path(name) / "HPS_v2.1_compressed.pt"
        torch.save({"state_dict": weights}, checkpoint)
        img_score.model_dict.update(model=model, preprocess_val=preprocess)
        images = [image(size, generator) for size in SIZES]
        scores = [
            [
                float(img_score.score(Image.fromarray(pixels.numpy()), prompt, str(checkpoint))[0])
                for prompt in PROMPTS
            ]
            for pixels in images
        ]

    tensors = {
        f"weights/{n}": t.half() for n, t in weights.items() if n != "token_embedding.weight"
    }
    tensors["token_ids"] = used
    tensors["token_rows"] = weights["token_embedding.weight"][used].half()
    tensors |= {f"pictures/{i}": pixels.contiguous() for i, pixels in enumerate(images)}
    save_file(tensors, HERE / "hpsv2x.safetensors")
    record = {
        "versions": {name: version(name) for name in ("hpsv2x", "torch", "torchvision", "pillow")},
        "config": small_config(),
        "prompts": PROMPTS,
        "tokens": tokens.tolist(),
        "scores": scores,
        "published_shapes": {name: list(tensor.shape) for name, tensor in published.items()},
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    (HERE / "hpsv2x.json").write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
