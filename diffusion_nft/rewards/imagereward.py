"""ImageReward-v1.0: BLIP and an MLP fine-tuned on human preferences (arXiv 2304.05977)."""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from diffusion_nft.images import to_pil
from diffusion_nft.rewards.clip_common import BatchedReward, tokenize
from diffusion_nft.rewards.weights import load_torch_file, load_weights, weight_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BlipConfig

MAX_TOKENS = 35
# Mean and standard deviation of the MLP's output in the image-reward package.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
# OpenAI's normalisation of images.
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_VIT = "blip.visual_encoder."
_LAYER, _BLOCK = r"vision\.encoder\.layers\.(\d+)\.", _VIT + r"blocks.\1."
# Our name (a regular expression) -> the published file's name.  The MLP's linear layers keep the
# numbers that they have between the published dropout layers.
_NAMES = [
    (r"vision\.embeddings\.class_embedding", _VIT + "cls_token"),
    (r"vision\.embeddings\.position_embedding", _VIT + "pos_embed"),
    (r"vision\.embeddings\.patch_embedding\.(\w+)", _VIT + r"patch_embed.proj.\1"),
    (_LAYER + r"self_attn\.qkv\.(\w+)", _BLOCK + r"attn.qkv.\2"),
    (_LAYER + r"self_attn\.projection\.(\w+)", _BLOCK + r"attn.proj.\2"),
    (_LAYER + r"layer_norm([12])\.(\w+)", _BLOCK + r"norm\2.\3"),
    (_LAYER + r"mlp\.fc([12])\.(\w+)", _BLOCK + r"mlp.fc\2.\3"),
    (r"vision\.post_layernorm\.(\w+)", _VIT + r"norm.\1"),
    (r"text\.(.+)", r"blip.text_encoder.\1"),
    *((rf"mlp\.{i}\.(\w+)", rf"mlp.layers.{n}.\1") for i, n in enumerate((0, 2, 4, 6, 7))),
]
# Tensors of the file without effect on the score: a buffer of positions 0, 1, 2... and BLIP's
# projections for its contrastive loss.
_UNUSED = {
    "blip.text_encoder.embeddings.position_ids",
    *(f"blip.{tower}_proj.{kind}" for tower in ("vision", "text") for kind in ("weight", "bias")),
}


def published_config() -> "BlipConfig":
    """ImageReward-v1.0's ViT-L/16 at 224 pixels and BERT-base with cross-attention to it."""
    from transformers import BlipConfig

    return BlipConfig(
        vision_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 16,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "vocab_size": 30524,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            # Builds the cross-attention; forward turns the causal mask off.
            "is_decoder": True,
        },
    )


class ImageRewardModel(nn.Module):
    """BLIP's text encoder with cross-attention to the image, and a linear MLP on its CLS token."""

    def __init__(self, config: "BlipConfig"):
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        text = cast("Any", config.text_config)
        self.vision: nn.Module = BlipVisionModel(cast("Any", config.vision_config))
        self.text: nn.Module = BlipTextModel(text, add_pooling_layer=False)
        widths = (text.hidden_size, 1024, 128, 64, 16, 1)
        self.mlp = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores ``[B]`` of ``pixels: [B, 3, S, S]``; ``input_ids, attention_mask: [B, T]``."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=image,
            # Bidirectional attention; True would apply the causal mask.
            is_decoder=False,
        ).last_hidden_state
        return (self.mlp(text[:, 0].float()).squeeze(1) - MEAN) / STD


def convert(weights: Any, names: Iterable[str], path: Path) -> dict[str, Tensor]:
    """The published state dict ``weights``, read from ``path``, under the model's ``names``.

    Raises ValueError for missing or unexpected tensors, and for a name of the model that is not in
    the table (another version of transformers).
    """
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path} holds a {type(weights).__name__}, not a state dict")
    origins = {name: _file_name(name) for name in names}
    problems = [f"{name} is missing" for name in origins.values() if name not in weights]
    unexpected = weights.keys() - set(origins.values()) - _UNUSED
    problems += [f"{name} is unexpected" for name in sorted(unexpected)]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(f"{path} does not fit, {len(problems)} problems:\n  {shown}")
    return {name: weights[origin] for name, origin in origins.items()}


def _file_name(name: str) -> str:
    for pattern, template in _NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(template)
    raise ValueError(f"transformers' {name} has no counterpart in ImageReward's checkpoint")


class ImageRewardReward(BatchedReward):
    """ImageReward-v1.0's score, roughly of mean 0 and standard deviation 1 on its authors' images.

    8-bit images, short side resized to 224 (Pillow, bicubic), centre crop, OpenAI's mean and std;
    prompts truncated to 35 tokens.

    ``backend``: "transformers", or "image-reward" for the package itself, which needs a separate
    environment and computes in float32 only.  ``weights``: the published ImageReward.pt (default:
    the one in reward_ckpts; the package downloads its own, or expects med_config.json next to
    ``weights``).  ``tokenizer`` (a hub name or local folder) and ``config`` (the architecture)
    apply to transformers only.

    Raises ValueError if weights, tokenizer and architecture do not fit, FileNotFoundError without
    the weights, OSError without the tokenizer and ImportError without the package.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        backend: Literal["transformers", "image-reward"] = "transformers",
        weights: Path | None = None,
        tokenizer: str = "bert-base-uncased",
        config: "BlipConfig | None" = None,
    ):
        self.scorer: Callable[[Tensor, list[str]], Tensor]
        if backend == "image-reward":
            if dtype != torch.float32:
                raise ValueError(f"the image-reward backend computes in float32, not {dtype}")
            self.scorer = _Package(device, weights)
        else:
            path = weights or weight_file("imagereward")
            self.scorer = _Blip(device, dtype, path, tokenizer, config or published_config())
        self.batch_size = batch_size

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.scorer(images, prompts)


class _Blip:
    """Scores ``[B]`` by transformers' BLIP."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        path: Path,
        tokenizer: str,
        config: "BlipConfig",
    ):
        self.device, self.dtype = device, dtype
        self.tokenizer = _load_tokenizer(tokenizer)
        vocabulary = cast("Any", config.text_config).vocab_size
        if len(self.tokenizer) != vocabulary:
            raise ValueError(
                f"the tokenizer {tokenizer} has {len(self.tokenizer)} tokens with [DEC] and [ENC], "
                f"but the model has {vocabulary}"
            )
        self.model = ImageRewardModel(config)
        weights = convert(load_torch_file(path), self.model.state_dict(), path)
        load_weights(self.model, weights, path)
        self.model.to(device).eval().requires_grad_(False)
        # The MLP stays in float32, which keeps the score's precision.
        self.model.vision.to(dtype=dtype)
        self.model.text.to(dtype=dtype)
        self.preprocess = _preprocess(cast("Any", config.vision_config).image_size)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = torch.stack([self.preprocess(image) for image in to_pil(images)])
        tokens = tokenize(self.tokenizer, prompts, MAX_TOKENS).to(self.device)
        return self.model(
            pixels.to(self.device, self.dtype), tokens["input_ids"], tokens["attention_mask"]
        )


def _load_tokenizer(name: str) -> Any:
    """BERT's tokenizer with BLIP's two extra tokens, which are in the vocabulary but unused."""
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(name)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"extra_special_tokens": ["[ENC]"]})
    return tokenizer


def _preprocess(size: int) -> "Callable[[Image], Tensor]":
    """RGB image -> ``[3, size, size]``: short side resized (bicubic), centre crop, normalised."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(PIXEL_MEAN, PIXEL_STD),
        ]
    )


class _Package:
    """Scores ``[B]`` by the image-reward package."""

    def __init__(self, device: torch.device, weights: Path | None):
        try:
            import ImageReward  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "the image-reward backend needs a separate environment with: pip install "
                'image-reward==1.5 transformers==4.53.3 openai-clip "setuptools<81" torchvision'
            ) from error
        if weights is None:
            self.model = ImageReward.load("ImageReward-v1.0", device=device)
        else:
            med_config = str(weights.with_name("med_config.json"))
            self.model = ImageReward.load(str(weights), device=device, med_config=med_config)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        pairs = zip(prompts, to_pil(images), strict=True)
        return torch.tensor([self.model.score(prompt, image) for prompt, image in pairs])
