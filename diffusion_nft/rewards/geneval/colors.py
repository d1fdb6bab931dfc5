"""Zero-shot colours of detected objects with OpenAI's CLIP ViT-L/14."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusion_nft.rewards.geneval.verdict import Detection
from diffusion_nft.rewards.geneval.vocabulary import COLORS

if TYPE_CHECKING:
    from open_clip import CLIP

# Plain "ViT-L-14" would run OpenAI's weights with the wrong activation and only warn.
ARCHITECTURE = "ViT-L-14-quickgelu"
BACKGROUND = "#999"
TEMPLATES = (
    "a photo of a {color} {label}",
    "a photo of a {color}-colored {label}",
    "a photo of a {color} object",
)


class ColorClassifier:
    """Classifies the colours of crops, with one pass of the image tower per call.

    The text feature of a colour and a class is the renormalised mean of the normalised features of
    TEMPLATES, computed at the first use of the class.
    """

    def __init__(
        self,
        clip: "CLIP",
        preprocess: Callable[[Image.Image], Tensor],
        tokenize: Callable[[list[str]], Tensor],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.clip = clip.to(device=device, dtype=dtype).eval()
        self.preprocess = preprocess
        self.tokenize = tokenize
        self.device, self.dtype = device, dtype
        self._text_features: dict[str, Tensor] = {}

    @staticmethod
    def load(
        device: torch.device,
        weights: str = "openai",
        architecture: str = ARCHITECTURE,
        dtype: torch.dtype = torch.float32,
    ) -> "ColorClassifier":
        """OpenCLIP's ``architecture`` with ``weights``, a name known to open_clip or a file.

        Raises ImportError without open_clip, ValueError for a model without QuickGELU, and OSError
        if the weights are not available.
        """
        try:
            import open_clip
        except ImportError as error:
            raise ImportError('the geneval reward needs: pip install -e ".[geneval]"') from error
        config = open_clip.get_model_config(architecture)
        if config is None or not config.get("quick_gelu"):
            raise ValueError(
                f"GenEval's colours need a QuickGELU model like {ARCHITECTURE}, not {architecture}"
            )
        try:
            parts: tuple[Any, ...] = open_clip.create_model_and_transforms(
                architecture, pretrained=weights, weights_only=True
            )
        except RuntimeError as error:
            raise OSError(
                f"the weights {weights!r} of {architecture}, for GenEval's colours, are not "
                f"available (`python scripts/download.py geneval` fetches them): {error}"
            ) from error
        clip, _, preprocess = parts
        tokenize = open_clip.get_tokenizer(architecture)
        return ColorClassifier(clip.requires_grad_(False), preprocess, tokenize, device, dtype)

    @torch.no_grad()
    def __call__(self, crops: Sequence[Image.Image], labels: Sequence[str]) -> list[str]:
        """Colours of ``crops`` of objects of the classes ``labels``."""
        if not crops:
            return []
        self._remember(labels)
        pixels = torch.stack([self.preprocess(crop) for crop in crops]).to(self.device, self.dtype)
        features = F.normalize(self.clip.encode_image(pixels).float(), dim=-1)
        texts = torch.stack([self._text_features[label] for label in labels])
        best = torch.einsum("nd,ncd->nc", features, texts).argmax(-1)
        return [COLORS[index] for index in best.tolist()]

    def _remember(self, labels: Sequence[str]) -> None:
        """Computes the text features ``[colours, D]`` of new classes, in one pass."""
        new = [label for label in dict.fromkeys(labels) if label not in self._text_features]
        if not new:
            return
        prompts = [
            template.format(color=color, label=label)
            for label in new
            for color in COLORS
            for template in TEMPLATES
        ]
        features = F.normalize(
            self.clip.encode_text(self.tokenize(prompts).to(self.device)).float(), dim=-1
        )
        features = features.unflatten(0, (len(new), len(COLORS), len(TEMPLATES))).mean(2)
        self._text_features |= dict(zip(new, F.normalize(features, dim=-1), strict=True))


def object_crop(image: Image.Image, detection: Detection) -> Image.Image:
    """Crops the object's box from ``image``, with grey outside its mask.

    The box's corners are rounded; Pillow fills the area outside the image with black.
    """
    if detection.mask is not None:
        blank = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, blank, Image.fromarray(detection.mask))
    x0, y0, x1, y1 = (round(side) for side in detection.box)
    return image.crop((x0, y0, x1, y1))
