"""A reward behind HTTP, for runs in other environments or on other machines.

``POST /score`` scores a batch, one batch at a time (protocol.py has the format); ``GET /health``
says what is served, also while a batch is being scored.  Errors are ``{"detail": message}``: 401
without the right token, 413 beyond the limits, 422 for what is no batch, 500 when the reward fails.
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

# Packages that scores may depend on; those that are installed are told.
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
# The status of a request whose sender has gone; nobody reads it.
CLIENT_CLOSED_REQUEST = 499
# Characters of an error's message.
MAX_DETAIL = 2000

logger = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed PACKAGES."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _told(message: str) -> str:
    """``message`` as an answer can hold it: what it quotes may be long, or no text at all."""
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
    """The application that serves ``reward``, known as ``name``.

    Images reach the reward on ``device``.  ``options``: what the reward was built with, told in
    /health; ``token``: what requests must bring as ``Authorization: Bearer``, empty for none;
    ``max_images`` and ``max_megabytes`` (10^6 bytes): the limits of one request.
    """
    app = FastAPI(openapi_url=None)
    turn = asyncio.Lock()
    max_bytes = int(max_megabytes * 1e6)
    told = {key: "***" if key == "api_key" else options[key] for key in options}
    told = json.loads(json.dumps(told))  # as a client knows it: tuples are lists
    health = Health(protocol=PROTOCOL, reward=name, options=told, versions=versions())

    def authorize(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise HTTPException(401, "the token is missing or wrong")

    async def body(request: Request) -> bytes:
        data = bytearray()
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            # Read to its end, though not kept: a client that is cut off sees no answer.
            if size <= max_bytes:
                data += chunk
        if size > max_bytes:
            raise HTTPException(413, f"this server takes {max_megabytes:g} MB in one request")
        return bytes(data)

    def decode(data: bytes) -> tuple[ScoringRequest, Tensor]:
        request = read(ScoringRequest, data)
        if request.reward != name:
            raise ValueError(f"reward {request.reward!r} is asked for; this server has {name!r}")
        if request.options != told:
            raise ValueError(
                f"the run began with a server of the options {request.options}, this one has "
                f"{told}: their scores would be mixed"
            )
        if len(request.images) > max_images:
            count = len(request.images)
            raise TooLarge(f"{count} images in one request; this server takes {max_images}")
        return request, decode_images(request.images)

    @torch.no_grad()
    def score(data: bytes) -> ScoringAnswer:
        try:
            request, images = decode(data)
        except TooLarge as error:
            raise HTTPException(413, _told(str(error))) from error
        except ValueError as error:
            raise HTTPException(422, _told(str(error))) from error
        try:
            # The run decides whether it can do without images on which the reward fails.
            output = score_apart(reward, images.to(device), request.prompts, request.metadata)
            reasons = {row: _told(reason) for row, reason in output.reasons.items()}
            return ScoringAnswer.of(replace(output, reasons=reasons))
        except Exception as error:
            logger.exception("the reward %s failed", name)
            raise HTTPException(500, _told(f"{type(error).__name__}: {error}")) from error

    @app.get("/health")
    async def tell_health(request: Request) -> Health:
        authorize(request)
        return health

    @app.post("/score", response_model=None)
    async def tell_scores(request: Request) -> Response:
        authorize(request)
        data = await body(request)
        async with turn:
            # A client that gave up waiting asks again; the reward need not score twice.
            if await request.is_disconnected():
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            answer = await run_in_threadpool(score, data)
            return Response(answer.model_dump_json(), media_type="application/json")

    return app
