"""Protocol between a run and a reward server: JSON with PNGs over HTTP, without pickles.

PNGs preserve 8 bits per channel and JSON preserves float64, so that a served score is bitwise equal
to the local one, if both are computed on the same device, with the same `allow_tf32`, in the same
batches.
"""

import base64
import binascii
import io
import math
import os
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)
from torch import Tensor

from diffusion_nft.data.prompts import check_text
from diffusion_nft.images import to_pil
from diffusion_nft.rewards import RewardOutput

# Version; incremented with every incompatible change.
PROTOCOL = 2
# Environment variable of the shared secret, for server and run.
TOKEN_VARIABLE = "REWARD_SERVER_TOKEN"
# Limit per request: a PNG of a few kilobytes can decompress to gigabytes.
MAX_PIXELS = 256 * 1024 * 1024
# zlib's fastest level; higher ones take longer than the transfer that they save.
COMPRESS_LEVEL = 1


def shared_token() -> str:
    """The token in the environment, or "".

    Raises ValueError, without quoting it, if it is not valid in an HTTP header.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    # The HTTP library's error would print the token.
    if not all("!" <= char <= "~" for char in token):
        raise ValueError(f"{TOKEN_VARIABLE} must be printable ASCII without spaces or line ends")
    return token


class TooLarge(Exception):
    """A request that exceeds the limits of a server."""


def _checked_text(text: str) -> str:
    check_text(text)
    return text


class ScoringRequest(BaseModel):
    """A batch of base64 PNGs, with one prompt and one metadata line per image.

    ``options``: the server's options in /health at the start of the run.
    """

    model_config = ConfigDict(strict=True)

    protocol: Literal[2]  # PROTOCOL
    reward: str
    options: dict[str, Any]
    images: Annotated[list[str], FailFast()]
    prompts: Annotated[list[Annotated[str, AfterValidator(_checked_text)]], FailFast()]
    metadata: Annotated[list[dict[str, Any]], FailFast()]

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        count = len(self.images)
        if not count == len(self.prompts) == len(self.metadata) or not count:
            raise ValueError(
                f"{count} images, {len(self.prompts)} prompts and {len(self.metadata)} metadata: "
                "the numbers must be equal and at least one"
            )
        return self


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Column = Annotated[list[Number | None], FailFast()]


class ScoringAnswer(BaseModel):
    """The scores of a batch, with null for NaN.  ``reasons``: (row, reason) of missing scores."""

    scores: Column
    components: dict[str, Column]
    reasons: list[tuple[int, str]] = []

    @classmethod
    def of(cls, output: RewardOutput) -> Self:
        """Raises ValueError for an infinite number."""
        columns = {
            key: [None if math.isnan(value) else value for value in values.double().tolist()]
            for key, values in {"scores": output.scores, **output.components}.items()
        }
        with _in_one_line():
            return cls(
                scores=columns.pop("scores"),
                components=columns,
                reasons=list(output.reasons.items()),
            )

    def output(self, count: int) -> RewardOutput:
        """Scores and components ``[count]``, float64; ValueError for another number of them."""
        columns = {}
        for key, values in {"scores": self.scores, **self.components}.items():
            if len(values) != count:
                raise ValueError(f"{key} has {len(values)} numbers for {count} images")
            numbers = [math.nan if value is None else value for value in values]
            columns[key] = torch.tensor(numbers, dtype=torch.float64)
        return RewardOutput(columns.pop("scores"), columns, dict(self.reasons))


class Health(BaseModel):
    """A server's reward, with its options and the versions that scores may depend on."""

    protocol: int
    reward: str
    options: dict[str, Any]
    versions: dict[str, str] = {}


M = TypeVar("M", bound=BaseModel)


def read(model: type[M], data: bytes) -> M:
    """Parses ``data``; ValueError with a one-line description of the first problem."""
    with _in_one_line():
        return model.model_validate_json(data)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        line = error["msg"].removeprefix("Value error, ")
        if error["loc"]:
            line = f"{'.'.join(map(str, error['loc']))}: {line}"
        if error["type"] not in ("json_invalid", "missing", "value_error"):
            line += f", not {reprlib.repr(error['input'])}"
        raise ValueError(line) from errors


def encode_images(images: Tensor) -> list[str]:
    """Base64 PNGs of ``images: [B, 3, H, W]`` in [0, 1], rounded to 8 bits per channel."""
    encoded = []
    for image in to_pil(images):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=COMPRESS_LEVEL)
        encoded.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
    return encoded


def decode_images(encoded: Sequence[str]) -> Tensor:
    """Base64 PNGs -> float32 ``[B, 3, H, W]`` in [0, 1] on the CPU.

    Raises ValueError for an invalid image, and TooLarge for more than MAX_PIXELS pixels in total.
    """
    limit = MAX_PIXELS // len(encoded)
    arrays = [_decode_image(text, number, limit) for number, text in enumerate(encoded)]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError("the images differ in size")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(torch.float32) / 255


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
        raise ValueError(f"image {number} is not a readable base64 PNG: {error}") from error
