"""What travels between a run and a reward server: JSON with PNGs, over HTTP.

A PNG keeps 8 bits a channel exactly and JSON's numbers are the shortest decimals that name their
float64, so a served score is the local one to the last bit, where both are computed on the same
device, with the same `allow_tf32`, in the same batches.  Nothing is pickled.
"""

import base64
import binascii
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_nft.data.prompts import check_text
from diffusion_nft.images import to_pil
from diffusion_nft.rewards import RewardOutput

# Raised with every change that an older server or run would misread.
PROTOCOL = 1
# Environment variable of the shared secret that a server asks for, on both sides.
TOKEN_VARIABLE = "REWARD_SERVER_TOKEN"
# Of all images of a request: a PNG of a few kilobytes can unfold to gigabytes.
MAX_PIXELS = 256 * 1024 * 1024
# Zlib's fastest: the network is faster than its best.
COMPRESS_LEVEL = 1


def shared_token() -> str:
    """The token of the environment, empty for none.

    Raises ValueError, which does not quote it, for one that no HTTP header can hold.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    # Left to the HTTP library, this would be an error that prints the token.
    if not all("!" <= char <= "~" for char in token):
        raise ValueError(
            f"{TOKEN_VARIABLE} may hold printable ASCII only, no spaces and no line ends"
        )
    return token


class TooLarge(Exception):
    """A request beyond the limits of a server."""


@dataclass(frozen=True)
class ScoringRequest:
    """``images: float32 [B, 3, H, W]`` in [0, 1] on the CPU, and a prompt and a line for each."""

    images: Tensor
    prompts: list[str]
    metadata: list[dict]


def encode_images(images: Tensor) -> list[str]:
    """Base64 PNGs of ``images: [B, 3, H, W]`` in [0, 1], rounded to 8 bits a channel."""
    encoded = []
    for image in to_pil(images):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=COMPRESS_LEVEL)
        encoded.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
    return encoded


def encode_batch(
    reward: str,
    images: list[str],
    prompts: list[str],
    metadata: list[dict],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The request, for ``json``; ``options``: what the server told when the run began."""
    return {
        "protocol": PROTOCOL,
        "reward": reward,
        "images": images,
        "prompts": prompts,
        "metadata": metadata,
        "options": options,
    }


def decode_batch(request: Any, reward: str, max_images: int) -> ScoringRequest:
    """The batch of a request to a server of ``reward``.

    Raises ValueError that says what is wrong with it, TooLarge for more than ``max_images``
    images or MAX_PIXELS pixels.
    """
    if not isinstance(request, dict):
        raise ValueError(f"a JSON object is needed, not {type(request).__name__}")
    for key, ours in (("protocol", PROTOCOL), ("reward", reward)):
        if request.get(key) != ours:
            raise ValueError(f"{key} {request.get(key)!r} is asked for; this server has {ours!r}")
    encoded = _items(request, "images", str)
    prompts = _items(request, "prompts", str)
    metadata = _items(request, "metadata", dict)
    for number, prompt in enumerate(prompts):
        try:
            check_text(prompt)
        except ValueError as error:
            raise ValueError(f"prompt {number} holds {error}") from error
    count = len(encoded)
    if not count == len(prompts) == len(metadata) or not count:
        raise ValueError(
            f"{count} images, {len(prompts)} prompts and {len(metadata)} metadata: as many of "
            "each are needed, at least one"
        )
    if count > max_images:
        raise TooLarge(f"{count} images in one request; this server takes {max_images}")
    arrays = [_decode_image(text, i, MAX_PIXELS // count) for i, text in enumerate(encoded)]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError("the images differ in size")
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(torch.float32) / 255
    return ScoringRequest(images, prompts, metadata)


def _items(request: dict[str, Any], key: str, kind: type) -> list[Any]:
    values = request.get(key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{key!r} must be a list of {'objects' if kind is dict else 'texts'}")
    return values


def _decode_image(text: str, number: int, max_pixels: int) -> np.ndarray:
    """RGB values ``[H, W, 3]``, uint8."""
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > max_pixels:
                raise TooLarge(f"image {number} has more than {max_pixels} pixels")
            if image.mode != "RGB":
                raise ValueError(f"its mode is {image.mode}, not RGB of 8 bits")
            return np.array(image)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"image {number}: {error}") from error
    except (binascii.Error, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image {number} is no base64 PNG that can be read: {error}") from error


def encode_output(output: RewardOutput) -> dict[str, Any]:
    """The answer, for ``json``: NaN, of a component that does not apply or of an image without a
    score, is null.  Raises ValueError for an infinite number.
    """
    columns = {
        key: [None if math.isnan(value) else value for value in values.double().tolist()]
        for key, values in {"scores": output.scores, **output.components}.items()
    }
    for key, values in columns.items():
        if not all(value is None or math.isfinite(value) for value in values):
            raise ValueError(f"the reward returned {key} that are not finite: {values}")
    scores = columns.pop("scores")
    return {"scores": scores, "components": columns, "reasons": [*output.reasons.items()]}


def decode_output(answer: Any, count: int) -> RewardOutput:
    """Scores and components ``[count]``, float64, of an answer; ValueError for anything else."""
    if not isinstance(answer, dict) or not isinstance(answer.get("components"), dict):
        raise ValueError("the answer holds no scores and components")
    scores = _numbers("scores", answer.get("scores"), count)
    components: Mapping[str, Any] = answer["components"]
    try:
        reasons = {int(row): str(reason) for row, reason in answer.get("reasons", ())}
    except (TypeError, ValueError) as error:
        raise ValueError("the answer's reasons are no list of rows and texts") from error
    return RewardOutput(
        scores, {key: _numbers(key, values, count) for key, values in components.items()}, reasons
    )


def _numbers(key: str, values: Any, count: int) -> Tensor:
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)} of them" if isinstance(values, list) else "no list"
        raise ValueError(f"the answer's {key} are {found}, for {count} images")
    if not all(value is None or type(value) in (int, float) for value in values):
        raise ValueError(f"the answer's {key} are not all numbers")
    try:
        numbers = [math.nan if value is None else float(value) for value in values]
    except OverflowError as error:
        raise ValueError(f"the answer's {key} hold a number that is too large") from error
    if any(map(math.isinf, numbers)):
        raise ValueError(f"the answer's {key} hold an infinite number")
    return torch.tensor(numbers, dtype=torch.float64)
