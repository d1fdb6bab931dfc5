"""UnifiedReward against a fake server of the model."""

import asyncio
import base64
import io
import json
import logging
import random
import socket
import ssl
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from rewards.conftest import CPU, eight_bit, smooth_images

from diffusion_nft.rewards import RewardOutput, unifiedreward
from diffusion_nft.rewards.unifiedreward import UnifiedRewardReward, score_of

KEY = "a-secret/key~1"
MODEL = "UnifiedReward-7b-v1.5"
COMMAND = (
    "python -m sglang.launch_server --model-path CodeGoat24/UnifiedReward-7b-v1.5 "
    "--api-key flowgrpo --port 17140 --chat-template chatml-llava"
)
# The published question, to the letter; %s is the prompt.
QUESTION = """<image>
You are given a text caption and a generated image based on that caption. Your task is to evaluate \
this image based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. \
Consider the accuracy of depicted objects, their relationships, and attributes as described in the \
caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail \
preservation, color accuracy, and overall aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [%s]"""


@dataclass
class Reply:
    """The server's reaction to one request."""

    body: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    # "all": closes the connection without an answer; "rest": in the middle of the body
    drop: str = ""


def completion(content: str | None) -> str:
    """The JSON of a chat completion."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"id": "1", "object": "chat.completion", "choices": [choice]})


def marked(mark: float) -> Reply:
    return Reply(completion(f"The image shows it.\nFinal Score: {mark}"))


STALL = Reply("", delay=60)
DROP = Reply("", drop="all")


def failing(status: int) -> Reply:
    return Reply('{"error": "no luck"}', status, {"retry-after-ms": "1"})


class Server(ThreadingHTTPServer):
    """``reply(prompt, attempt)`` answers the ``attempt``-th request (from 0) for ``prompt``."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.key = KEY
        self.models = Reply(json.dumps({"object": "list", "data": [{"id": MODEL}]}))
        self.reply: Callable[[str, int], Reply] = lambda prompt, attempt: marked(4)
        self.requests: list[dict] = []
        self.attempts: Counter[str] = Counter()
        self.connections = self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.errors: list[BaseException | None] = []

    def list_models(self, *names: str) -> None:
        self.models = Reply(json.dumps({"data": [{"id": name} for name in names]}))

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client may hang up
            self.errors.append(sys.exc_info()[1])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def setup(self):
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def finish(self):
        with self.server.lock:
            self.server.connections -= 1
        super().finish()

    def do_GET(self):
        assert self.path == "/v1/models"
        self.server.closing.wait(self.server.models.delay)
        self.send(self.server.models if self.authorized() else failing(401))

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][0]["content"][1]["text"]
        prompt = text.split("Text Caption: [")[1][:-1]
        with server.lock:
            server.requests.append(request)
            attempt = server.attempts[prompt]
            server.attempts[prompt] += 1
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        reply = server.reply(prompt, attempt) if self.authorized() else failing(401)
        server.closing.wait(reply.delay)
        with server.lock:
            server.in_flight -= 1
        self.send(reply)

    def authorized(self) -> bool:
        return self.headers["Authorization"] == f"Bearer {self.server.key}"

    def send(self, reply: Reply) -> None:
        body = reply.body.encode()
        if reply.drop != "all":
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if reply.drop else body)
        if reply.drop:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """None of the user's settings; no CA certificates, whose reading takes most of a test's time
    (loopback has no TLS)."""
    for name in ("BASE_URL", "API_KEY", "MODEL"):
        monkeypatch.delenv(f"UNIFIEDREWARD_{name}", raising=False)
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *args, **kwargs: None)


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()
    assert server.errors == []


def build(server: Server, **options) -> UnifiedRewardReward:
    return UnifiedRewardReward(CPU, **{"base_url": server.url, "api_key": KEY, **options})


def ask(reward: UnifiedRewardReward, *prompts: str) -> RewardOutput:
    output = reward(torch.zeros(len(prompts), 3, 8, 8), list(prompts), [{}] * len(prompts))
    assert output.scores.dtype == torch.float64 and output.scores.device == CPU
    return output


def score(reward: UnifiedRewardReward, *prompts: str) -> list[float]:
    return ask(reward, *prompts).scores.tolist()


def test_the_request_is_the_published_one(server):
    images = smooth_images(2, 64, 96)
    prompts = [" a {red} cat\n", 'two “cubes”, "No. 5"\n[on a table]']
    scores = build(server, concurrency=1)(images, prompts, [{}] * 2).scores
    assert scores.tolist() == [0.8, 0.8]
    for image, prompt, request in zip(images, prompts, server.requests, strict=True):
        url = request["messages"][0]["content"][0]["image_url"]["url"]
        assert request == {
            "model": MODEL,
            "temperature": 0,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": url}},
                        {"type": "text", "text": QUESTION % prompt},
                    ],
                }
            ],
        }
        head, data = url.split(",")
        assert head == "data:image;base64"
        sent = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert (sent.format, sent.mode, sent.size) == ("PNG", "RGB", (512, 512))
        expected = eight_bit(image).resize((512, 512), Image.Resampling.BICUBIC)
        assert np.array_equal(sent, expected)


@pytest.mark.parametrize(
    ("answer", "mark"),
    [
        ("Final Score: 4", 4),
        ("It fits.\n\nFinal Score:3.75.", 3.75),
        ("Final Score:\n1", 1),
        ("Final Score: 5.0 of 5", 5),
        ("Final Score: 4/5", 4),
        ("'Final Score:' is asked for. Final Score: 2", 2),
        ("Final Score: 2\nFinal Score: 4", 2),
        ("Final Score: 0.9", None),
        ("Final Score: 5.1", None),
        ("Final Score: 6", None),
        ("Final Score: 10", None),
        ("Final Score: 45", None),
        ("Final Score: -3", None),
        ("Final Score: four", None),
        ("final score 4", None),
        ("4", None),
        ("", None),
    ],
)
def test_score_of(answer, mark):
    assert score_of(answer) == mark


def test_order_is_kept_and_requests_in_flight_are_bounded(server):
    delays = random.Random(0)
    marks = {f"image {i}": 1 + i / 8 for i in range(33)}
    first = threading.Barrier(4, timeout=10)  # passes only if four requests are there at once

    def reply(prompt, attempt):
        if int(prompt.split()[1]) < 4:
            first.wait()
        return Reply(marked(marks[prompt]).body, delay=delays.uniform(0, 0.02))

    server.reply = reply
    assert score(build(server, concurrency=4), *marks) == [mark / 5 for mark in marks.values()]
    assert server.most_in_flight == 4


def test_no_images_no_requests(server):
    assert score(build(server)) == []
    assert server.requests == []


def test_any_thread_may_call_and_nothing_is_left_behind(server):
    reward = build(server, concurrency=4)
    prompts = [f"image {i}" for i in range(12)]
    score(reward, *prompts)  # tqdm starts a thread of its own at its first use

    before = set(threading.enumerate())

    async def within_a_loop() -> list[list[float]]:
        return [score(reward, *prompts), await asyncio.to_thread(score, reward, *prompts)]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: score(reward, *prompts), range(2)))
    assert results + asyncio.run(within_a_loop()) == [[0.8] * 12] * 4
    server.reply = lambda prompt, attempt: failing(400)
    with pytest.raises(ValueError, match="returns 400"):
        score(reward, *prompts)
    limit = time.monotonic() + 5  # the server's own threads end a moment later
    while (server.connections or set(threading.enumerate()) - before) and time.monotonic() < limit:
        time.sleep(0.01)
    assert server.connections == 0
    assert set(threading.enumerate()) <= before


BAD_ANSWERS = {
    "no mark": (Reply(completion("I cannot tell.")), "I cannot tell"),
    "too high": (Reply(completion("Final Score: 7")), "Final Score: 7"),
    "empty": (Reply(completion("")), "''"),
    "null": (Reply(completion(None)), "None"),
    "no choices": (Reply('{"choices": []}'), "choices"),
    "an error as 200": (Reply('{"object": "error", "message": "Final Score: 4"}'), "error"),
    "cut JSON": (Reply(completion("Final Score: 4")[:-3]), "Final Score: 4"),
    "HTML": (Reply("<p>Final Score: 4</p>", headers={"Content-Type": "text/html"}), "<p>"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_an_unparsable_answer_is_asked_again_and_then_no_score(server, name):
    bad, quoted = BAD_ANSWERS[name]
    recovers = {"good": 0, "once": 1, "twice": 2, "never": 99}
    server.reply = lambda prompt, attempt: bad if attempt < recovers[prompt] else marked(2)
    reward = build(server, max_unparsable=3)
    assert score(reward, "good", "once", "twice") == [0.4] * 3
    assert server.attempts == {"good": 1, "once": 2, "twice": 3}
    found = ask(reward, "never", "good")
    assert found.scores.isnan().tolist() == [True, False]
    assert "in max_unparsable = 3 answers" in found.reasons[0] and quoted in found.reasons[0]
    assert found.reasons.keys() == {0} and server.attempts["never"] == 3


def test_what_may_pass_is_tried_again(server):
    faults = {
        "stalls": STALL,
        "drops": DROP,
        "drops within": Reply(marked(3).body, drop="rest"),
        "429": failing(429),
        "503": failing(503),
    }
    server.reply = lambda prompt, attempt: marked(3) if attempt else faults[prompt]
    assert score(build(server, timeout=2.0), *faults) == [0.6] * len(faults)
    assert server.attempts == dict.fromkeys(faults, 2)


@pytest.mark.parametrize(
    ("fault", "timeout", "message"),
    [
        (STALL, 0.3, "does not answer in time"),
        (DROP, 60, "cannot be reached, '"),
        (failing(503), 60, """returns 503, '{"error": "no luck"}'"""),
        (failing(429), 60, "returns 429"),
    ],
    ids=["stall", "drop", "503", "429"],
)
def test_a_lasting_fault_is_an_error(server, fault, timeout, message):
    server.reply = lambda prompt, attempt: fault
    reward = build(server, max_retries=1)
    reward.timeout = timeout
    with pytest.raises(ConnectionError) as caught:
        score(reward, "a cat")
    for part in (server.url, message, "(up to 2 attempts)", "UNIFIEDREWARD_BASE_URL", COMMAND):
        assert part in str(caught.value)
    assert server.attempts == {"a cat": 2}


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refused_request_is_not_tried_again(server, status):
    server.reply = lambda prompt, attempt: failing(status)
    with pytest.raises(ValueError) as caught:
        score(build(server), "a cat")
    for part in (server.url, f"returns {status}", "no luck", "UNIFIEDREWARD_API_KEY"):
        assert part in str(caught.value)
    assert server.attempts == {"a cat": 1}


def test_the_first_error_cancels_what_has_not_begun(server):
    server.reply = lambda prompt, attempt: Reply("{}", 400, delay=0.01)
    with pytest.raises(ValueError, match="returns 400"):
        score(build(server, concurrency=2), *map(str, range(200)))
    assert len(server.requests) < 100


def test_prompts_are_counted(server):
    with pytest.raises(ValueError, match="1 images but 2 prompts"):
        build(server)(torch.zeros(1, 3, 8, 8), ["a", "b"], [{}] * 2)


def test_without_a_server_the_error_says_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    with pytest.raises(ConnectionError) as caught:
        UnifiedRewardReward(CPU, base_url=url, max_retries=1)
    for part in (
        url,
        "Connection refused",
        "(up to 2 attempts)",
        "UNIFIEDREWARD_BASE_URL",
        COMMAND,
    ):
        assert part in str(caught.value)


def test_a_server_that_stalls_is_found_when_built(server, monkeypatch):
    monkeypatch.setattr(unifiedreward, "CONNECT_TIMEOUT_S", 0.2)
    server.models = STALL
    with pytest.raises(ConnectionError, match="does not answer in time"):
        build(server, max_retries=0)


@pytest.mark.parametrize(
    ("models", "parts"),
    [
        (failing(401), ("returns 401", "UNIFIEDREWARD_API_KEY")),
        (Reply("<html>hello</html>"), ("does not serve OpenAI's API", "<html>hello")),
        (Reply('["a"]'), ("does not serve OpenAI's API", '["a"]')),
        (Reply('{"data": [1]}'), ("does not serve OpenAI's API", '{"data": [1]}')),
        (Reply('{"data": []}'), ("serves no model, not UnifiedReward", COMMAND)),
        (
            Reply('{"data": [{"id": "llama"}, {"id": "my-UnifiedReward-7b-v1.5"}]}'),
            ("llama, my-UnifiedReward-7b-v1.5", MODEL, "UNIFIEDREWARD_MODEL", COMMAND),
        ),
    ],
    ids=lambda value: getattr(value, "body", ""),
)
def test_a_server_that_cannot_do_it_is_found_when_built(server, models, parts):
    server.models = models
    with pytest.raises(ValueError) as caught:
        build(server)
    for part in (server.url, *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("listed", "sent"),
    [
        # sglang without --served-model-name lists the path that it was started with.
        (["CodeGoat24/UnifiedReward-7b-v1.5"], "CodeGoat24/UnifiedReward-7b-v1.5"),
        (["llama", "/models/UnifiedReward-7b-v1.5/"], "/models/UnifiedReward-7b-v1.5/"),
        (["CodeGoat24/UnifiedReward-7b-v1.5", MODEL], MODEL),
    ],
)
def test_a_model_is_sent_by_the_name_that_the_server_lists(server, listed, sent):
    server.list_models(*listed)
    score(build(server), "a cat")
    assert [request["model"] for request in server.requests] == [sent]


def test_options_come_before_the_environment_and_that_before_the_defaults(server, monkeypatch):
    def set_variables(url: str, key: str, model: str) -> None:
        for name, value in (("BASE_URL", url), ("API_KEY", key), ("MODEL", model)):
            monkeypatch.setenv(f"UNIFIEDREWARD_{name}", value)

    server.list_models("other", MODEL)
    set_variables(server.url, KEY, "other")
    score(UnifiedRewardReward(CPU), "a cat")
    set_variables("http://127.0.0.1:9/v1", "wrong", "wrong")
    score(build(server, model=MODEL, max_retries=0), "a cat")
    assert [request["model"] for request in server.requests] == ["other", MODEL]
    set_variables("", "", "")
    server.key = "flowgrpo"
    assert UnifiedRewardReward(CPU, base_url=server.url).model == "UnifiedReward-7b-v1.5"
    monkeypatch.setattr(UnifiedRewardReward, "_listed", lambda self, model: model)
    assert UnifiedRewardReward(CPU).base_url == "http://127.0.0.1:17140/v1"


def test_a_proxy_is_not_asked_for_this_machine(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert score(build(server, max_retries=0), "a cat") == [0.8]


def test_the_key_is_in_no_error_and_no_log(server, caplog):
    caplog.set_level(logging.DEBUG)
    reward = build(server, max_retries=1, max_unparsable=1)
    replies = {
        "refused": Reply(f'{{"error": "wrong key {KEY}"}}', 403),
        "failed": Reply(f"with {KEY}", 500, {"retry-after-ms": "1"}),
        "unparsable": Reply(completion(f"you said {KEY}")),
    }
    server.reply = lambda prompt, attempt: replies[prompt]
    errors = []
    for prompt in ("refused", "failed"):
        with pytest.raises((ValueError, ConnectionError), match=r"\*\*\*") as caught:
            score(reward, prompt)
        errors.append(caught.value)
    reason = ask(reward, "unparsable").reasons[0]
    assert "***" in reason and KEY not in reason
    server.models = Reply(f"<html>{KEY}</html>")
    with pytest.raises(ValueError, match=r"\*\*\*") as caught:
        build(server)
    errors.append(caught.value)
    for error in errors:
        assert KEY not in "".join(traceback.format_exception(error))
    assert "chat/completions" in caplog.text  # the log is that of the requests
    assert KEY not in caplog.text


@pytest.mark.parametrize("key", ["secret\n", "sécret", "sec ret"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(server, key):
    with pytest.raises(ValueError, match=r"UNIFIEDREWARD_API_KEY\) must be") as caught:
        build(server, api_key=key)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 0},
        {"max_unparsable": 0},
        {"max_retries": -1},
        {"timeout": 0},
        {"timeout": float("nan")},
        {"base_url": "127.0.0.1:17140/v1"},
        {"base_url": "localhost/v1"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(server, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* not .*"):
        build(server, **options)
    assert server.connections == 0


def test_a_bar_shows_only_when_a_batch_takes_long_and_on_one_rank(server, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    reward = build(server)
    score(reward, "a", "b")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(unifiedreward, "BAR_DELAY", 0.0)
    score(reward, "a", "b")
    shown = capsys.readouterr().err
    assert "unifiedreward" in shown and "\n" not in shown  # it is wiped at the end
    monkeypatch.setenv("RANK", "1")
    score(reward, "a", "b")
    assert capsys.readouterr().err == ""


def test_without_openai_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[unifiedreward\]"'):
        UnifiedRewardReward(CPU)
