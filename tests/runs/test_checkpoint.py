"""Checkpoints against kills and damage."""

import errno
import json
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusion_nft.runs.checkpoint import (
    Checkpointer,
    CheckpointError,
    load_checkpoint,
    resolve_checkpoint,
)
from diffusion_nft.runs.state import flatten_optimizer, unflatten_optimizer
from tests.launch import train_here


def group(step: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return {
        "a.weight": torch.randn(4, 3, generator=g),
        "transposed": torch.randn(4, 3, generator=g).T,
        "half": torch.randn(5, generator=g).bfloat16(),
        "double": torch.randn(2, generator=g, dtype=torch.float64),
        "step": torch.tensor(float(step)),
        "special": torch.tensor([torch.nan, torch.inf, -0.0]),
    }


def bits(tensor: torch.Tensor) -> tuple:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, raw.tolist()


def save(checkpointer: Checkpointer, step: int, **options) -> Path:
    state = {"epoch": step // 2, "best_score": 0.1 * step}
    return checkpointer.save(step, tensors={"current": group(step)}, state=state, **options)


def steps(run_dir: Path) -> list[int]:
    names = [path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir()]
    return sorted(int(name.removeprefix("checkpoint-")) for name in names)


def assert_is_step(run_dir: Path, step: int) -> None:
    checkpoint = Checkpointer(run_dir).load_latest()
    assert checkpoint is not None
    own = {key: value for key, value in checkpoint.state.items() if key != "best"}
    assert own == {"epoch": step // 2, "best_score": 0.1 * step}
    expected = group(step)
    assert checkpoint.tensors.keys() == {"current"}
    assert checkpoint.tensors["current"].keys() == expected.keys()
    for key, value in checkpoint.tensors["current"].items():
        assert bits(value) == bits(expected[key]), key


def test_round_trip_is_bitwise(tmp_path):
    def extra(folder: Path) -> None:
        (folder / "lora").mkdir()
        (folder / "lora" / "note.txt").write_text("x")

    path = save(Checkpointer(tmp_path), 4, write_extra=extra)
    assert path == tmp_path / "checkpoints" / "checkpoint-4"
    assert_is_step(tmp_path, 4)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"].keys() == {"current.safetensors", "state.json", "lora/note.txt"}
    assert manifest["files"]["lora/note.txt"]["size"] == 1
    assert Checkpointer(tmp_path / "new").load_latest() is None


def test_keeps_the_newest_and_the_best(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (2, 4, 6, 8, 10):
        save(checkpointer, step, best=step in (2, 4))
    assert steps(tmp_path) == [4, 8, 10]
    assert checkpointer.best() == tmp_path / "checkpoints" / "checkpoint-4"
    save(checkpointer, 100, best=True)
    assert steps(tmp_path) == [10, 100]
    assert checkpointer.latest() == checkpointer.best()
    everything = Checkpointer(tmp_path / "all", keep=0)
    for step in range(6):
        save(everything, step)
    assert steps(tmp_path / "all") == list(range(6))


def resume(checkpointer: Checkpointer) -> None:
    checkpoint = checkpointer.load_latest()
    assert checkpoint is not None
    checkpointer.restore_best(checkpoint)


class Killed(BaseException):
    """A kill, which handlers of ordinary errors do not catch."""


def die(*arguments):
    raise Killed


def test_a_kill_while_writing_leaves_the_former_checkpoint(tmp_path):
    save(Checkpointer(tmp_path), 2)
    for step in (2, 4):
        with pytest.raises(Killed):
            save(Checkpointer(tmp_path), step, write_extra=die)
    assert steps(tmp_path) == [2]
    assert_is_step(tmp_path, 2)


@pytest.mark.parametrize("kill_at", range(1, 5))
def test_a_kill_at_any_rename_loses_nothing(tmp_path, monkeypatch, kill_at):
    """Replacing step 4 as best with keep=1 renames for: set aside, in place, best.json, prune."""
    save(Checkpointer(tmp_path, keep=2), 2)
    save(Checkpointer(tmp_path, keep=2), 4)
    calls, replace = [], os.replace

    def sometimes(source, target):
        calls.append((source, target))
        if len(calls) >= kill_at:
            raise Killed
        replace(source, target)

    # A real kill also skips the clean-up.
    monkeypatch.setattr("diffusion_nft.runs.checkpoint.os.replace", sometimes)
    monkeypatch.setattr("diffusion_nft.runs.checkpoint.shutil.rmtree", lambda *a, **k: None)
    with pytest.raises(Killed):
        save(Checkpointer(tmp_path, keep=1), 4, best=True)
    monkeypatch.undo()
    assert len(calls) == kill_at
    assert_is_step(tmp_path, 4)
    # The third rename is that of best.json: from then on the new one is there, and is the best.
    best = tmp_path / "checkpoints" / "checkpoint-4" if kill_at >= 3 else None
    checkpointer = Checkpointer(tmp_path, keep=1)
    resume(checkpointer)
    for step in (4, 6):
        save(checkpointer, step)
        assert checkpointer.best() == best
        assert_is_step(tmp_path, step)
    assert steps(tmp_path) == ([4, 6] if best else [6])
    save(checkpointer, 8, best=True)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "checkpoint-8",
        "best.json",
    }
    assert_is_step(tmp_path, 8)


@pytest.mark.parametrize("full", [False, True])
def test_the_best_checkpoint_is_kept_if_best_json_was_not_updated(tmp_path, monkeypatch, full):
    """best.json names an older one: without the name in the state, the best would be pruned."""
    save(Checkpointer(tmp_path), 2, best=True)

    def fail(path, data):
        raise OSError(errno.ENOSPC, "No space left on device") if full else Killed

    monkeypatch.setattr("diffusion_nft.runs.checkpoint.write_atomically", fail)
    with pytest.raises(CheckpointError if full else Killed):
        save(Checkpointer(tmp_path), 4, best=True)
    if full:
        with pytest.raises(
            CheckpointError, match=r"name of the best checkpoint could not be written.*No space"
        ):
            resume(Checkpointer(tmp_path))
    monkeypatch.undo()
    checkpointer = Checkpointer(tmp_path, keep=1)
    resume(checkpointer)
    assert checkpointer.best() == tmp_path / "checkpoints" / "checkpoint-4"
    for step in (6, 8):
        save(checkpointer, step)
    assert steps(tmp_path) == [4, 8]
    assert checkpointer.best() == tmp_path / "checkpoints" / "checkpoint-4"


def test_a_continued_run_corrects_best_json(tmp_path):
    settings = {
        "num_epochs": 2,
        "sample.num_groups": 1,
        "eval.num_prompts": 1,
        "eval.num_steps": 2,
        "eval.at_start": False,
        "log.num_images": 0,
        "checkpoint.keep": 0,
    }
    train_here(tmp_path, settings)
    checkpointer = Checkpointer(tmp_path)
    best, newest = checkpointer.best(), checkpointer.load_latest()
    assert best is not None and newest is not None and newest.state["best"] == best.name
    (other,) = (path for path in best.parent.glob("checkpoint-*") if path != best)
    (best.parent / "best.json").write_text(json.dumps({"checkpoint": other.name}))
    train_here(tmp_path, settings)
    assert checkpointer.best() == best


def test_after_a_fallback_the_best_is_the_older_checkpoints(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 2, best=True)
    flip_a_byte(save(checkpointer, 4, best=True))
    with pytest.warns(UserWarning, match="falling back"):
        resume(checkpointer)
    assert checkpointer.best() == tmp_path / "checkpoints" / "checkpoint-2"


def test_a_checkpoint_that_names_no_best_leaves_best_json(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 2)
    (tmp_path / "checkpoints" / "best.json").write_text('{"checkpoint": "checkpoint-2"}')
    resume(checkpointer)
    assert checkpointer.best() == tmp_path / "checkpoints" / "checkpoint-2"


def test_a_failing_disk_keeps_the_former_state_and_names_the_path(tmp_path, monkeypatch):
    save(Checkpointer(tmp_path), 4)

    def refuse(source, target):
        if Path(source).name.startswith(".tmp-"):
            raise PermissionError("read-only")
        return Path(source).rename(target)

    monkeypatch.setattr("diffusion_nft.runs.checkpoint.os.replace", refuse)
    with pytest.raises(CheckpointError, match="read-only"):
        save(Checkpointer(tmp_path), 4)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]
    with pytest.raises(TypeError):
        Checkpointer(tmp_path).save(6, tensors={}, state={"not": torch.zeros(1)})
    assert_is_step(tmp_path, 4)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=str(tmp_path / "file")):
        save(Checkpointer(tmp_path / "file"), 1)


def flip_a_byte(path: Path) -> None:
    file = path / "current.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def manifest(text: str) -> Callable[[Path], object]:
    """Writes ``text`` in place of a checkpoint's manifest."""
    return lambda path: (path / "manifest.json").write_text(text)


INFINITE = '{"tensors": [], "files": {"state.json": {"size": 1e999, "sha256": ""}}}'
DAMAGES = {
    "flipped": (flip_a_byte, "current.safetensors has another SHA-256"),
    "cut": (
        lambda path: os.truncate(path / "current.safetensors", 100),
        "current.safetensors has .* bytes",
    ),
    "missing": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
    "empty manifest": (manifest(""), "manifest.json"),
    "zeros": (manifest("\0" * 99), "manifest.json"),
    "a list": (manifest("[]"), "manifest.json"),
    "no files": (manifest('{"tensors": []}'), "manifest.json is invalid"),
    "other types": (manifest('{"tensors": [], "files": {"a": 1}}'), "manifest.json is invalid"),
    "an infinite size": (manifest(INFINITE), "manifest.json is invalid"),
    "nested too deep": (manifest("[" * 100_000), "manifest.json is damaged: not JSON"),
    "nothing listed": (manifest('{"tensors": [], "files": {}}'), "manifest.json lacks state.json"),
}


@pytest.mark.parametrize("damage, message", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_skipped(tmp_path, damage, message):
    checkpointer = Checkpointer(tmp_path, keep=1)
    save(checkpointer, 2)
    save(Checkpointer(tmp_path, keep=2), 4)
    damage(tmp_path / "checkpoints" / "checkpoint-4")
    with pytest.raises(CheckpointError, match=f"checkpoint-4.*{message}"):
        load_checkpoint(tmp_path / "checkpoints" / "checkpoint-4")
    with pytest.warns(UserWarning, match=f"checkpoint-4.*{message}.*checkpoint-2"):
        assert_is_step(tmp_path, 2)
    # A later save does not count the damaged one as the newest, and so prunes only older ones.
    save(checkpointer, 3)
    assert steps(tmp_path) == [3, 4]
    with pytest.warns(UserWarning, match="checkpoint-3"):
        assert_is_step(tmp_path, 3)
    save(checkpointer, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_is_step(tmp_path, 4)


@pytest.mark.parametrize("damage", [b"", b'{"checkpoi', b"[1]", b"{}", None])
def test_damage_of_best_json_does_not_lose_the_best(tmp_path, damage):
    checkpointer = Checkpointer(tmp_path, keep=1)
    best, note = save(checkpointer, 2, best=True), tmp_path / "checkpoints" / "best.json"
    if damage is None:
        note.unlink()
    else:
        note.write_bytes(damage)
    if damage in (None, b"{}"):
        save(checkpointer, 4)
    else:
        with pytest.warns(UserWarning, match=r"best\.json.*named by the newest"):
            save(checkpointer, 4)
    assert steps(tmp_path) == [2, 4]
    assert_is_step(tmp_path, 4)
    assert json.loads(note.read_text()) == {"checkpoint": "checkpoint-2"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(checkpointer, 6)
        assert checkpointer.best() == best
    assert steps(tmp_path) == [2, 6]
    save(checkpointer, 8, best=True)
    assert checkpointer.best() == tmp_path / "checkpoints" / "checkpoint-8"
    assert steps(tmp_path) == [8]


def test_a_full_disk_at_any_write_leaves_the_former_state(tmp_path, monkeypatch):
    """Replacing step 4: every file of the new checkpoint, in turn, finds no room."""
    save(Checkpointer(tmp_path, keep=2), 2)
    save(Checkpointer(tmp_path, keep=2), 4)
    write_bytes, room = Path.write_bytes, 0

    def write(path, data):
        nonlocal room
        room -= 1
        if room < 0:
            write_bytes(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    for files in range(3):
        room = files
        with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written.*No space"):
            save(Checkpointer(tmp_path, keep=2), 4)
        assert_is_step(tmp_path, 4)
        assert steps(tmp_path) == [2, 4]
    room = 3
    save(Checkpointer(tmp_path, keep=2), 4)


def test_a_folder_without_fsync_is_not_an_error(tmp_path, monkeypatch):
    """As on some network file systems; fsync of a file must still not fail silently."""
    fsync = os.fsync

    def refuse(folders, number):
        def call(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        return call

    monkeypatch.setattr("os.fsync", refuse(True, errno.EINVAL))
    save(Checkpointer(tmp_path), 2)
    assert_is_step(tmp_path, 2)
    for folders, number in ((True, errno.EIO), (False, errno.EINVAL)):
        monkeypatch.setattr("os.fsync", refuse(folders, number))
        with pytest.raises(CheckpointError, match="could not be written"):
            save(Checkpointer(tmp_path), 4)
    assert_is_step(tmp_path, 2)


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path):
    flip_a_byte(save(Checkpointer(tmp_path), 2))
    with pytest.raises(CheckpointError, match=r"all checkpoints are damaged.*checkpoint-2"):
        Checkpointer(tmp_path).load_latest()


def test_malformed_names_are_ignored(tmp_path):
    save(Checkpointer(tmp_path), 2)
    for name in ("x", "", "9.bak", "-9", "09"):
        (tmp_path / "checkpoints" / f"checkpoint-{name}").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-99").write_text("a file")
    assert Checkpointer(tmp_path).latest() == tmp_path / "checkpoints" / "checkpoint-2"
    assert_is_step(tmp_path, 2)


def test_resolve_checkpoint(tmp_path):
    path = save(Checkpointer(tmp_path), 2)
    save(Checkpointer(tmp_path), 10)
    assert resolve_checkpoint(path) == path
    assert resolve_checkpoint(tmp_path).name == "checkpoint-10"
    assert load_checkpoint(resolve_checkpoint(tmp_path)).state["epoch"] == 5
    with pytest.raises(ValueError, match="neither a checkpoint nor a run directory"):
        resolve_checkpoint(tmp_path / "nowhere")


def test_optimizer_continues_bitwise(tmp_path):
    def build() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        g = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(3, 2, generator=g)) for _ in range(3)]
        groups = [{"params": weights[:2], "lr": 0.1 / 3}, {"params": weights[2:], "lr": 1e-3}]
        return weights, torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=1e-4)

    def step(weights, optimizer, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for weight in weights[:2]:  # the third never gets a gradient, so it has no state
            weight.grad = torch.randn(weight.shape, generator=g)
        optimizer.step()

    weights, optimizer = build()
    for seed in range(3):
        step(weights, optimizer, seed)
    flat, state = flatten_optimizer(optimizer.state_dict())
    assert flat.keys() == {
        f"{i}.{name}" for i in (0, 1) for name in ("step", "exp_avg", "exp_avg_sq")
    }
    Checkpointer(tmp_path).save(3, tensors={"optimizer": flat}, state=state)
    checkpoint = Checkpointer(tmp_path).load_latest()
    assert checkpoint is not None
    restored = unflatten_optimizer(checkpoint.tensors["optimizer"], checkpoint.state)
    assert restored["param_groups"] == optimizer.state_dict()["param_groups"]
    copies, fresh = build()
    fresh.load_state_dict(restored)
    with torch.no_grad():
        for copy, weight in zip(copies, weights, strict=True):
            copy.copy_(weight)
    for seed in range(3, 6):
        step(weights, optimizer, seed)
        step(copies, fresh, seed)
    assert all(map(torch.equal, copies, weights))
