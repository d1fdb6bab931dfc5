"""Tiny random models of the rewards' real architectures, and images to score."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

OPENAI_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
OPENAI_STD = np.array([0.26862954, 0.26130258, 0.27577711])
PROMPTS = ["a cat", "Two red cubes on a table", "the cat's hat, 3 times", "dusk over the sea"]
CPU = torch.device("cpu")


def smooth_images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Random images ``[count, 3, height, width]`` in [0, 1] with no fine detail."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


def eight_bit(image: Tensor) -> Image.Image:
    """``image: [3, H, W]`` in [0, 1] as an RGB image, by numpy."""
    return Image.fromarray(np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8))


def normalized(image: Image.Image) -> Tensor:
    """OpenAI's normalisation, by numpy; ``[1, 3, H, W]``."""
    pixels = (np.asarray(image) / 255 - OPENAI_MEAN) / OPENAI_STD
    return torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A folder with a tiny random CLIP, its tokenizer and the published image processor."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "th", "the</w>"]
    vocab = {token: i for i, token in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    merges = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>")]
    CLIPTokenizer(vocab=vocab, merges=merges).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)

    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 768,
        # Larger than usual, so that a random model tells images and prompts apart.
        "initializer_factor": 8.0,
    }
    special = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1}
    config = CLIPConfig(
        text_config={**tower, **special, "vocab_size": len(vocab)},
        vision_config={**tower, "image_size": 224, "patch_size": 32},
        projection_dim=768,
        logit_scale_init_value=4.4,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def reference_logits(tiny_clip):
    """(prompts, pixels) -> logits_per_image ``[B, B]`` of transformers' own forward."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = (
        CLIPModel.from_pretrained(tiny_clip).eval(),
        CLIPTokenizer.from_pretrained(tiny_clip),
    )

    @torch.no_grad()
    def logits(prompts: list[str], pixels: Tensor) -> Tensor:
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")
        return model(**tokens, pixel_values=pixels).logits_per_image

    return logits
