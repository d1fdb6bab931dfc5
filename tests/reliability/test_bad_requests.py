"""A reward server and strangers' requests, a run and strangers' answers."""

import base64
import io
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
from diffusion_nft.rewards.serving.protocol import PROTOCOL, encode_batch, encode_images
from diffusion_nft.rewards.serving.remote import RemoteReward
from diffusion_nft.rewards.serving.server import create_app
from tests.reliability.bad_inputs import CPU, Case, parametrized, pickles

SECRET = "s3cret"
IMAGES = encode_images(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
GOOD = encode_batch("shapes", IMAGES, ["a", "b"], [{}, {}], {})


class Counting:
    """Counts the batches that reach it."""

    batches = 0

    def __call__(self, images, prompts, metadata):
        Counting.batches += 1
        if prompts[0] == "fail":
            raise OSError(ascii(metadata[0]["why"]))
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
    "nothing": (b"", 422, "Expecting value"),
    "no JSON": (b"images=1", 422, "Expecting value"),
    "a pickle": (b"\x80\x04\x95", 422, "utf-8"),
    "depth 10^5": (b"[" * 100_000, 422, "recursion"),
    "a list": (b"[]", 422, "a JSON object is needed, not list"),
    "null": (b"null", 422, "a JSON object is needed, not NoneType"),
    "an empty object": (b"{}", 422, "protocol None is asked for"),
    "another protocol": (with_(protocol=99), 422, "protocol 99 is asked for"),
    "another reward": (with_(reward="ocr"), 422, "reward 'ocr' is asked for"),
    "a path as reward": (with_(reward="../../etc/passwd"), 422, "'../../etc/passwd' is asked for"),
    "a module as reward": (with_(reward="os:system"), 422, "'os:system' is asked for"),
    "half a pair as reward": (with_(reward="\ud800"), 422, "is asked for"),
    "a long reward": (with_(reward="x" * 100_000), 422, "reward 'xxx"),
    "other options": (with_(options={"device": "cuda"}), 422, "their scores would be mixed"),
    "no images": (with_(images=[], prompts=[], metadata=[]), 422, "at least one"),
    "images of text": (with_(images="abc"), 422, "'images' must be a list of texts"),
    "images of numbers": (with_(images=[1, 2]), 422, "'images' must be a list of texts"),
    "prompts of null": (with_(prompts=None), 422, "'prompts' must be a list of texts"),
    "prompts of numbers": (with_(prompts=[1, 2]), 422, "'prompts' must be a list of texts"),
    "metadata of text": (with_(metadata=["a", "b"]), 422, "'metadata' must be a list of objects"),
    "a prompt too few": (with_(prompts=["a"]), 422, "2 images, 1 prompts and 2 metadata"),
    "metadata too many": (with_(metadata=[{}] * 9), 422, "as many of each are needed"),
    "a prompt with NUL": (with_(prompts=["a", "\0"]), 422, "prompt 1 holds a NUL"),
    "half a pair": (with_(prompts=["\udc00", "b"]), 422, "prompt 0 holds half a surrogate"),
    "too many": (
        with_(images=IMAGES * 2, prompts=["a"] * 4, metadata=[{}] * 4),
        413,
        "4 images in one request; this server takes 3",
    ),
    "too large": (with_(padding="x" * 600_000), 413, "takes 0.5 MB in one request"),
    "a path as image": (image("/etc/passwd"), 422, "image 0 is no base64 PNG"),
    "an address as image": (image("http://127.0.0.1/x.png"), 422, "image 0 is no base64 PNG"),
    "an empty image": (image(""), 422, "image 0 is no base64 PNG"),
    "not ASCII": (image("é"), 422, "image 0 is no base64 PNG"),
    "half a pair as image": (image("\ud800"), 422, "image 0 is no base64 PNG"),
    "cut off": (image(IMAGES[0][:80]), 422, "image 0 is no base64 PNG"),
    "a JPEG": (image(other_format("JPEG")), 422, "image 0 is no base64 PNG"),
    "a GIF": (image(other_format("GIF")), 422, "image 0 is no base64 PNG"),
    "a TIFF": (image(other_format("TIFF")), 422, "image 0 is no base64 PNG"),
    "no width": (image(png(0, 8)), 422, "image 0 is no base64 PNG"),
    "no height": (image(png(8, 0)), 422, "image 0 is no base64 PNG"),
    "grey": (image(png(8, 8, color=0)), 422, "its mode is L, not RGB"),
    "with alpha": (image(png(8, 8, color=6)), 422, "its mode is RGBA, not RGB"),
    "3 bits": (image(png(8, 8, bits=3)), 422, "image 0 is no base64 PNG"),
    "no pixels for its size": (image(png(8, 8, data=b"\0")), 422, "image 0 is no base64 PNG"),
    "a bomb": (image(png(2**31 - 1, 2**31 - 1)), 413, "could be decompression bomb"),
    "a large one": (image(png(12_000, 12_000)), 413, "image 0 has more than"),
    "two sizes": (image(png(4, 4, data=b"\0" * 52)), 422, "the images differ in size"),
    "a reward that fails": (
        with_(images=IMAGES[:1], prompts=["fail"], metadata=[{"why": "\ud800" + "x" * 9000}]),
        500,
        "OSError: ",
    ),
}


@parametrized([Case(f"request: {n}", "request", words, n) for n, (*_, words) in REQUESTS.items()])
def test_a_bad_request_is_answered_by_name_and_reaches_no_reward(case, server):
    body, status, words = REQUESTS[case.given]
    before = Counting.batches
    reply = server.post("/score", content=body)
    assert reply.status_code == status
    assert words in reply.json()["detail"] and len(reply.json()["detail"]) <= 2000
    assert Counting.batches - before == (status == 500)
    # It serves the next one.
    sound = server.post("/score", content=with_()).json()
    assert len(sound["scores"]) == 2


@pytest.mark.parametrize("wrapping", ["protocol 0", "protocol 4", "zip", "legacy"])
def test_a_pickle_in_a_request_never_runs(wrapping, server, tmp_path):
    data = pickles(tmp_path / "marker")[wrapping]
    for body in (data, image(base64.b64encode(data).decode())):
        assert server.post("/score", content=body).status_code == 422
    assert not (tmp_path / "marker").exists()


PATHS = ["/../../etc/passwd", "/%2e%2e/etc/passwd", "//etc/passwd", "/score/../x", "/\\x", "/%00"]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_to_a_file(path, server):
    for method in ("GET", "POST", "PUT", "DELETE"):
        assert server.request(method, path).status_code in (404, 405)


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
    "a list": (b"[]", "holds no scores and components"),
    "null": (b"null", "holds no scores and components"),
    "no components": (b'{"scores": [1, 2]}', "holds no scores and components"),
    "components of a list": (answer(components=[]), "holds no scores and components"),
    "no scores": (b'{"components": {}}', "scores are no list"),
    "scores of text": (answer(scores="12"), "scores are no list"),
    "one for two": (answer(scores=[1]), "scores are 1 of them, for 2 images"),
    "three for two": (answer(scores=[1, 2, 3]), "scores are 3 of them, for 2 images"),
    "texts": (answer(scores=["1", "2"]), "scores are not all numbers"),
    "truths": (answer(scores=[True, False]), "scores are not all numbers"),
    "lists": (answer(scores=[[1], [2]]), "scores are not all numbers"),
    "no reasons": (answer(reasons={"why": 1}), "reasons are no list of rows and texts"),
    "1e999": (b'{"scores": [1e999, 1], "components": {}}', "scores hold an infinite number"),
    "400 digits": (answer(scores=[10**400, 1]), "scores hold a number that is too large"),
    "5000 digits": (b'{"scores": [' + b"9" * 5000 + b"]}", "sent a malformed answer"),
    "a short component": (answer(components={"x": [1]}), "x are 1 of them"),
    "a component of texts": (answer(components={"x": ["a", "b"]}), "x are not all numbers"),
    "an infinite component": (answer(components={"x": [math.inf, 1]}), "x hold an infinite number"),
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


@parametrized([Case(f"answer: {n}", "answer", words, n) for n, (_, words) in ANSWERS.items()])
def test_a_bad_answer_is_named_with_its_server(case, monkeypatch):
    reward = remote(ANSWERS[case.given][0], monkeypatch)
    with warnings.catch_warnings(), pytest.raises(ConnectionError) as caught:
        warnings.simplefilter("ignore")
        reward(torch.rand(2, 3, 8, 8), ["a", "b"], [{}, {}])
    assert case.words in str(caught.value) and "http://host:1" in str(caught.value)


def test_a_sound_answer_is_read(monkeypatch):
    found = remote(answer(), monkeypatch)(torch.rand(2, 3, 8, 8), ["a", "b"], [{}, {}])
    assert found.scores.tolist() == [0.5, 1] and found.components["part"].isnan().tolist() == [1, 0]


HEALTHS = {
    "a list": ([], ConnectionError, "does not tell protocol, reward and options"),
    "an empty object": ({}, ConnectionError, "does not tell protocol, reward and options"),
    "another protocol": (HEALTH | {"protocol": "x\ud800"}, ValueError, "has protocol"),
    "another reward": (HEALTH | {"reward": "../ocr"}, ValueError, "serves reward '../ocr'"),
}


@parametrized([Case(f"health: {n}", "reward", words, n) for n, (*_, words) in HEALTHS.items()])
def test_a_bad_health_is_named_when_the_reward_is_built(case, monkeypatch):
    health, error, words = HEALTHS[case.given]
    with warnings.catch_warnings(), pytest.raises(error) as caught:
        warnings.simplefilter("ignore")
        remote(b"", monkeypatch, health)
    assert words in str(caught.value) and "http://host:1" in str(caught.value)
