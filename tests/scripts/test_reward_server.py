"""The reward server as users start it, and the packages that it needs."""

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import torch

from diffusion_nft.images import Images
from diffusion_nft.rewards import parse_option
from diffusion_nft.rewards.combine import RewardSet
from diffusion_nft.rewards.serving.remote import RemoteReward
from tests.launch import ROOT, environment
from tests.scripts.in_process import call, script

CPU = torch.device("cpu")
SCRIPT = ROOT / "scripts/reward_server.py"
WAIT_S = 60


@contextmanager
def server(
    *flags: str, command: tuple[str, ...] = (str(SCRIPT),), port: str = "0", token: str = ""
) -> Iterator[tuple[subprocess.Popen, str]]:
    """The process and its address."""
    with subprocess.Popen(
        [sys.executable, *command, "--port", port, *flags],
        cwd=ROOT,
        env=environment() | {"REWARD_SERVER_TOKEN": token},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line.startswith("serving "), line + process.stderr.read()
            yield process, line.split()[-1]
        finally:
            process.kill()


@pytest.mark.multiproc
def test_it_serves_until_it_is_told_to_stop(monkeypatch):
    monkeypatch.setenv("REWARD_SERVER_TOKEN", "secret")
    images = Images.from_float(torch.rand(3, 3, 16, 16))
    with server("--reward", "jpeg_compressibility", token="secret") as (process, address):
        health = httpx.get(f"{address}/health", headers={"Authorization": "Bearer secret"}).json()
        assert health["reward"] == "jpeg_compressibility" and health["options"] == {}
        rewards = {"jpeg_compressibility": RemoteReward("jpeg_compressibility", [address])}
        weights = {"jpeg_compressibility": 1.0}
        ours = RewardSet(weights, rewards)(images, [""] * 3, [{}] * 3)
        theirs = RewardSet.build(weights, CPU)(images, [""] * 3, [{}] * 3)
        assert torch.equal(ours.total, theirs.total)
        assert httpx.get(f"{address}/health").status_code == 401
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0
        assert process.stderr is not None and process.stderr.read() == ""


# Runs the script in its arguments without the packages of training.  All rewards' modules must
# import, and a slow reward is registered.
SLIM = """
import importlib.abc, sys, time

BLOCKED = {
    "absl", "accelerate", "diffusers", "httpx", "huggingface_hub", "ml_collections", "open_clip",
    "onnxruntime", "openai", "peft", "rapidocr", "safetensors", "sentencepiece", "torchvision",
    "tabulate", "tenacity", "tqdm", "transformers", "wandb",
}

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, ".")

from diffusion_nft.rewards import REWARDS, RewardOutput, reward_class

class Slow:
    def __init__(self, device):
        import torch
        self.zeros = torch.zeros

    def __call__(self, images, prompts, metadata):
        print("scoring", flush=True)
        time.sleep(1)
        return RewardOutput(self.zeros(len(prompts)))

for name in REWARDS:
    reward_class(name)
REWARDS["slow"] = "__main__:Slow"
sys.argv = sys.argv[1:]
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"))
"""


@pytest.mark.multiproc
def test_it_runs_without_the_packages_of_training_and_ends_what_it_began():
    with server("--reward", "slow", command=("-c", SLIM, str(SCRIPT))) as (process, address):
        reward = RemoteReward("slow", [address], rounds=1)
        outputs = []
        asking = threading.Thread(
            target=lambda: outputs.append(reward(torch.rand(2, 3, 8, 8), ["", ""], [{}, {}]))
        )
        asking.start()
        assert process.stdout is not None and process.stdout.readline() == "scoring\n"
        process.send_signal(signal.SIGTERM)
        asking.join(WAIT_S)
        assert outputs and outputs[0].scores.tolist() == [0.0, 0.0]
        assert process.wait(WAIT_S) == 0
        assert process.stderr is not None and process.stderr.read() == ""


def test_only_a_token_opens_the_server_to_others():
    reward_server = script("reward_server")
    for host in ("127.0.0.1", "localhost"):
        with reward_server.bind(host, 0, "") as bound:
            assert bound.getsockname()[0] == "127.0.0.1"
    for host in ("0.0.0.0", "192.0.2.1"):
        with pytest.raises(ValueError, match="other machines"):
            reward_server.bind(host, 0, "")
    with reward_server.bind("0.0.0.0", 0, "secret") as bound:
        assert bound.getsockname()[0] == "0.0.0.0"


def test_a_port_in_use_shows_before_the_reward_loads(monkeypatch):
    reward_server = script("reward_server")
    monkeypatch.setattr(reward_server.signal, "signal", lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        call(reward_server, "--reward", "aesthetic", "--port", taken.getsockname()[1])


def test_options_are_literals_or_text():
    assert parse_option("batch_size=8") == ("batch_size", 8)
    assert parse_option("backend=paddleocr") == ("backend", "paddleocr")
    assert parse_option("model=owner/name=x") == ("model", "owner/name=x")
    assert parse_option("detector_sha256=None") == ("detector_sha256", None)
    assert parse_option("model='8'") == ("model", "8")
