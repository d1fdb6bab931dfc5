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


def _checked_text(text: str) -> str:
    check_text(text)
    return text


class ScoringRequest(BaseModel):
    """A batch for the server of ``reward``: base64 PNGs, and a prompt and a line for each.

    ``options``: what the server told in /health when the run began.
    """

    model_config = ConfigDict(strict=True)

    protocol: Literal[1]  # PROTOCOL
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
                "as many of each are needed, at least one"
            )
        return self


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Column = Annotated[list[Number | None], FailFast()]


class ScoringAnswer(BaseModel):
    """The scores of a batch; null, of a component that does not apply or of an image without a
    score, stands for NaN.  ``reasons``: of missing scores, with their rows.
    """

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
        """Scores and components ``[count]``, float64; ValueError for another count."""
        columns = {}
        for key, values in {"scores": self.scores, **self.components}.items():
            if len(values) != count:
                raise ValueError(f"{key} are {len(values)} numbers, for {count} images")
            numbers = [math.nan if value is None else value for value in values]
            columns[key] = torch.tensor(numbers, dtype=torch.float64)
        return RewardOutput(columns.pop("scores"), columns, dict(self.reasons))


class Health(BaseModel):
    """What a server serves: the reward's options and the versions its scores may depend on."""

    protocol: int
    reward: str
    options: dict[str, Any]
    versions: dict[str, str] = {}


M = TypeVar("M", bound=BaseModel)


def read(model: type[M], data: bytes) -> M:
    """``data`` as a ``model``; ValueError with one line that says what is wrong with it."""
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
    """Base64 PNGs of ``images: [B, 3, H, W]`` in [0, 1], rounded to 8 bits a channel."""
    encoded = []
    for image in to_pil(images):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=COMPRESS_LEVEL)
        encoded.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
    return encoded


def decode_images(encoded: Sequence[str]) -> Tensor:
    """float32 ``[B, 3, H, W]`` in [0, 1] of base64 PNGs, on the CPU.

    Raises ValueError that says what is wrong with one, TooLarge for more than MAX_PIXELS pixels.
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
        raise ValueError(f"image {number} is no base64 PNG that can be read: {error}") from error
