"""Served rewards: bitwise the local scores, and the handling of every kind of failure."""

import contextlib
import json
import math
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from diffusion_nft.data.prompts import load_prompts
from diffusion_nft.images import Images
from diffusion_nft.rewards import RewardOutput, build_reward
from diffusion_nft.rewards.combine import RewardError, RewardSet, UnscoredError
from diffusion_nft.rewards.serving import protocol
from diffusion_nft.rewards.serving.protocol import (
    PROTOCOL,
    TooLarge,
    decode_images,
    encode_images,
)
from diffusion_nft.rewards.serving.remote import RemoteReward
from diffusion_nft.rewards.serving.server import create_app
from diffusion_nft.shapes.scene import random_scene, render_batch

CPU = torch.device("cpu")
QUICK = {"rounds": 2, "pause": 0.0}
WAIT_S = 20
# Without certificates, which take longer to load than most of these tests.
WEB = httpx.Client(verify=False)

# A server that was taken away, and every try that failed, is warned of.
pytestmark = pytest.mark.filterwarnings("ignore:reward ")


@contextmanager
def serving(name: str, reward=None, port: int = 0, **settings) -> Iterator[str]:
    """The address of a real server of ``reward`` in a thread."""
    settings = {"options": {}, "token": "", "max_images": 64, "max_megabytes": 16.0} | settings
    app = create_app(name, reward or build_reward(name, CPU), CPU, **settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    with socket.create_server(("127.0.0.1", port)) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        until = time.monotonic() + WAIT_S
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
            assert not thread.is_alive()


class StandIn(ThreadingHTTPServer):
    """A server that answers /health with ``health`` and /score as ``answer`` says."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict], tuple[int, object]], **health):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.health = {"protocol": PROTOCOL, "reward": "x", "options": {}} | health
        self.scored = 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self):
        self.send(200, self.server.health)

    def do_POST(self):
        self.server.scored += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send(*self.server.answer(body))

    def send(self, status, answer):
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format, *args):
        pass


@contextmanager
def standing_in(answer=lambda body: (200, {}), **health) -> Iterator[StandIn]:
    with StandIn(answer, **health) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return bound.getsockname()[1]


def random_images(count: int, size: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def ask(reward, count: int) -> RewardOutput:
    return reward(
        random_images(count), [f"p{i}" for i in range(count)], [{"i": i} for i in range(count)]
    )


class Rows:
    """The number of each image's line; ``calls``: how many images each call had."""

    def __init__(self):
        self.calls: list[int] = []

    def __call__(self, images, prompts, metadata):
        self.calls.append(len(prompts))
        assert [f"p{line['i']}" for line in metadata] == prompts
        rows = torch.tensor([line["i"] for line in metadata], dtype=torch.float64)
        return RewardOutput(rows, {"odd": rows % 2})


def test_served_scores_are_the_local_ones_to_the_last_bit():
    lines = load_prompts("shapes", "test")[:6]
    rng = np.random.default_rng(0)
    drawn = torch.from_numpy(render_batch([random_scene(rng) for _ in lines]))
    noise = torch.rand(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    images = Images.from_float(torch.lerp(drawn, noise, 0.3))
    batch = (images, [line.text for line in lines], [line.metadata for line in lines])
    weights = {"shapes": 1.5, "jpeg_compressibility": 0.3}
    with contextlib.ExitStack() as stack:
        servers = {name: [stack.enter_context(serving(name)) for _ in range(2)] for name in weights}
        served = RewardSet.build(weights, CPU, reward_servers=servers)
        local = RewardSet.build(weights, CPU)
        ours, theirs = served(*batch), local(*batch)
    assert len(set(theirs.total.tolist())) == 6, "scores that could differ"
    assert torch.equal(ours.total, theirs.total)
    assert ours.parts.keys() == theirs.parts.keys() > {"shapes/strict"}
    for key, expected in theirs.parts.items():
        assert torch.equal(ours.parts[key], expected), key


def test_every_float64_and_nan_survives_the_way():
    values = [1 / 3, math.pi * 1e300, 5e-324, -0.0, math.nextafter(1, 2)]
    parts = {"half": [math.nan, *values[1:]]}

    class Given:
        def __call__(self, images, prompts, metadata):
            return RewardOutput(
                torch.tensor(values, dtype=torch.float64),
                {k: torch.tensor(v, dtype=torch.float64) for k, v in parts.items()},
            )

    with serving("x", Given()) as address:
        output = ask(RemoteReward("x", [address]), 5)
    assert output.scores.numpy().tobytes() == np.array(values).tobytes()
    assert math.isnan(output.components["half"][0])
    assert output.components["half"][1:].tolist() == values[1:]


@pytest.mark.parametrize(("count", "shares"), [(7, [3, 4]), (2, [1, 1]), (1, [1])])
def test_servers_share_a_batch_and_the_order_stays(count, shares):
    rewards = [Rows(), Rows()]
    with serving("x", rewards[0]) as one, serving("x", rewards[1]) as two:
        output = ask(RemoteReward("x", [one, two]), count)
    assert output.scores.tolist() == list(range(count))
    assert output.components["odd"].tolist() == [i % 2 for i in range(count)]
    assert sorted(rewards[0].calls + rewards[1].calls) == shares


def test_servers_work_at_the_same_time():
    meeting = threading.Barrier(2)

    class Meets(Rows):
        def __call__(self, images, prompts, metadata):
            meeting.wait(WAIT_S)
            return super().__call__(images, prompts, metadata)

    with serving("x", Meets()) as one, serving("x", Meets()) as two:
        assert ask(RemoteReward("x", [one, two], **QUICK), 2).scores.tolist() == [0, 1]


def test_the_others_take_over_from_a_server_that_is_gone():
    left = Rows()
    with serving("x", left) as one:
        with serving("x", Rows()) as two:
            reward = RemoteReward("x", [one, two], **QUICK)
        with pytest.warns(UserWarning, match=f"reward 'x' at {two}: ConnectError"):
            output = ask(reward, 5)
    assert output.scores.tolist() == [0, 1, 2, 3, 4]
    assert sorted(left.calls) == [2, 3]


def test_a_server_that_comes_back_goes_on():
    with serving("x", Rows()) as address:
        reward = RemoteReward("x", [address], **QUICK)
        assert len(ask(reward, 2).scores) == 2
    with pytest.raises(ConnectionError, match=f"reward 'x' at {address} in 2 attempts; .*Connect"):
        ask(reward, 2)
    with serving("x", Rows(), port=int(address.rpartition(":")[2])):
        assert ask(reward, 2).scores.tolist() == [0, 1]


def test_a_server_that_is_down_is_named_after_pauses_that_double(monkeypatch):
    pauses, address = [], f"http://127.0.0.1:{unused_port()}"
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
    with pytest.raises(ConnectionError, match=f"reward 'x' at {address} in 4 .*refused"):
        RemoteReward("x", [address], rounds=4, pause=0.5)
    assert pauses == [0.5, 1.0, 2.0]


def test_servers_with_different_options_are_refused():
    with (
        standing_in(options={"backend": "a"}) as one,
        standing_in(options={"backend": "b"}) as two,
        pytest.raises(ValueError, match=rf"'b'.* at {two.url}, but .*'a'.* at {one.url}"),
    ):
        RemoteReward("x", [one.url, two.url], **QUICK)


def test_a_server_that_comes_back_with_other_options_is_refused():
    images, texts = torch.rand(2, 3, 8, 8), ["a", "b"]
    with serving("jpeg_compressibility", options={"level": (1, 2)}) as address:
        remote = RemoteReward("jpeg_compressibility", [address], **QUICK)
        remote(images, texts, [{}, {}])
    port = int(address.rpartition(":")[2])
    with (
        serving("jpeg_compressibility", port=port, options={"level": (1, 3)}),
        pytest.raises(ValueError, match=r"422: .*\[1, 2\].*\[1, 3\]"),
    ):
        remote(images, texts, [{}, {}])
    with serving("jpeg_compressibility", port=port, options={"level": (1, 2)}):
        remote(images, texts, [{}, {}])


def test_a_secret_among_the_options_is_not_told(monkeypatch):
    with serving("jpeg_compressibility", options={"api_key": "s3cret"}) as address:
        text = httpx.get(f"{address}/health").text
    assert "s3cret" not in text and "api_key" in text


@pytest.mark.parametrize("token", ["s3cret\n", "s3cret token", "s3cr\u00e9t"])
def test_a_token_that_no_header_can_hold_is_refused_unquoted(monkeypatch, token):
    monkeypatch.setenv("REWARD_SERVER_TOKEN", token)
    with pytest.raises(ValueError, match="REWARD_SERVER_TOKEN must be") as caught:
        RemoteReward("x", ["http://127.0.0.1:9"], **QUICK)
    assert "s3cr" not in str(caught.value)


def test_servers_that_stall_are_given_up_after_twice_the_time_out():
    asked = []

    class Stalls(_Handler):
        def do_POST(self):
            asked.append(self.path)
            time.sleep(1.5)

    with standing_in() as one, standing_in() as two:
        remote = RemoteReward("x", [one.url, two.url], timeout=0.4, rounds=9, pause=0.01)
        one.RequestHandlerClass = two.RequestHandlerClass = Stalls
        with pytest.raises(ConnectionError, match=r"in [234] attempts"):
            remote(torch.rand(1, 3, 8, 8), ["a"], [{}])
    assert len(asked) <= 4


def test_something_else_at_the_address_is_refused():
    class Elsewhere(_Handler):
        def do_GET(self):
            self.send(404, b"<html>no such page</html>")

    with standing_in() as server:
        server.RequestHandlerClass = Elsewhere
        with pytest.raises(ValueError, match="404: <html>no such page"):
            RemoteReward("x", [server.url], **QUICK)


def test_a_server_that_is_too_slow_is_named():
    over = threading.Event()

    def answer(body):
        over.wait(WAIT_S)
        return 200, {}

    with standing_in(answer) as server:
        reward = RemoteReward("x", [server.url], timeout=0.2, **QUICK)
        with pytest.raises(ConnectionError, match=r"reward 'x'.*ReadTimeout"):
            ask(reward, 1)
        over.set()
    assert server.scored == 2


FINE = {"scores": [1.0, 2.0], "components": {}}


@pytest.mark.parametrize("status", [200, 429, 503])
def test_lasting_trouble_is_an_error_after_the_last_try(status):
    with standing_in(lambda body: (status, b"<html>")) as server:
        reward = RemoteReward("x", [server.url], **QUICK)
        with pytest.raises(
            ConnectionError, match=r"reward 'x'.* in 2 attempts; the last error: reward 'x'"
        ):
            ask(reward, 2)
    assert server.scored == 2


@pytest.mark.parametrize(
    "trouble", [(429, {"detail": "busy"}), (500, {"detail": "busy"}), (503, b""), (200, b"<html>")]
)
def test_passing_trouble_is_tried_again(trouble):
    answers = [trouble, (200, FINE)]
    with standing_in(lambda body: answers.pop(0)) as server:
        assert ask(RemoteReward("x", [server.url], **QUICK), 2).scores.tolist() == [1, 2]
    assert server.scored == 2


@pytest.mark.parametrize(
    ("status", "error"), [(401, PermissionError), (413, ValueError), (422, ValueError)]
)
def test_a_refusal_is_not_asked_again(status, error):
    with standing_in(lambda body: (status, {"detail": "the reason"})) as server:
        reward = RemoteReward("x", [server.url], **QUICK)
        with pytest.raises(error, match=f"reward 'x'.* {status}.*the reason"):
            ask(reward, 2)
    assert server.scored == 1


def test_servers_that_differ_in_their_components_are_an_error():
    with (
        standing_in(lambda body: (200, {"scores": [1.0], "components": {"a": [1.0]}})) as one,
        standing_in(lambda body: (200, {"scores": [1.0], "components": {}})) as two,
    ):
        reward = RemoteReward("x", [one.url, two.url], **QUICK)
        with pytest.raises(ValueError, match="differ in their components"):
            ask(reward, 2)


class Broken:
    def __init__(self, failures: int = 10**9):
        self.failures = failures

    def __call__(self, images, prompts, metadata):
        self.failures -= 1
        if self.failures >= 0:
            raise OSError("no such colour")
        return RewardOutput(torch.zeros(len(prompts)))


def test_a_scoring_error_tells_its_type_and_message_only():
    with serving("x", Broken()) as address:
        reply = WEB.post(f"{address}/score", json=body(1))
        assert reply.status_code == 500
        assert reply.json() == {"detail": "OSError: no such colour"}
        reward = RemoteReward("x", [address], **QUICK)
        with pytest.raises(RewardError, match=r"'x' failed: ConnectionError.*OSError.*no such col"):
            RewardSet({"x": 1.0}, {"x": reward})(Images.from_float(random_images(1)), [""], [{}])


def test_a_reward_that_recovers_is_asked_again():
    with serving("x", Broken(failures=1)) as address:
        assert ask(RemoteReward("x", [address], **QUICK), 3).scores.tolist() == [0, 0, 0]


def test_an_image_without_a_score_is_told_with_its_reason():
    class Partly:
        def __call__(self, images, prompts, metadata):
            if "fails" in prompts:
                raise KeyError("fails")
            missing = [prompt == "no score" for prompt in prompts]
            scores = torch.ones(len(prompts)).masked_fill(torch.tensor(missing), math.nan)
            reasons = {row: "cannot tell" for row, gone in enumerate(missing) if gone}
            return RewardOutput(scores, {"part": scores}, reasons)

    with serving("x", Partly()) as address:  # alone in its request
        remote = RemoteReward("x", [address], **QUICK)
        found = remote(torch.rand(1, 3, 8, 8), ["fails"], [{}])
        assert found.scores.isnan().all() and "KeyError" in found.reasons[0]
    prompts = ["a", "no score", "fails", "b", "no score"]
    with serving("x", Partly()) as one, serving("x", Partly()) as two:
        remote = RemoteReward("x", [one, two], **QUICK)
        weights, images = {"x": 1.0}, Images.from_float(torch.rand(5, 3, 8, 8))
        found = RewardSet(weights, {"x": remote}, max_unscored=3)(images, prompts, [{}] * 5)
        with pytest.raises(UnscoredError, match=r"3 of 5 .* have no score.*cannot tell"):
            RewardSet(weights, {"x": remote}, max_unscored=2)(images, prompts, [{}] * 5)
    for values in (found.total, found.parts["x/part"]):
        assert values.nan_to_num(-1).tolist() == [1, -1, -1, 1, -1]
    assert found.reasons.keys() == {1, 2, 4}
    assert found.reasons[2] == "image 2 ('fails'): reward 'x' failed: KeyError: 'fails'"


def test_a_server_sends_no_score_that_is_infinite():
    class Bad:
        def __call__(self, images, prompts, metadata):
            return RewardOutput(torch.full((len(prompts),), math.inf))

    with serving("x", Bad()) as address:
        reply = WEB.post(f"{address}/score", json=body(1))
    assert reply.status_code == 500 and "a finite number, not inf" in reply.json()["detail"]


def test_a_token_is_asked_for(monkeypatch):
    with serving("x", Rows(), token="secret") as address:
        with pytest.raises(PermissionError, match=r"401.*REWARD_SERVER_TOKEN"):
            RemoteReward("x", [address], **QUICK)
        monkeypatch.setenv("REWARD_SERVER_TOKEN", "secret")
        assert len(ask(RemoteReward("x", [address], **QUICK), 2).scores) == 2


def test_health_tells_what_is_served():
    with serving("jpeg_compressibility", options={"a": 1}) as address:
        health = WEB.get(f"{address}/health").json()
    assert health["reward"] == "jpeg_compressibility" and health["options"] == {"a": 1}
    assert health["protocol"] == PROTOCOL
    assert health["versions"]["python"] == platform.python_version()
    assert health["versions"]["pillow"] == Image.__version__


class Gate(Rows):
    """Scores when it is opened."""

    def __init__(self):
        super().__init__()
        self.open, self.entered = threading.Event(), threading.Event()
        self.inside = self.most = 0

    def __call__(self, images, prompts, metadata):
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.entered.set()
        assert self.open.wait(WAIT_S)
        time.sleep(0.02)
        self.inside -= 1
        return super().__call__(images, prompts, metadata)


def test_one_batch_at_a_time_while_health_answers():
    gate = Gate()
    with serving("x", gate) as address:
        reward = RemoteReward("x", [address], **QUICK)
        threads = [threading.Thread(target=ask, args=(reward, n)) for n in (1, 2, 3)]
        for thread in threads:
            thread.start()
        assert gate.entered.wait(WAIT_S)
        assert WEB.get(f"{address}/health", timeout=5).json()["reward"] == "x"
        assert gate.calls == []
        gate.open.set()
        for thread in threads:
            thread.join(WAIT_S)
    assert sorted(gate.calls) == [1, 2, 3]
    assert gate.most == 1


def test_a_batch_whose_client_left_the_queue_is_not_scored():
    gate = Gate()
    with serving("x", gate) as address:
        first = threading.Thread(target=ask, args=(RemoteReward("x", [address], **QUICK), 1))
        first.start()
        assert gate.entered.wait(WAIT_S)
        with pytest.raises(ConnectionError, match="ReadTimeout"):
            ask(RemoteReward("x", [address], timeout=0.2, rounds=2, pause=0.0), 2)
        gate.open.set()
        first.join(WAIT_S)
        assert len(ask(RemoteReward("x", [address], **QUICK), 3).scores) == 3
    assert gate.calls == [1, 3]


def body(count: int) -> dict:
    return {
        "protocol": PROTOCOL,
        "reward": "x",
        "options": {},
        "images": encode_images(random_images(count)),
        "prompts": [f"p{i}" for i in range(count)],
        "metadata": [{"i": i} for i in range(count)],
    }


def test_too_many_bytes_are_refused():
    def endless():
        for _ in range(1000):
            yield b"0" * 1000

    with serving("x", Rows(), max_megabytes=0.01) as address:
        reward = RemoteReward("x", [address], **QUICK)
        for size in (64, 1024):  # 16 kB, sent in one piece, and 4 MB, which are not
            with pytest.raises(ValueError, match=r"413.*server accepts 0.01 MB per request"):
                reward(random_images(1, size=size), [""], [{}])
        reply = WEB.post(f"{address}/score", content=endless())
    assert reply.status_code == 413, "without a declared length"


def test_images_that_unfold_are_refused(monkeypatch):
    monkeypatch.setattr(protocol, "MAX_PIXELS", 128)
    assert len(decode_images(encode_images(random_images(2)))) == 2
    with pytest.raises(TooLarge, match="image 0 has more than 42 pixels"):
        decode_images(encode_images(random_images(3)))
