"""Invalid and tricky paths of runs, prompt sets, checkpoints, LoRA folders and models."""

import os
from pathlib import Path

import pytest

from diffusion_nft.data import prompts as data
from diffusion_nft.models.hub import fetch_lora
from diffusion_nft.models.lora import lora_file
from tests.reliability.bad_inputs import Case, parametrized, train, watch
from tests.reliability.test_bad_config import config_with

LONG = "a" * 300
# Paths that cannot exist.
NOWHERE = {
    "NUL": "run\0",
    "line end": "run\n",
    "surrogate": "run\ud800",
    "byte": "run\udcff",
    "too long a name": LONG,
    "too long a path": "/".join(["a" * 200] * 40),
    "circle": "circle/run",
}
ABSENT = {
    "parents": "../../../../../../../../absent",
    "root": "/absent/x",
    "home": "~/absent",
    "another's home": "~nobody-of-this-name/x",
    "dangling link": "dangling",
    "file": "file",
    "below a file": "file/x",
    "pipe": "pipe",
    "device": "/dev/null",
    "spaces": "   ",
    "dots": "...",
    "backslashes": "..\\..\\absent",
    "Windows": "C:\\absent",
    "address": "https://example.org/x",
    "option": "--help",
    "code": "$(touch marker)",
    "wildcard": "*",
    "bidi": "\u202etxt",
}
SAVE_DIR = [
    *(Case(f"save_dir {name}", "validation", "", ("save_dir", NOWHERE[name])) for name in NOWHERE),
    Case("save_dir home", "validation", "is a file; must be a folder", ("save_dir", "~/file")),
    Case("save_dir of nobody", "validation", "without a home", ("save_dir", "~nobody-at-all/run")),
    Case("save_dir file", "validation", "is a file; must be a folder", ("save_dir", "file")),
    Case("save_dir device", "validation", "is a file; must be a folder", ("save_dir", "/dev/null")),
    Case("save_dir below a file", "validation", "is not a folder", ("save_dir", "file/a/b")),
    Case("save_dir dangling", "validation", "must be a folder", ("save_dir", "dangling")),
    Case("save_dir below dangling", "validation", "is not a folder", ("save_dir", "dangling/a")),
    Case("save_dir spaces", "validation", "not empty", ("save_dir", "  ")),
]
KEYS = {
    "resume_from": "must be the path of a folder that exists, or empty for none",
    "train.lora_path": "must be a LoRA that exists (a PEFT folder, which holds adapter_config.json",
    "pretrained.model": "must be a diffusers folder that exists (it holds model_index.json)",
    "dataset": "dataset = ",
}
READ = [
    Case(f"{key} {name}", "validation", words, (key, value))
    for key, words in KEYS.items()
    for name, value in (NOWHERE | ABSENT).items()
    # Those could be names on the hub.
    if key != "pretrained.model" or name not in ("circle", "below a file")
]
FOLDERS = [
    Case("a model that is any folder", "validation", "model_index.json", ("pretrained.model", ".")),
    Case("a LoRA of any folder", "validation", "adapter_config.json", ("train.lora_path", ".")),
    Case("a data set that is any folder", "validation", "has neither", ("dataset", "./")),
    Case("a data set above", "validation", "has neither", ("dataset", "..")),
    Case("a hub name that climbs", "validation", "hub name", ("pretrained.model", "a/..b")),
    Case("a hub name of a home", "validation", "hub name", ("pretrained.model", "~a/b")),
    Case("a run without checkpoints", "start", "is neither a checkpoint", ("resume_from", ".")),
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file, a pipe, and broken links."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "file").write_text("x")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "circle").symlink_to("circle")
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    return folder


@parametrized([*SAVE_DIR, *READ, *FOLDERS])
def test_an_invalid_path_is_refused(case, here, monkeypatch):
    seen = watch(monkeypatch)
    before = sorted(here.iterdir())
    config = config_with(*case.given, str(here / "run"))
    if case.given[0] == "pretrained.model":
        config.resolution = 48
    message = train(config, seen, monkeypatch)
    seen.expect(case.moment)
    line = message.splitlines()[-1]
    assert case.words in line and len(line) < 2500
    assert sorted(here.iterdir()) == before, "nothing was written"
    if case.moment == "validation":
        assert line.strip().startswith(f"{case.given[0]} = ")


def test_a_link_to_a_prompt_set_is_followed_and_named_as_given(here):
    (here / "real").mkdir()
    for split in data.SPLITS:
        (here / "real" / f"{split}.txt").write_text("a cat\n")
    (here / "link").symlink_to("real")
    assert data.load_prompts("./link", "train") == [data.Prompt("a cat")]


def test_names_of_hub_loras_cannot_reach_other_files(here):
    for name in ("../file\0", "a/../../b", "/absent", "~/x", "a/b/c", "--x", "a\nb", LONG + "/x"):
        with pytest.raises(OSError, match=r"not a local path|too long"):
            fetch_lora(name)


def test_an_adapter_of_another_folder_is_not_found(here):
    for adapter in ("../..", "/", "a\0b", "~", LONG):
        with pytest.raises((ValueError, OSError), match=r"has no LoRA|too long"):
            lora_file(here, adapter)
