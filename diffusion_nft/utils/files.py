"""Small files that are written atomically and durably; reading JSON that may be damaged; hashes."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class DiskError(OSError):
    """A file of a run could not be written, or is damaged."""


def sync(path: Path) -> None:
    """fsync of a file or folder.  Ignores EINVAL for a folder, which some network file systems
    return.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into a DiskError that names ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiskError(error.errno, f"{path} could not be written: {reason}") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the content of ``path`` by ``data`` atomically, also in case of a power cut.

    Raises DiskError naming the path, which then is unchanged.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    with naming(path):
        try:
            temporary.write_bytes(data)
            sync(temporary)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


def append_line(path: Path, line: str) -> None:
    """Appends ``line`` to the text file ``path`` with fsync.

    First removes an incomplete last line, left by a crash.  Raises DiskError naming the path.
    """
    with naming(path), path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file ``path``.  Raises ValueError naming it if it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # the latter: nested too deeply
        raise ValueError(f"{path} is damaged: not JSON") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: not a JSON object")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; empty if it does not exist.

    Skips an incomplete last line.  Raises ValueError naming any other that is not an object.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not JSON") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} is not a JSON object")
        rows.append(row)
    return rows
