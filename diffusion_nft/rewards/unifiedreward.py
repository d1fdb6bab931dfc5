"""UnifiedReward: a vision-language model that rates images from 1 to 5 (arXiv 2503.05236).

The model runs in a server with OpenAI's API, such as sglang or vLLM, shared by all ranks.
"""

import base64
import io
import json
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from diffusion_nft.images import to_pil
from diffusion_nft.rewards import RewardOutput

if TYPE_CHECKING:
    from openai import OpenAI

URL_VARIABLE = "UNIFIEDREWARD_BASE_URL"
KEY_VARIABLE = "UNIFIEDREWARD_API_KEY"
MODEL_VARIABLE = "UNIFIEDREWARD_MODEL"
DEFAULT_URL = "http://127.0.0.1:17140/v1"
DEFAULT_KEY = "flowgrpo"
DEFAULT_MODEL = "UnifiedReward-7b-v1.5"
START_COMMAND = (
    "python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 "
    "--api-key flowgrpo --port 17140 --chat-template chatml-llava"
)

SIDE = 512
MAX_SCORE = 5.0
# The question that the model was trained with.
QUESTION = (
    "<image>\n"
    "You are given a text caption and a generated image based on that caption. Your task is to "
    "evaluate this image based on two key criteria:\n"
    "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. "
    "Consider the accuracy of depicted objects, their relationships, and attributes as described "
    "in the caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
    "preservation, color accuracy, and overall aesthetic appeal.\n"
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\n"
    "Text Caption: [{prompt}]"
)
# The published pattern, which without its last part reads "10" as 1.
SCORE = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)(?!\d)")

# Seconds to accept a connection or list the models.
CONNECT_TIMEOUT_S = 10.0
# Seconds before a batch shows a progress bar.
BAR_DELAY = 10.0
MAX_QUOTED = 500


def score_of(answer: str) -> float | None:
    """The rating in [1, 5] after ``Final Score:`` in the model's ``answer``, or None."""
    match = SCORE.search(answer)
    rating = float(match[1]) if match else 0.0
    return rating if 1 <= rating <= MAX_SCORE else None


class UnifiedRewardReward:
    """UnifiedReward's rating of an image for its prompt, divided by 5.

    ``base_url``, ``api_key`` and ``model`` of the server default to the environment variables
    UNIFIEDREWARD_BASE_URL, UNIFIEDREWARD_API_KEY and UNIFIEDREWARD_MODEL, then to the published
    set-up.  ``model`` may be the end of a listed path, because sglang lists the path of the model.
    ``concurrency``: maximum number of requests in flight.  ``timeout``: seconds per attempt.
    Time-outs, lost connections, 408, 409, 429 and 5xx are retried up to ``max_retries`` times, with
    a delay that doubles from 0.5 to 8 s or that the server sets.  An image has no score after
    ``max_unparsable`` answers without a rating.

    Raises ImportError without openai, ConnectionError if the server cannot be reached, and
    ValueError if it refuses the key or lacks the model or API, or for an option out of range.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        model: str | None = None,
        concurrency: int = 32,
        timeout: float = 120.0,
        max_retries: int = 5,
        max_unparsable: int = 3,
    ):
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ImportError(
                'the unifiedreward reward needs: pip install -e ".[unifiedreward]"'
            ) from error
        if min(concurrency, max_unparsable) < 1 or max_retries < 0 or not timeout > 0:
            raise ValueError(
                "concurrency and max_unparsable must be at least 1, max_retries at least 0 and "
                f"timeout positive, not {concurrency}, {max_unparsable}, {max_retries}, {timeout}"
            )
        self.base_url = base_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"base_url must be like {DEFAULT_URL}, not {self.base_url!r}")
        # A proxy cannot reach addresses of this machine.
        self._use_proxy = address.hostname not in ("127.0.0.1", "localhost", "::1")
        self._api_key = api_key or os.environ.get(KEY_VARIABLE) or DEFAULT_KEY
        if not all("!" <= char <= "~" for char in self._api_key):
            # The HTTP library's error would print the key.
            raise ValueError(
                f"the API key (api_key or {KEY_VARIABLE}) must be printable ASCII without "
                "spaces or line ends"
            )
        self.concurrency, self.timeout = concurrency, timeout
        self.max_retries, self.max_unparsable = max_retries, max_unparsable
        self.model = self._listed(model or os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        """Scores in [0.2, 1], or NaN for an image without a rating.

        Raises ConnectionError if the server fails, and ValueError if it refuses a request or for
        another number of prompts than images.
        """
        from tqdm import tqdm

        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        pil_images = to_pil(images)
        # Threads and connections end with the call; threads may share the client.
        with self._client(self.timeout) as client, ThreadPoolExecutor(self.concurrency) as pool:
            # The first error ends ``map``, which cancels the calls that have not started.
            ratings = pool.map(
                lambda pair: self._rate(client, *pair), zip(pil_images, prompts, strict=True)
            )
            bar = tqdm(
                ratings,
                desc="unifiedreward",
                total=len(prompts),
                delay=BAR_DELAY,
                leave=False,
                disable=os.environ.get("RANK", "0") != "0",
            )
            answers = list(bar)
        ratings = torch.tensor([rating for rating, _ in answers], dtype=torch.float64)
        reasons = {row: reason for row, (_, reason) in enumerate(answers) if reason}
        return RewardOutput(ratings / MAX_SCORE, reasons=reasons)

    def _rate(self, client: "OpenAI", image: Image.Image, prompt: str) -> tuple[float, str]:
        """The rating in [1, 5] of one image and "", or NaN and the reason."""
        png = io.BytesIO()
        image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(png, format="PNG")
        url = f"data:image;base64,{base64.b64encode(png.getvalue()).decode('ascii')}"
        answer = ""
        for _ in range(self.max_unparsable):
            body = self._body(
                lambda: client.chat.completions.with_raw_response.create(
                    model=self.model,
                    messages=[
                        {
                            "role": "user",
                            "content": [
                                {"type": "image_url", "image_url": {"url": url}},
                                {"type": "text", "text": QUESTION.format(prompt=prompt)},
                            ],
                        }
                    ],
                    temperature=0,
                )
            )
            try:
                answer = str(json.loads(body)["choices"][0]["message"]["content"])
            except (ValueError, KeyError, IndexError, TypeError):
                answer = body  # not a chat completion
                continue
            rating = score_of(answer)
            if rating is not None:
                return rating, ""
        return math.nan, (
            f"got no rating from 1 to 5 after 'Final Score:' in max_unparsable = "
            f"{self.max_unparsable} answers of {self.model} at {self.base_url}; the last one was "
            f"{self._quoted(answer)}"
        )

    def _listed(self, model: str) -> str:
        """The server's name of ``model``; ValueError if it is not listed."""
        with self._client(min(self.timeout, CONNECT_TIMEOUT_S)) as client:
            body = self._body(client.models.with_raw_response.list)
        try:
            names = [str(entry["id"]) for entry in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.base_url} does not serve OpenAI's API (does it end in /v1?): /models "
                f"returns {self._quoted(body)}"
            ) from None
        if model in names:
            return model
        for name in names:
            if name.rstrip("/").endswith(f"/{model}"):
                return name
        raise ValueError(
            f"the server at {self.base_url} serves {', '.join(names) or 'no model'}, not {model}: "
            f"set model or {MODEL_VARIABLE}, or start a server with: {START_COMMAND}"
        )

    def _client(self, timeout: float) -> "OpenAI":
        from openai import DefaultHttpxClient, OpenAI, Timeout

        return OpenAI(
            base_url=self.base_url,
            api_key=self._api_key,
            timeout=Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT_S)),
            max_retries=self.max_retries,
            http_client=DefaultHttpxClient(trust_env=self._use_proxy),
        )

    def _body(self, request: Callable[[], Any]) -> str:
        """The response body of ``request``, a raw-response call of the client."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        # Not chained: errors of older clients quote the response, which may quote the key.
        try:
            return request().http_response.text
        except APIStatusError as error:
            reason = f"returns {error.status_code}, {self._quoted(error.response.text)}"
            if 400 <= error.status_code < 500 and error.status_code not in (408, 409, 429):
                raise ValueError(
                    f"the server at {self.base_url} {reason}: check base_url, api_key and model, "
                    f"or {URL_VARIABLE}, {KEY_VARIABLE} and {MODEL_VARIABLE}"
                ) from None
        except APITimeoutError:
            reason = "does not answer in time"
        except APIConnectionError as error:
            reason = f"cannot be reached, {self._quoted(str(error.__cause__ or error))}"
        raise ConnectionError(
            f"the server at {self.base_url} {reason} (up to {self.max_retries + 1} attempts): set "
            f"base_url or {URL_VARIABLE}, or start a server with: {START_COMMAND}"
        )

    def _quoted(self, text: str) -> str:
        """The beginning of ``text`` in quotes, without the API key."""
        return repr(text.replace(self._api_key, "***")[:MAX_QUOTED])
