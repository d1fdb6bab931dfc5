"""Invalid requests to a reward server, and invalid answers to a run."""

import base64
import io
import itertools
import json
import math
import struct
import warnings
import zlib

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from diffusion_nft.rewards import RewardOutput
from diffusion_nft.rewards.serving.protocol import PROTOCOL, ScoringRequest, encode_images
from diffusion_nft.rewards.serving.remote import RemoteReward
from diffusion_nft.rewards.serving.server import create_app
from diffusion_nft.rewards.serving.server import logger as server_logger
from tests.reliability.bad_inputs import CPU, pickles

SECRET = "s3cret"
IMAGES = encode_images(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
GOOD = ScoringRequest(
    protocol=PROTOCOL,
    reward="shapes",
    options={},
    images=IMAGES,
    prompts=["a", "b"],
    metadata=[{}, {}],
).model_dump()


class Counting:
    """Counts the batches that reach it."""

    batches = 0

    def __call__(self, images, prompts, metadata):
        Counting.batches += 1
        if prompts[0] == "fail":
            raise OSError("\ud800" + metadata[0]["why"])
        return RewardOutput(images.mean((1, 2, 3)))


@pytest.fixture(scope="module")
def server():
    app = create_app(
        "shapes", Counting(), CPU, options={}, token=SECRET, max_images=3, max_megabytes=0.5
    )
    with TestClient(app, raise_server_exceptions=True) as client:
        client.headers["Authorization"] = f"Bearer {SECRET}"
        yield client


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int = 8, color: int = 2, data: bytes = b"") -> str:
    """A PNG by hand, base64: of any size, with any content."""
    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b""))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def other_format(kind: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def with_(**changes: object) -> bytes:
    return json.dumps(GOOD | changes).encode()


def image(text: object) -> bytes:
    return with_(images=[text, IMAGES[1]])


# name -> (body, status, words of the answer)
REQUESTS: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 422, "Invalid JSON: EOF"),
    "no JSON": (b"images=1", 422, "Invalid JSON: expected value"),
    "a pickle": (b"\x80\x04\x95", 422, "Invalid JSON: expected value"),
    "depth 10^5": (b"[" * 100_000, 422, "recursion"),
    "a list": (b"[]", 422, "Input should be an object, not []"),
    "null": (b"null", 422, "Input should be an object, not None"),
    "an empty object": (b"{}", 422, "protocol: Field required"),
    "another protocol": (with_(protocol=99, prompts=0), 422, "protocol: Input should be 2, not 99"),
    "another reward": (
        with_(reward="ocr"),
        422,
        "reward 'ocr' was requested; this server has 'sha",
    ),
    "a path as reward": (with_(reward="../../etc/passwd"), 422, "'../../etc/passwd' was requested"),
    "a module as reward": (with_(reward="os:system"), 422, "'os:system' was requested"),
    "half a pair as reward": (with_(reward="\ud800"), 422, "Invalid JSON: "),
    "a long reward": (with_(reward="x" * 100_000), 422, "reward 'xxx"),
    "other options": (with_(options={"device": "cuda"}), 422, "scores would not be comparable"),
    "no images": (with_(images=[], prompts=[], metadata=[]), 422, "at least one"),
    "images of text": (with_(images="abc"), 422, "images: Input should be a valid array"),
    "images of numbers": (
        with_(images=[7]),
        422,
        "images.0: Input should be a valid string, n",
    ),
    "prompts of null": (
        with_(prompts=None),
        422,
        "prompts: Input should be a valid array, not None",
    ),
    "prompts of numbers": (
        with_(prompts=["a", 7]),
        422,
        "prompts.1: Input should be a valid string",
    ),
    "metadata of text": (
        with_(metadata=["a"]),
        422,
        "metadata.0: Input should be an object, not 'a'",
    ),
    "a prompt too few": (with_(prompts=["a"]), 422, "2 images, 1 prompts and 2 metadata"),
    "metadata too many": (with_(metadata=[{}] * 9), 422, "the numbers must be equal"),
    "a prompt with NUL": (with_(prompts=["a", "\0"]), 422, "prompts.1: a NUL (character 1)"),
    "half a pair": (with_(prompts=["\udc00", "b"]), 422, "Invalid JSON: "),
    "too many": (
        with_(images=IMAGES * 2, prompts=["a"] * 4, metadata=[{}] * 4),
        413,
        "4 images in one request; this server accepts 3",
    ),
    "too large": (with_(padding="x" * 600_000), 413, "accepts 0.5 MB per request"),
    "a path as image": (image("/etc/passwd"), 422, "image 0 is not a readable"),
    "an address as image": (image("http://127.0.0.1/x.png"), 422, "image 0 is not a readable"),
    "an empty image": (image(""), 422, "image 0 is not a readable"),
    "not ASCII": (image("é"), 422, "image 0 is not a readable"),
    "half a pair as image": (image("\ud800"), 422, "Invalid JSON: "),
    "cut off": (image(IMAGES[0][:80]), 422, "image 0 is not a readable"),
    "a JPEG": (image(other_format("JPEG")), 422, "image 0 is not a readable"),
    "a GIF": (image(other_format("GIF")), 422, "image 0 is not a readable"),
    "a TIFF": (image(other_format("TIFF")), 422, "image 0 is not a readable"),
    "no width": (image(png(0, 8)), 422, "image 0 is not a readable"),
    "no height": (image(png(8, 0)), 422, "image 0 is not a readable"),
    "grey": (image(png(8, 8, color=0)), 422, "its mode is L, not RGB"),
    "with alpha": (image(png(8, 8, color=6)), 422, "its mode is RGBA, not RGB"),
    "3 bits": (image(png(8, 8, bits=3)), 422, "image 0 is not a readable"),
    "no pixels for its size": (image(png(8, 8, data=b"\0")), 422, "image 0 is not a readable"),
    "a bomb": (image(png(2**31 - 1, 2**31 - 1)), 413, "could be decompression bomb"),
    "a large one": (image(png(12_000, 12_000)), 413, "image 0 has more than"),
    "two sizes": (image(png(4, 4, data=b"\0" * 52)), 422, "the images differ in size"),
    "a reward that fails": (
        with_(images=IMAGES[:1], prompts=["fail"], metadata=[{"why": "x" * 9000}]),
        500,
        "OSError: ",
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_is_answered_by_name_and_reaches_no_reward(name, server, monkeypatch):
    # pytest-xdist cannot send a captured log with half a surrogate pair to its parent.
    monkeypatch.setattr(server_logger, "disabled", True)
    body, status, words = REQUESTS[name]
    before = Counting.batches
    reply = server.post("/score", content=body)
    assert reply.status_code == status
    detail = reply.json()["detail"]
    assert words in detail and len(detail) <= 2000 and len(detail.splitlines()) == 1
    assert Counting.batches - before == (status == 500)
    # The next request is served.
    sound = server.post("/score", content=with_()).json()
    assert len(sound["scores"]) == 2


@pytest.mark.parametrize("wrapping", ["protocol 0", "protocol 4", "zip", "legacy"])
def test_a_pickle_in_a_request_never_runs(wrapping, server, tmp_path):
    data = pickles(tmp_path / "marker")[wrapping]
    for body in (data, image(base64.b64encode(data).decode())):
        assert server.post("/score", content=body).status_code == 422
    assert not (tmp_path / "marker").exists()


PATHS = ["/../../etc/passwd", "/%2e%2e/etc/passwd", "//etc/passwd", "/score/../x", "/\\x", "/%00"]


def test_no_path_leads_to_a_file(server):
    for method, path in itertools.product(("GET", "POST", "PUT", "DELETE"), PATHS):
        assert server.request(method, path).status_code in (404, 405), path


TOKENS = ["", SECRET, f"Basic {SECRET}", f"Bearer {SECRET}x", "Bearer é", "Bearer \x7f", "Bearer"]


@pytest.mark.parametrize("token", TOKENS)
def test_another_token_opens_nothing(token, server):
    headers = {"Authorization": token.encode("latin-1")}
    for method, path in (("GET", "/health"), ("POST", "/score")):
        reply = server.request(method, path, headers=headers, content=with_())
        assert reply.status_code == 401 and SECRET not in reply.text


HEALTH = {"protocol": PROTOCOL, "reward": "shapes", "options": {}}
FINE = {"scores": [0.5, 1], "components": {"part": [None, 1]}}


def answer(**changes: object) -> bytes:
    return json.dumps(FINE | changes).encode()


ANSWERS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "sent a malformed answer"),
    "a page": (b"<html>", "sent a malformed answer"),
    "depth 10^5": (b"[" * 100_000, "sent a malformed answer"),
    "a list": (b"[]", "Input should be an object"),
    "null": (b"null", "Input should be an object"),
    "no components": (b'{"scores": [1, 2]}', "components: Field required"),
    "components of a list": (answer(components=[]), "components: Input should be an object"),
    "no scores": (b'{"components": {}}', "scores: Field required"),
    "scores of text": (answer(scores="12"), "scores: Input should be a valid array, not '12'"),
    "one for two": (answer(scores=[1]), "scores has 1 numbers for 2 images"),
    "three for two": (answer(scores=[1, 2, 3]), "scores has 3 numbers for 2 images"),
    "texts": (answer(scores=["1", "2"]), "scores.0: Input should be a valid number, not '1'"),
    "truths": (answer(scores=[1, False]), "scores.1: Input should be a valid number, not False"),
    "lists": (answer(scores=[[1], [2]]), "scores.0: Input should be a valid number"),
    "no reasons": (answer(reasons={"why": 1}), "reasons: Input should be a valid array"),
    "half a reason": (answer(reasons=[[0]]), "reasons.0.1: Field required"),
    "1e999": (
        b'{"scores": [1e999, 1], "components": {}}',
        "scores.0: Input should be a finite num",
    ),
    "400 digits": (answer(scores=[10**400, 1]), "scores.0: Input should be a finite number"),
    "5000 digits": (b'{"scores": [' + b"9" * 5000 + b"]}", "sent a malformed answer"),
    "a short component": (answer(components={"x": [1]}), "x has 1 numbers for 2 images"),
    "a component of texts": (answer(components={"x": ["a"]}), "components.x.0: Input should be a"),
    "an infinite component": (answer(components={"x": [math.inf]}), "finite number, not inf"),
}


def remote(reply, monkeypatch, health: object = HEALTH) -> RemoteReward:
    """A reward whose server gives ``reply`` to every batch."""

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return httpx.Response(200, content=json.dumps(health).encode())
        return httpx.Response(200, content=reply)

    real, transport = httpx.Client, httpx.MockTransport(handle)
    monkeypatch.setattr(httpx, "Client", lambda **options: real(transport=transport, **options))
    return RemoteReward("shapes", ("http://host:1",), rounds=1, pause=0.0)


@pytest.mark.parametrize("name", ANSWERS)
def test_a_bad_answer_is_named_with_its_server(name, monkeypatch):
    given, words = ANSWERS[name]
    reward = remote(given, monkeypatch)
    with warnings.catch_warnings(), pytest.raises(ConnectionError) as caught:
        warnings.simplefilter("ignore")
        reward(torch.rand(2, 3, 8, 8), ["a", "b"], [{}, {}])
    assert words in str(caught.value) and "http://host:1" in str(caught.value)


def test_a_sound_answer_is_read(monkeypatch):
    found = remote(answer(), monkeypatch)(torch.rand(2, 3, 8, 8), ["a", "b"], [{}, {}])
    assert found.scores.tolist() == [0.5, 1] and found.components["part"].isnan().tolist() == [1, 0]


HEALTHS = [
    ([], ConnectionError, "Input should be an object"),
    ({}, ConnectionError, "protocol: Field required"),
    (HEALTH | {"protocol": 7}, ValueError, f"has protocol 7, this run has {PROTOCOL}"),
    (HEALTH | {"reward": "../ocr"}, ValueError, "serves reward '../ocr'"),
]


@pytest.mark.parametrize(("health", "error", "words"), HEALTHS)
def test_a_bad_health_is_named_when_the_reward_is_built(health, error, words, monkeypatch):
    with warnings.catch_warnings(), pytest.raises(error) as caught:
        warnings.simplefilter("ignore")
        remote(b"", monkeypatch, health)
    assert words in str(caught.value) and "http://host:1" in str(caught.value)
