"""Paths given by users."""

import os
from pathlib import Path

import pytest
import torch

from diffusion_nft.data.prompts import load_prompts
from diffusion_nft.rewards import build_reward
from diffusion_nft.utils.files import DiskError
from diffusion_nft.utils.paths import expand, prepare_folder
from diffusion_nft.validation.schema import expand_paths


def test_the_home_folder_is_expanded_and_nothing_else_changes(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand("~") == "/home/me" and expand("~/x") == "/home/me/x"
    for text in ("", "x", "./~/x", "/a/~", "owner/name", "./shapes", "x/", "a b", "图片"):
        assert expand(text) == text


@pytest.mark.parametrize("text", ["a\0b", "a\n", "~/\0", "caf\udce9"])
def test_control_characters_are_refused(text):
    with pytest.raises(ValueError, match="is not a path: it holds a control character"):
        expand(text)


def test_an_unknown_home_is_refused():
    with pytest.raises(ValueError, match=r"~nobody-at-all has no home .* \./~nobody-at-all"):
        expand("~nobody-at-all/x")


def test_a_folder_to_write_in_is_created_and_left_empty(tmp_path):
    prepare_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a").rglob("*")) == [tmp_path / "a" / "b"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(DiskError, match=str(folder)):
            prepare_folder(folder)

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskError, match=f"{tmp_path} could not be written: No space left"):
        prepare_folder(tmp_path)


def test_every_path_of_a_configuration_is_expanded(smoke_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text("a red circle\n")
    smoke_config.save_dir, smoke_config.resume_from = "~/run", "~/former"
    smoke_config.train.lora_path, smoke_config.pretrained.model = "~/lora", "~/base"
    expand_paths(smoke_config)
    assert smoke_config.save_dir == f"{tmp_path}/run"
    assert smoke_config.resume_from == f"{tmp_path}/former"
    assert smoke_config.train.lora_path == f"{tmp_path}/lora"
    assert smoke_config.pretrained.model == f"{tmp_path}/base"
    assert load_prompts("~", "test")[0].text == "a red circle"


def test_a_path_among_a_rewards_options_is_expanded(tmp_path, monkeypatch):
    seen = []

    class Weighed:
        def __init__(self, device, weights: Path | None = None):
            seen.append(weights)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("diffusion_nft.rewards.reward_class", lambda name: Weighed)
    build_reward("shapes", torch.device("cpu"), {"weights": "~/w"})
    assert seen == [tmp_path / "w"]
    with pytest.raises(
        ValueError, match="the weights of shapes, '~nobody-at-all/w', is not a path"
    ):
        build_reward("shapes", torch.device("cpu"), {"weights": "~nobody-at-all/w"})
