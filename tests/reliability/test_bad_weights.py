"""Untrusted weights: pickles never run, and invalid files are named in errors."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from diffusion_nft.models.lora import (
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_FOLDER,
    PEFT_WEIGHTS,
    PICKLES,
    Lora,
    export_lora,
    load_lora,
    lora_file,
)
from diffusion_nft.rewards import weights as reward_weights
from diffusion_nft.rewards.geneval.mask2former_weights import load_mmdet_state_dict
from diffusion_nft.runs.checkpoint import MANIFEST, STATE, CheckpointError, load_checkpoint
from tests.launch import TINY, smoke, train_here
from tests.reliability.bad_inputs import Case, parametrized, pickles, train, watch

RANK = 2


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def state() -> dict[str, torch.Tensor]:
    return {
        f"transformer_blocks.0.attn.to_q.lora_{m}.weight": torch.ones(shape)
        for m, shape in (("A", (RANK, 8)), ("B", (8, RANK)))
    }


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A folder with a valid LoRA in both layouts."""
    folder = tmp_path / "export"
    folder.mkdir()
    export_lora(folder, Lora(state(), "x"))
    return folder


WRAPPINGS = list(pickles(Path("unused")))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_pickles_of_these_tests_do_run_where_they_are_trusted(wrapping, marker, tmp_path):
    """Otherwise the other tests would pass for any loader."""
    import pickle

    data = pickles(marker)[wrapping]
    (tmp_path / "evil").write_bytes(data)
    if wrapping.startswith("protocol"):
        pickle.loads(data)
    elif wrapping not in ("tar", "script"):
        torch.load(tmp_path / "evil", weights_only=False)
    else:
        pickle.loads(pickles(marker)["protocol 2"])
    assert marker.read_text() == "run"


LOADERS = {
    "mmdet's": lambda path: load_mmdet_state_dict(path, sha256=None),
    "PyTorch's": reward_weights.load_torch_file,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_pickle_as_reward_weights_never_runs(loader, marker, tmp_path):
    path = tmp_path / "weights.pth"
    for wrapping, data in pickles(marker).items():
        path.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            LOADERS[loader](path)
        assert str(path) in str(caught.value), wrapping
        if (loader, wrapping) == ("mmdet's", "hidden"):
            assert "could run code" in str(caught.value)
            assert 'save only {"state_dict": ...}' in str(caught.value)
        assert not marker.exists(), wrapping


def test_the_aesthetic_reward_refuses_a_pickle_before_it_loads_clip(marker, tmp_path, monkeypatch):
    """Through the training command."""
    from tests.reliability.test_bad_config import config_with

    path = tmp_path / "evil.pth"
    path.write_bytes(pickles(marker)["zip"])
    config = config_with("reward_fn", {"aesthetic": 1.0}, str(tmp_path / "run"))
    config.reward_options = {"aesthetic": {"weights": str(path)}}
    seen = watch(monkeypatch)
    message = train(config, seen, monkeypatch)
    seen.expect("reward")
    assert "is not a PyTorch checkpoint that loads safely" in message and str(path) in message
    assert not marker.exists()


GARBAGE = {
    "empty": b"",
    "a page": b"<!DOCTYPE html><html>404</html>",
    "zeros": b"\0" * 4096,
    "a zip": b"PK\x03\x04" + b"\0" * 60,
    "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    "opcodes": b"\x80\x02}q\0(X\x01\0\0\0aK\x01u.",
    "nested": b"\x80\x02" + b"(" * 9999 + b".",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_as_reward_weights_is_named(name, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(GARBAGE[name])
    for load in LOADERS.values():
        with pytest.raises(ValueError) as caught:
            found = load(path)
            reward_weights.load_weights(torch.nn.Linear(1, 1), found, path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", PICKLES)
def test_a_pickle_in_place_of_a_lora_is_refused_unread(suffix, marker, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / PEFT_CONFIG).write_text("{}")
    file = tmp_path / "lora" / f"adapter_model{suffix}"
    for data in pickles(marker).values():
        file.write_bytes(data)
        for path in (tmp_path, tmp_path / "lora", file):
            with pytest.raises(ValueError, match="is a pickle, which can run code"):
                lora_file(path)
        assert not marker.exists()


def rewrite(file: Path, change: Callable[[dict], dict], metadata: dict | None = None) -> None:
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file, metadata)


def set_config(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / PEFT_FOLDER / PEFT_CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def set_weights(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / PEFT_FOLDER / PEFT_WEIGHTS, change)


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: [(folder / PEFT_FOLDER / name).write_bytes(content), None][1]


def described(text: str) -> Callable[[Path], None]:
    """Only the diffusers file is left, with this description."""

    def damage(folder: Path) -> None:
        shutil.rmtree(folder / PEFT_FOLDER)
        rewrite(folder / DIFFUSERS_WEIGHTS, dict, {"lora_adapter_metadata": text})

    return damage


HUGE_HEADER = (2**62).to_bytes(8, "little") + b"{}"
LIES = b'{"x":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4]}}'
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "an empty file": (put(PEFT_WEIGHTS, b""), "is damaged, or not a safetensors file"),
    "cut off": (put(PEFT_WEIGHTS, b"\x10\0\0\0\0\0\0\0{}"), "not a safetensors file"),
    "a huge header": (put(PEFT_WEIGHTS, HUGE_HEADER), "not a safetensors file"),
    "a lying header": (
        put(PEFT_WEIGHTS, len(LIES).to_bytes(8, "little") + LIES + b"1234"),
        "not a safetensors file",
    ),
    "no weights": (set_weights(lambda w: {}), "has no LoRA weights"),
    "NaN weights": (set_weights(lambda w: {k: v * torch.nan for k, v in w.items()}), "NaN or"),
    "infinite": (set_weights(lambda w: {k: v / 0 for k, v in w.items()}), "infinite values"),
    "whole numbers": (set_weights(lambda w: {k: v.int() for k, v in w.items()}), "not a matrix of"),
    "no dimensions": (
        set_weights(lambda w: {k: torch.tensor(1.0) for k in w}),
        "torch.float32 [], not a matrix of floats",
    ),
    "empty matrices": (
        set_weights(lambda w: {k: v[:0] for k, v in w.items()}),
        "[0, 8], not a matrix of floats",
    ),
    "convolutions": (
        set_weights(lambda w: {k: v[..., None, None].contiguous() for k, v in w.items()}),
        "not a matrix of floats",
    ),
    "a path as a key": (
        set_weights(lambda w: w | {"../../x": torch.zeros(2, 2)}),
        "not a plain LoRA of a transformer: it holds ../../x",
    ),
    "a text encoder": (
        set_weights(lambda w: w | {"text_model.lora_A.weight": torch.zeros(2, 2)}),
        "not a plain LoRA of a transformer",
    ),
    "no config": (lambda f: (f / PEFT_FOLDER / PEFT_CONFIG).unlink(), "but no adapter_config"),
    "a config of nothing": (put(PEFT_CONFIG, b""), "does not describe a LoRA"),
    "a config of a list": (put(PEFT_CONFIG, b"[]"), "does not describe a LoRA"),
    "a config of bytes": (put(PEFT_CONFIG, b"\xff\xfe{}"), "does not describe a LoRA"),
    "a deep config": (put(PEFT_CONFIG, b'{"a":' * 100_000), "does not describe a LoRA"),
    "another method": (set_config(peft_type="IA3"), "describes"),
    "an unknown method": (set_config(peft_type="../evil"), "does not describe a LoRA"),
    "another rank": (set_config(r=3), "attn.to_q has rank 2, its description says 3"),
    "a rank of text": (set_config(r="2"), "its description says '2'"),
    "a negative rank": (set_config(r=-2), ""),
    "alpha of text": (set_config(lora_alpha="4"), "must be a finite number"),
    "alpha of NaN": (set_config(lora_alpha=float("nan")), "must be a finite number"),
    "a huge alpha": (set_config(lora_alpha=10**400), "must be a finite number"),
    "DoRA": (set_config(use_dora=True), "not a plain LoRA but DoRA"),
    "ranks by pattern": (set_config(rank_pattern={"to_q": 4}), "its description says 4"),
    "a pattern that never ends": (set_config(rank_pattern={"(.+)+x": 4}), "must name modules"),
    "a pattern of a list": (set_config(alpha_pattern=["to_q"]), "must name modules"),
    "an alpha beyond float32": (set_config(lora_alpha=1e39), "infinite values"),
    "metadata of no JSON": (described("{"), "its metadata do not describe a LoRA"),
    "metadata of a list": (described("[]"), "its metadata do not describe a LoRA"),
    "deep metadata": (described("[" * 100_000), "its metadata do not describe a LoRA"),
    "metadata of code": (described('{"__class__": "x"}'), "its metadata do not describe a LoRA"),
    "metadata of another rank": (described('{"transformer.r": 7}'), "description says 7"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_bad_lora_is_named(name, lora):
    damage, words = DAMAGE[name]
    load_lora(lora)
    damage(lora)
    with pytest.raises(ValueError) as caught:
        load_lora(lora)
    assert words in str(caught.value) and str(lora) in str(caught.value)


def test_a_pickle_under_the_name_of_safetensors_never_runs(lora, marker):
    for data in pickles(marker).values():
        put(PEFT_WEIGHTS, data)(lora)
        with pytest.raises(ValueError, match="not a safetensors file"):
            load_lora(lora)
        assert not marker.exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_here(folder, TINY | {"num_epochs": 1})
    return folder


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    shutil.copytree(trained, tmp_path / "run")
    (folder,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    return folder


def sign(folder: Path) -> None:
    """Updates the manifest to the files."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        manifest["files"][name] = {"size": len(data), "sha256": digest}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["optimizer.safetensors", "current.safetensors", STATE])
def test_a_pickle_in_a_signed_checkpoint_never_runs(name, checkpoint, marker):
    for data in pickles(marker).values():
        (checkpoint / name).write_bytes(data)
        sign(checkpoint)
        with pytest.raises(CheckpointError, match=str(checkpoint)):
            load_checkpoint(checkpoint)
        assert not marker.exists()


def other(**changes: object) -> Callable[[Path], None]:
    """Changes the state's configuration and updates the manifest."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / STATE).read_text())
        found["config"] |= changes
        (folder / STATE).write_text(json.dumps(found))
        sign(folder)

    return damage


def manifest(text: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / MANIFEST).write_text(text), None][1]


SOURCES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no JSON": (manifest("{"), "manifest.json is damaged: not JSON"),
    "a list": (manifest("[]"), "not a JSON object"),
    "an empty object": (manifest("{}"), "manifest.json is invalid"),
    "no files": (manifest('{"tensors": ["current"], "files": {}}'), "lacks state.json"),
    "files of a list": (manifest('{"tensors": [], "files": []}'), "manifest.json is invalid"),
    "another content": (lambda f: os.truncate(f / STATE, 10), "has 10 bytes, not"),
    "a missing file": (lambda f: (f / "ema.safetensors").unlink(), "ema.safetensors is missing"),
    "another base": (other(**{"pretrained.model": "../x"}), "pretrained.model = 'shapes', there"),
    "another rank": (other(**{"train.lora_rank": 3}), "train.lora_rank = 32, there 3"),
}


@parametrized([Case(f"source: {n}", "start", words, n) for n, (_, words) in SOURCES.items()])
def test_a_bad_checkpoint_to_begin_from_is_refused_before_the_model(
    case, checkpoint, tmp_path, monkeypatch
):
    SOURCES[case.given][0](checkpoint)
    seen = watch(monkeypatch)
    config = smoke(tmp_path / "new", TINY | {"resume_from": str(checkpoint.parent.parent)})
    message = train(config, seen, monkeypatch)
    seen.expect(case.moment)
    assert case.words in message and len(message.splitlines()) == 1
    assert not (tmp_path / "new" / "checkpoints").exists()


STARTS = [
    Case("start: pickle", "start", "is a pickle, which can run code", "pickle"),
    Case("start: rank", "start", "has rank 2; use --config.train.lora_rank=2", "sound"),
    Case("start: damaged", "start", "not a safetensors file", "damaged"),
]


@parametrized(STARTS)
def test_a_bad_lora_to_begin_from_is_refused_before_the_model(
    case, lora, marker, tmp_path, monkeypatch
):
    folder = lora / PEFT_FOLDER
    if case.given == "pickle":
        (folder / PEFT_WEIGHTS).unlink()
        (folder / "adapter_model.bin").write_bytes(pickles(marker)["zip"])
    if case.given == "damaged":
        (folder / PEFT_WEIGHTS).write_bytes(pickles(marker)["zip"])
    seen = watch(monkeypatch)
    message = train(
        smoke(tmp_path / "new", TINY | {"train.lora_path": str(folder)}), seen, monkeypatch
    )
    seen.expect(case.moment)
    assert case.words in message and len(message.splitlines()) == 1
    assert not marker.exists()
