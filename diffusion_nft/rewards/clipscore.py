"""CLIPScore: similarity of image and prompt under OpenAI's CLIP (arXiv 2104.08718)."""

import torch
from torch import Tensor

from diffusion_nft.rewards.clip_common import BatchedReward, Clip


class ClipScoreReward(BatchedReward):
    """logits_per_image[i, i] / 100 = exp(logit_scale) cos(text, image) / 100 with CLIP ViT-L/14.

    The scale is 100 in OpenAI's weights, so this is the cosine, about 0.15 to 0.35 in practice.
    As published, images are resized as floats (bilinear), not by Pillow.  ``model``: a hub name or
    a local folder.  Raises OSError if it is not available and ValueError if the weights do not fit.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        model: str = "openai/clip-vit-large-patch14",
    ):
        self.clip = Clip(model, processor=model, device=device, dtype=dtype)
        self.batch_size = batch_size

    def _score(self, images: Tensor, prompts: list[str]) -> Tensor:
        cosine = self.clip.cosine(self._pixels(images), prompts)
        return self.clip.logit_scale * cosine / 100

    def _pixels(self, images: Tensor) -> Tensor:
        """Model input ``[B, 3, 224, 224]``: short side to 224, centre crop, CLIP's mean and std."""
        import torchvision.transforms.functional as TF

        published = self.clip.image_processor
        crop = [published.crop_size["height"], published.crop_size["width"]]
        short_side = [published.size["shortest_edge"]]
        resized = TF.resize(
            images.to(self.clip.device).float(),
            short_side,
            interpolation=TF.InterpolationMode.BILINEAR,
            antialias=True,
        )
        cropped = TF.center_crop(resized, crop)
        return TF.normalize(cropped, list(published.image_mean), list(published.image_std))
