"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder of safetensors and JSON, written under a temporary name, fsynced and
renamed, with a manifest of every file's size and SHA-256.  Nothing is ever pickled or unpickled.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from diffusion_nft.utils.files import DiskError, sha256, sync, write_atomically

FOLDER, STATE, MANIFEST, BEST = "checkpoints", "state.json", "manifest.json", "best.json"
# A checkpoint that is being written or deleted, and one that waits to be replaced by its successor.
TEMPORARY_PREFIX, REPLACED_PREFIX = ".tmp-", ".replaced-"


class CheckpointError(DiskError):
    """A checkpoint could not be written, or what is on disk is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: named groups of CPU tensors and the JSON state."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


class Checkpointer:
    """The checkpoints of ``run_dir``: the newest ``keep`` (0: all) and the best one are kept."""

    def __init__(self, run_dir: Path, keep: int = 3):
        self._folder = Path(run_dir) / FOLDER
        self._keep = keep

    def save(
        self,
        step: int,
        *,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        write_extra: Callable[[Path], None] | None = None,
        best: bool = False,
    ) -> Path:
        """Writes ``checkpoints/checkpoint-<step>/`` and returns it: there whole, or not at all.

        Every group of ``tensors`` becomes ``<name>.safetensors``, ``state`` (JSON-able) becomes
        state.json, and ``write_extra(folder)`` may add files.  A checkpoint of the same step is
        replaced.  ``best`` marks this one to be kept; the best one's name is in the state as
        ``best`` too, so that no kill parts it from the rest.  If the disk refuses, raises
        CheckpointError naming the path; the former checkpoints are then untouched.
        """
        final = self._folder / f"checkpoint-{step}"
        temporary = self._folder / f"{TEMPORARY_PREFIX}{final.name}"
        with _disk_errors(f"checkpoint {final} could not be written"):
            self._folder.mkdir(parents=True, exist_ok=True)
            sync(self._folder.parent)
            self._clean_up()
            known = self.best()
            kept = final.name if best else known and known.name
            if kept:
                state = state | {"best": kept}
            try:
                temporary.mkdir()
                _fill(temporary, tensors, state, write_extra)
                self._put_in_place(temporary, final)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            self._note_best(kept)
            self._prune(step, kept)
        return final

    def latest(self) -> Path | None:
        """The checkpoint of the highest step, unverified; None if there is none."""
        found = self._found()
        return found[max(found)] if found else None

    def best(self) -> Path | None:
        """The checkpoint last saved as best, unverified; None if there is none.

        If best.json is missing or damaged (which costs a warning), or names none that is there, it
        is the one that the newest readable state names.
        """
        found = {path.name: path for path in self._found().values()}
        return found.get(self._noted_best()) or found.get(self._stated_best())

    def restore_best(self, checkpoint: Checkpoint) -> None:
        """Makes best.json agree with ``checkpoint``, from which the run goes on.

        A kill or a full disk may have left it behind; after damage to newer checkpoints it is
        ahead.  It stays as it is if ``checkpoint`` names no best one, or one that is gone.
        Raises CheckpointError if the disk refuses.
        """
        name = checkpoint.state.get("best")
        if name in {path.name for path in self._found().values()}:
            with _disk_errors("the best checkpoint could not be noted"):
                self._note_best(name)

    def _note_best(self, name: str | None) -> None:
        if name and name != self._noted_best():
            write_atomically(self._folder / BEST, _json({"checkpoint": name}))

    def _noted_best(self) -> str:
        """The name in best.json; empty if there is none."""
        path = self._folder / BEST
        if not path.is_file():
            return ""
        try:
            return str(read_json(path).get("checkpoint"))
        except CheckpointError as error:
            warnings.warn(f"{error}: the newest checkpoint says which was the best", stacklevel=3)
            return ""

    def _stated_best(self) -> str:
        """The name in the newest state that can be read; empty if there is none."""
        for _, path in sorted(self._found().items(), reverse=True):
            with suppress(CheckpointError):
                return str(read_json(path / STATE).get("best"))
        return ""

    def load_latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None if there are no checkpoints.

        A warning names each damaged one that is passed over.  Raises CheckpointError if all are
        damaged: starting from nothing is for the user to decide.
        """
        failures = []
        for _, path in sorted(self._found().items(), reverse=True):
            try:
                checkpoint = load_checkpoint(path)
            except CheckpointError as error:
                failures.append(str(error))
                continue
            if failures:
                warnings.warn(f"{'; '.join(failures)}; falling back to {path}", stacklevel=2)
            return checkpoint
        if failures:
            raise CheckpointError(f"no checkpoint can be used: {'; '.join(failures)}")
        return None

    def _found(self) -> dict[int, Path]:
        """Step -> folder.  A folder set aside counts while its successor is not in place."""
        found = {}
        for prefix in (REPLACED_PREFIX, ""):
            for path in self._folder.glob(f"{prefix}checkpoint-*"):
                match = re.fullmatch(re.escape(prefix) + r"checkpoint-(0|[1-9]\d*)", path.name)
                if match and path.is_dir():
                    found[int(match[1])] = path
        return found

    def _put_in_place(self, temporary: Path, final: Path) -> None:
        """Renames; a folder cannot replace a folder, so the former one steps aside for a moment."""
        aside = final.with_name(f"{REPLACED_PREFIX}{final.name}")
        if final.exists():
            os.replace(final, aside)
        try:
            os.replace(temporary, final)
        except OSError:
            if aside.exists():
                os.replace(aside, final)
            raise
        sync(self._folder)
        shutil.rmtree(aside, ignore_errors=True)

    def _clean_up(self) -> None:
        """Removes what a crash or a busy file system left, and puts back what was set aside."""
        for aside in self._folder.glob(f"{REPLACED_PREFIX}checkpoint-*"):
            final = aside.with_name(aside.name.removeprefix(REPLACED_PREFIX))
            if final.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.replace(aside, final)
        for path in self._folder.glob(f"{TEMPORARY_PREFIX}checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self, step: int, best: str | None) -> None:
        """Keeps the newest up to ``step`` and the one named ``best``.

        Later ones can only be damaged ones that were passed over at the start: they are not counted
        among the newest, and are left for people to look at.
        """
        found = self._found()
        older = sorted((s for s in found if s <= step), reverse=True)
        for s in older[self._keep :] if self._keep else []:
            if found[s].name != best:
                # Renamed first, so that a kill leaves no half checkpoint under a valid name.
                doomed = found[s].with_name(f"{TEMPORARY_PREFIX}{found[s].name}")
                os.replace(found[s], doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def _fill(
    folder: Path,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    write_extra: Callable[[Path], None] | None,
) -> None:
    """Writes all files of a checkpoint into the empty ``folder`` and makes them durable."""
    _write(folder / STATE, _json(state))
    for name, group in tensors.items():
        plain = {key: value.detach().cpu().contiguous() for key, value in group.items()}
        _write(folder / f"{name}.safetensors", safetensors.torch.save(plain))
    if write_extra is not None:
        write_extra(folder)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        sync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    _write(folder / MANIFEST, _json({"tensors": list(tensors), "files": files}))
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)


def load_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in folder ``path``, on the CPU.

    Raises CheckpointError naming the folder and the file if one is missing, of another size or of
    other content than the manifest says.
    """
    manifest = read_json(path / MANIFEST)
    try:
        groups = [str(name) for name in manifest["tensors"]]
        files = {str(k): (int(v["size"]), str(v["sha256"])) for k, v in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} is no manifest") from error
    for name in (STATE, *(f"{group}.safetensors" for group in groups)):
        if name not in files:
            raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} lacks {name}")
    for name, expected in files.items():
        with _disk_errors(f"checkpoint {path}: {name} cannot be read"):
            problem = _damage(path / name, *expected)
        if problem:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} {problem}")
    with _disk_errors(f"checkpoint {path} cannot be read"):
        load = safetensors.torch.load_file
        tensors = {name: load(path / f"{name}.safetensors") for name in groups}
    return Checkpoint(tensors, read_json(path / STATE), path)


def _damage(file: Path, size: int, digest: str) -> str:
    """What is wrong with ``file``; empty if nothing is."""
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != size:
        return f"has {file.stat().st_size} bytes, not {size}"
    return "" if sha256(file) == digest else "has another SHA-256"


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the latest of a run directory.

    Raises ValueError if there is none.
    """
    latest = path if (path / MANIFEST).is_file() else Checkpointer(path).latest()
    if latest is None:
        hint = "; its LoRA can be given by --lora_hf_path" if (path / "lora").is_dir() else ""
        raise ValueError(f"{path} is neither a checkpoint nor a run directory that holds one{hint}")
    return latest


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file ``path`` of a checkpoint; CheckpointError if it cannot be had."""
    with _disk_errors(f"{path} cannot be read"):
        data = path.read_bytes()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:  # the latter: nested too deep
        raise CheckpointError(f"checkpoint {path.parent}: {path.name} is not JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint {path.parent}: {path.name} holds no JSON object")
    return value


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sync(path)


@contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    """Turns what the disk raises into a CheckpointError that begins with ``what``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{what}: {error}") from error
