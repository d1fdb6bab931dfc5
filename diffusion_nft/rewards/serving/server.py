"""HTTP server of a reward, for runs in other environments or on other machines.

``POST /score`` scores a batch, one batch at a time (format: protocol.py); ``GET /health`` describes
the reward, also while a batch is being scored.  Errors are ``{"detail": message}``: 401 for a wrong
token, 413 for a request beyond the limits, 422 for an invalid one, 500 if the reward fails.
"""

import asyncio
import hmac
import importlib.metadata
import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from torch import Tensor

from diffusion_nft.rewards import Reward
from diffusion_nft.rewards.combine import score_apart
from diffusion_nft.rewards.serving.protocol import (
    PROTOCOL,
    Health,
    ScoringAnswer,
    ScoringRequest,
    TooLarge,
    decode_images,
    read,
)

# Packages that scores may depend on, for /health.
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "transformers",
    "open_clip_torch",
    "opencv-python-headless",
    "rapidocr",
    "onnxruntime",
    "paddleocr",
    "paddlepaddle",
    "image-reward",
    "hpsv2x",
    "mmdet",
    "mmcv",
)
# Status of a request whose client has disconnected.
CLIENT_CLOSED_REQUEST = 499
# Maximum length of an error's message.
MAX_DETAIL = 2000

logger = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _detail(message: str) -> str:
    """``message`` in valid UTF-8 and bounded length."""
    return message.encode(errors="backslashreplace").decode()[:MAX_DETAIL]


def create_app(
    name: str,
    reward: Reward,
    device: torch.device,
    *,
    options: Mapping[str, Any],
    token: str,
    max_images: int,
    max_megabytes: float,
) -> FastAPI:
    """Application that serves ``reward`` as ``name``.

    ``device``: device of the images that the reward receives.  ``options``: the reward's options,
    for /health.  ``token``: required as ``Authorization: Bearer``, or "" for no token.
    ``max_images`` and ``max_megabytes`` (10^6 bytes): limits per request.
    """
    app = FastAPI(openapi_url=None)
    turn = asyncio.Lock()
    max_bytes = int(max_megabytes * 1e6)
    shown = {key: "***" if key == "api_key" else options[key] for key in options}
    shown = json.loads(json.dumps(shown))  # as a client receives it: tuples are lists
    health = Health(protocol=PROTOCOL, reward=name, options=shown, versions=versions())

    def authorize(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "the token is missing or wrong")

    async def body(request: Request) -> bytes:
        data = bytearray()
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            # Read to the end, because a client that is interrupted ignores the answer.
            if size <= max_bytes:
                data += chunk
        if size > max_bytes:
            raise HTTPException(413, f"this server accepts {max_megabytes:g} MB per request")
        return bytes(data)

    def decode(data: bytes) -> tuple[ScoringRequest, Tensor]:
        request = read(ScoringRequest, data)
        if request.reward != name:
            raise ValueError(f"reward {request.reward!r} was requested; this server has {name!r}")
        if request.options != shown:
            raise ValueError(
                f"the run started with a server with the options {request.options}, this one has "
                f"{shown}: scores would not be comparable"
            )
        if len(request.images) > max_images:
            count = len(request.images)
            raise TooLarge(f"{count} images in one request; this server accepts {max_images}")
        return request, decode_images(request.images)

    @torch.no_grad()
    def score(data: bytes) -> ScoringAnswer:
        try:
            request, images = decode(data)
        except TooLarge as error:
            raise HTTPException(413, _detail(str(error))) from error
        except ValueError as error:
            raise HTTPException(422, _detail(str(error))) from error
        try:
            # Per image after a failure: the run decides if it continues without some scores.
            output = score_apart(reward, images.to(device), request.prompts, request.metadata)
            reasons = {row: _detail(reason) for row, reason in output.reasons.items()}
            return ScoringAnswer.of(replace(output, reasons=reasons))
        except Exception as error:
            logger.exception("the reward %s failed", name)
            raise HTTPException(500, _detail(f"{type(error).__name__}: {error}")) from error

    @app.get("/health")
    async def get_health(request: Request) -> Health:
        authorize(request)
        return health

    @app.post("/score", response_model=None)
    async def post_score(request: Request) -> Response:
        authorize(request)
        data = await body(request)
        async with turn:
            # A client that timed out repeats the request; the reward need not score twice.
            if await request.is_disconnected():
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            answer = await run_in_threadpool(score, data)
            return Response(answer.model_dump_json(), media_type="application/json")

    return app
