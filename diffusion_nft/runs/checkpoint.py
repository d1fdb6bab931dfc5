"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder of safetensors and JSON, written under a temporary name, fsynced and
renamed, with a manifest of each file's size and SHA-256.  Pickle is not used.
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

from diffusion_nft.utils.files import DiskError, read_object, sha256, sync, write_atomically

FOLDER, STATE, MANIFEST, BEST = "checkpoints", "state.json", "manifest.json", "best.json"
# Name prefixes of a checkpoint being written or deleted, and of one set aside for its replacement.
TEMPORARY_PREFIX, REPLACED_PREFIX = ".tmp-", ".replaced-"


class CheckpointError(DiskError):
    """A checkpoint could not be written, or is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: named groups of CPU tensors and the JSON state."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


class Checkpointer:
    """The checkpoints of ``run_dir``; keeps the newest ``keep`` (0: all) and the best one."""

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
        """Writes ``checkpoints/checkpoint-<step>/`` atomically and returns its path.

        Each group of ``tensors`` becomes ``<name>.safetensors``, ``state`` becomes state.json, and
        ``write_extra(folder)`` may add files.  A checkpoint of the same step is replaced.  ``best``
        marks this one as best; the state also records the best one's name, in case a kill prevents
        the update of best.json.  Raises CheckpointError naming the path if the disk fails, leaving
        former checkpoints untouched.
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
        """The checkpoint of the highest step, unverified, or None."""
        found = self._found()
        return found[max(found)] if found else None

    def best(self) -> Path | None:
        """The checkpoint last saved as best, unverified, or None.

        If best.json is missing, damaged (with a warning) or outdated, the newest readable state
        tells which it is.
        """
        found = {path.name: path for path in self._found().values()}
        return found.get(self._noted_best()) or found.get(self._stated_best())

    def restore_best(self, checkpoint: Checkpoint) -> None:
        """Makes best.json agree with ``checkpoint``, from which the run continues.

        It is older after a kill or on a full disk, and newer if later checkpoints are damaged.  It
        is unchanged if ``checkpoint`` names no best one, or one that no longer exists.
        Raises CheckpointError if the disk fails.
        """
        name = checkpoint.state.get("best")
        if name in {path.name for path in self._found().values()}:
            with _disk_errors("the name of the best checkpoint could not be written"):
                self._note_best(name)

    def _note_best(self, name: str | None) -> None:
        if name and name != self._noted_best():
            write_atomically(self._folder / BEST, _json({"checkpoint": name}))

    def _noted_best(self) -> str:
        """The name in best.json, or ""."""
        path = self._folder / BEST
        if not path.is_file():
            return ""
        try:
            return str(read_json(path).get("checkpoint"))
        except CheckpointError as error:
            warnings.warn(
                f"{error}: using the best one named by the newest checkpoint", stacklevel=3
            )
            return ""

    def _stated_best(self) -> str:
        """The name in the newest readable state, or ""."""
        for _, path in sorted(self._found().items(), reverse=True):
            with suppress(CheckpointError):
                return str(read_json(path / STATE).get("best"))
        return ""

    def load_latest(self) -> Checkpoint | None:
        """The newest intact checkpoint, or None if there are no checkpoints.

        Warns of each damaged one that is skipped.  Raises CheckpointError if all are damaged: only
        the user may decide to start from scratch.
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
            raise CheckpointError(f"all checkpoints are damaged: {'; '.join(failures)}")
        return None

    def _found(self) -> dict[int, Path]:
        """Step -> folder, which may be one set aside whose replacement is not in place."""
        found = {}
        for prefix in (REPLACED_PREFIX, ""):
            for path in self._folder.glob(f"{prefix}checkpoint-*"):
                match = re.fullmatch(re.escape(prefix) + r"checkpoint-(0|[1-9]\d*)", path.name)
                if match and path.is_dir():
                    found[int(match[1])] = path
        return found

    def _put_in_place(self, temporary: Path, final: Path) -> None:
        """Renames ``temporary``; an existing folder is set aside, as a rename cannot replace it."""
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
        """Removes leftovers of a crash, and restores a folder set aside without replacement."""
        for aside in self._folder.glob(f"{REPLACED_PREFIX}checkpoint-*"):
            final = aside.with_name(aside.name.removeprefix(REPLACED_PREFIX))
            if final.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.replace(aside, final)
        for path in self._folder.glob(f"{TEMPORARY_PREFIX}checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _prune(self, step: int, best: str | None) -> None:
        """Deletes all up to ``step`` except the newest ones and the one named ``best``.

        Later ones are damaged ones that were skipped at the start: they do not count as newest,
        and are kept for inspection.
        """
        found = self._found()
        older = sorted((s for s in found if s <= step), reverse=True)
        for s in older[self._keep :] if self._keep else []:
            if found[s].name != best:
                # Renamed first, so that a kill leaves no incomplete checkpoint under a valid name.
                deleted = found[s].with_name(f"{TEMPORARY_PREFIX}{found[s].name}")
                os.replace(found[s], deleted)
                shutil.rmtree(deleted, ignore_errors=True)


def _fill(
    folder: Path,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    write_extra: Callable[[Path], None] | None,
) -> None:
    """Writes and fsyncs all files of a checkpoint into the empty ``folder``."""
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

    Raises CheckpointError naming the folder and the file if one is missing, or does not match the
    manifest's size and SHA-256.
    """
    manifest = read_json(path / MANIFEST)
    try:
        groups = [str(name) for name in manifest["tensors"]]
        files = {str(k): (int(v["size"]), str(v["sha256"])) for k, v in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} is invalid") from error
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
    """The damage of ``file``, or ""."""
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != size:
        return f"has {file.stat().st_size} bytes, not {size}"
    return "" if sha256(file) == digest else "has another SHA-256"


def resolve_checkpoint(path: Path) -> Path:
    """``path`` itself if it is a checkpoint, or the latest one of a run directory.

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
    """``read_object`` of a file of a checkpoint; CheckpointError if it is missing or damaged."""
    try:
        with _disk_errors(f"{path} cannot be read"):
            return read_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sync(path)


@contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    """Turns errors of the disk into a CheckpointError that begins with ``what``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{what}: {error}") from error
