"""A lock that lets one process at a time write to a folder.

The kernel releases the lock when the process ends, even after a crash.  It is a POSIX record lock
(``lockf``) rather than ``flock``: forked children, such as a reward's workers, do not inherit it,
and network file systems honour it between hosts.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusion_nft.distributed.ranks import Distributed

LOCK_FILE = ".lock"


class FolderInUse(OSError):
    """Another process writes to the folder."""


@contextmanager
def only_writer(key: str, folder: Path, dist: Distributed) -> Iterator[None]:
    """Creates ``folder``, the value of ``key``, and locks it on the main rank during the block.

    Raises FolderInUse on every rank, naming host and process, if another process holds the lock.
    Prints a warning if the folder cannot be locked (a file system without locks, a read-only disk).
    """
    lock, in_use, new = None, "", not folder.exists()
    if dist.is_main:
        try:
            lock = _lock(folder)
        except FolderInUse as error:
            in_use = (
                f"{key} = {str(folder)!r} is in use by {error}; wait until it ends, or choose "
                f"another {key}"
            )
        except OSError as error:
            dist.log(
                f"{key} = {str(folder)!r} cannot be locked ({error.strerror}): make sure that no "
                "other process writes there",
                logging.WARNING,
            )
    try:
        if in_use := dist.broadcast_object(in_use):
            raise FolderInUse(in_use)
        yield
    finally:
        if lock is not None:
            # Removed while locked: a process that has opened it checks for that (see _lock).
            with suppress(OSError):
                (folder / LOCK_FILE).unlink()
                if new:
                    folder.rmdir()  # only if nothing was written
            os.close(lock)


def _lock(folder: Path) -> int:
    """The descriptor of the locked file; closing it unlocks.

    Raises FolderInUse with the holder as its text, or OSError if the file cannot be locked.
    """
    path = folder / LOCK_FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the former holder has just removed the folder
            continue
        try:
            _lock_file(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        # The former holder may have removed the file since it was opened here.
        if _is_file(path, descriptor):
            _write_holder(descriptor)
            return descriptor
        os.close(descriptor)


def _is_file(path: Path, descriptor: int) -> bool:
    """True if ``path`` is still the file of ``descriptor``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    """Writes the lock's holder for the error messages of others, except on a full disk."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = f"process {os.getpid()} on host {socket.gethostname()} since {now}"
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, text.encode())
        os.fsync(descriptor)  # readers may be on other hosts


def _lock_file(descriptor: int) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # EAGAIN or EACCES: POSIX allows both
        holder = os.read(descriptor, 4096).decode(errors="replace")
        raise FolderInUse(holder or "another process") from error
