"""The download script with a local server."""

import hashlib
import os
import subprocess
import sys

import pytest

from diffusion_nft.rewards.weights import HUB_MODELS, WEIGHT_FILES, WeightFile
from tests.launch import ROOT
from tests.local_server import Page, hub_pages, serving
from tests.scripts.in_process import call, script

CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MLP_SHA256 = hashlib.sha256(b"affine").hexdigest()


@pytest.fixture
def server():
    with serving() as server:
        server.pages["/detector.pth"] = Page(CONTENT)
        server.pages["/mlp.pth"] = Page(b"affine")
        yield server


@pytest.fixture
def ckpts(server, tmp_path, monkeypatch):
    """The folder of weight files; two rewards need one file of ``server`` each."""
    monkeypatch.setenv("DIFFUSION_NFT_REWARD_CKPTS", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    files = {
        "geneval": WeightFile("detector.pth", f"{server.url}/detector.pth", SHA256[:8]),
        "aesthetic": WeightFile("mlp.pth", f"{server.url}/mlp.pth", MLP_SHA256),
    }
    for name, file in files.items():
        monkeypatch.setitem(WEIGHT_FILES, name, file)
        monkeypatch.delitem(HUB_MODELS, name)
    return tmp_path


def download(*flags: str) -> int | None:
    return call(script("download"), *flags)


def test_files_are_fetched_and_the_output_says_how_they_were_checked(ckpts, capsys):
    assert download("geneval", "shapes") == 0
    geneval, shapes = capsys.readouterr().out.splitlines()
    assert geneval == f"geneval: {ckpts}/detector.pth downloaded, 7,000 bytes (as published)"
    assert shapes == "shapes: nothing to fetch, reads pixels, no model"
    assert (ckpts / "detector.pth").read_bytes() == CONTENT


def test_one_failure_does_not_keep_the_others(ckpts, server, capsys):
    server.pages["/detector.pth"].content = b"damaged"
    assert download("geneval", "aesthetic") == 1
    output = capsys.readouterr()
    assert output.out.startswith("aesthetic: ") and (ckpts / "mlp.pth").is_file()
    (error,) = output.err.splitlines()
    for part in ("geneval: error: detector.pth", f"{server.url}/detector.pth", str(ckpts)):
        assert part in error
    assert not (ckpts / "detector.pth").exists()


def test_names_are_checked_before_anything_is_fetched(ckpts, server, capsys):
    for flags, complaint in ((["aesthetic", "nosuch"], "'nosuch'"), ([], "no name given")):
        with pytest.raises(SystemExit) as caught:
            download(*flags)
        assert caught.value.code == 2
        assert f"{complaint}; choose from rewards, all, aesthetic" in capsys.readouterr().err
    assert server.requests == []


def test_all_is_every_reward(ckpts, server, capsys, monkeypatch):
    for name in ("hpsv2", "imagereward"):
        monkeypatch.setitem(WEIGHT_FILES, name, WEIGHT_FILES["aesthetic"])
    for name in [*HUB_MODELS]:
        monkeypatch.delitem(HUB_MODELS, name)
    for word in ("rewards", "all"):
        assert download(word) == 0
        rewards = {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()}
        assert {"aesthetic", "geneval", "hpsv2", "imagereward", "ocr", "shapes"} < rewards


def table(output: str) -> dict[str, list[str]]:
    """The last column of --list by reward."""
    present: dict[str, list[str]] = {}
    for line in output.splitlines()[1:-1]:
        present.setdefault(line.split()[0], []).append(line.split()[-1])
    return present


def test_the_hubs_rewards_from_a_mirror(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFUSION_NFT_REWARD_CKPTS", str(tmp_path / "ckpts"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert download("--list") == 0
    before = table(capsys.readouterr().out)
    assert before["hpsv2"] == ["no"] and before["aesthetic"] == ["no", "no"]
    assert before["ocr"] == ["rapidocr"]

    server.pages |= hub_pages("xswu/HPSv2", {"HPS_v2.1_compressed.pt": CONTENT})
    files = ("config.json", "model.safetensors", "tokenizer_config.json", "vocab.json")
    contents = {name: b"{}" for name in (*files, "preprocessor_config.json")}
    server.pages |= hub_pages("openai/clip-vit-large-patch14", contents)
    env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/download.py"), "hpsv2", "clipscore", "pickscore"],
        env=os.environ | env | {"NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    hpsv2, clipscore = done.stdout.splitlines()
    assert hpsv2 == f"hpsv2: HPS_v2.1_compressed.pt is in {tmp_path}/ckpts (as published)"
    start = f"clipscore: openai/clip-vit-large-patch14 is in {tmp_path}/hub/"
    assert clipscore.startswith(start)
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert [error.split(" could not")[0] for error in errors] == [
        "pickscore: error: yuvalkirstain/PickScore_v1",
        "pickscore: error: laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ]

    assert download("--list") == 0
    after = table(capsys.readouterr().out)
    assert after["hpsv2"] == ["yes"] and after["aesthetic"] == ["no", "yes"]
    assert after["clipscore"] == ["yes"] and after["pickscore"] == ["no", "no"]
