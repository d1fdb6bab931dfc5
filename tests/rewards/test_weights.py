"""The tables of reward weights against the models that the rewards load."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rewards.conftest import CPU

from diffusion_nft.rewards import REWARDS, build_reward
from diffusion_nft.rewards.clip_common import Clip
from diffusion_nft.rewards.geneval.colors import ARCHITECTURE
from diffusion_nft.rewards.weights import (
    HUB_MODELS,
    NOTHING_TO_FETCH,
    WEIGHT_FILES,
    weight_file,
)
from tests.launch import ROOT
from tests.local_server import hub_pages, serving


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_a_missing_file_comes_with_the_command_the_address_and_the_place(
    name, tmp_path, monkeypatch
):
    monkeypatch.setenv("DIFFUSION_NFT_REWARD_CKPTS", str(tmp_path))
    file = WEIGHT_FILES[name]
    with pytest.raises(FileNotFoundError) as caught:
        build_reward(name, CPU)
    for part in (
        f"python scripts/download.py {name}`",
        file.url,
        f"{tmp_path}/{file.file_name}",
        "reward_ckpts/",
        "DIFFUSION_NFT_REWARD_CKPTS",
    ):
        assert part in str(caught.value)
    (tmp_path / file.file_name).touch()
    assert weight_file(name) == tmp_path / file.file_name


def test_the_detectors_hash_is_the_one_in_its_name():
    # OpenMMLab ends the name of a published checkpoint in the first digits of its SHA-256.
    file = WEIGHT_FILES["geneval"]
    assert file.sha256 and file.file_name.endswith(f"-{file.sha256}.pth")


def test_the_readme_names_every_file_and_its_hash():
    readme = (ROOT / "reward_ckpts/README.md").read_text(encoding="utf-8")
    for file in WEIGHT_FILES.values():
        assert bool(file.sha256) != bool(file.repo), "a published hash, or the hub's"
        row = next(line for line in readme.splitlines() if f"`{file.file_name}`" in line)
        assert file.url in row
        assert f"`{file.sha256}`" in row if file.sha256 else "listed by the hub" in row


def test_every_reward_is_listed_once():
    needy = WEIGHT_FILES.keys() | HUB_MODELS.keys()
    assert not needy & NOTHING_TO_FETCH.keys()
    # A new reward belongs into one of the tables of diffusion_nft/rewards/weights.py.
    assert REWARDS.keys() == needy | NOTHING_TO_FETCH.keys()


@pytest.mark.parametrize("name", REWARDS)
def test_the_hub_models_are_those_that_the_reward_loads(name):
    module, _, cls = REWARDS[name].partition(":")
    options = inspect.signature(getattr(importlib.import_module(module), cls)).parameters
    named = {options[key].default for key in ("model", "processor", "tokenizer") if key in options}
    listed = {model.repo for model in HUB_MODELS.get(name, ()) if "timm/" not in model.repo}
    assert listed == named - {None}


def test_open_clip_takes_genevals_colours_from_the_same_place():
    open_clip = pytest.importorskip("open_clip")
    from open_clip import constants

    (model,) = HUB_MODELS["geneval"]
    # A trailing slash: the file's name is open_clip's default.
    assert open_clip.get_pretrained_cfg(ARCHITECTURE, "openai")["hf_hub"] == f"{model.repo}/"
    assert model.files == (constants.HF_SAFE_WEIGHTS_NAME,)


def test_the_fetched_parts_are_enough_for_the_rewards_clip(tiny_clip, tmp_path):
    files = {path.name: path.read_bytes() for path in Path(tiny_clip).iterdir()}
    assert {"model.safetensors", "tokenizer_config.json"} <= files.keys()
    code = "import sys, json; from diffusion_nft.data.download import fetch_from_hub as f;"
    code += "print(json.dumps([str(f(*call)) for call in json.loads(sys.argv[1])]))"
    (whole,), (_, reader) = HUB_MODELS["clipscore"], HUB_MODELS["pickscore"]
    calls = [("me/whole", whole.files), ("me/reader", reader.files)]
    with serving() as server:
        for repo, _ in calls:
            server.pages |= hub_pages(repo, {**files, "README.md": b"", "flax_model.msgpack": b""})
        env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(calls)],
            env=os.environ | env | {"NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    whole, reader = json.loads(done.stdout)
    assert not (Path(reader) / "model.safetensors").exists()
    assert not (Path(whole) / "README.md").exists()

    pixels, prompts = torch.rand(1, 3, 224, 224), ["the cat"]
    clip = Clip(whole, processor=reader, device=CPU, dtype=torch.float32)
    original = Clip(tiny_clip, processor=tiny_clip, device=CPU, dtype=torch.float32)
    assert torch.equal(clip.cosine(pixels, prompts), original.cosine(pixels, prompts))
