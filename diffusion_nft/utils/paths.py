"""Paths given by users: expansion of ``~``, validation, and folders checked to be writable."""

import errno
import os
import secrets
import unicodedata
from pathlib import Path

from diffusion_nft.utils.files import DiskError, naming


def is_line(text: str) -> bool:
    """True if ``text`` has no control characters (line ends, NUL) and no unpaired surrogates."""
    return not {"Cc", "Cs"} & {unicodedata.category(char) for char in text}


def expand(text: str) -> str:
    """``text`` with a leading ``~`` or ``~user`` replaced by that home folder.

    Raises ValueError for a control character or a user without a home folder; its message does not
    repeat ``text``.
    """
    if not is_line(text):
        raise ValueError("is not a path: it holds a control character")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        user = text.partition("/")[0]
        raise ValueError(f"is not a path: {user} has no home (a folder of that name is ./{user})")
    return path


def prepare_folder(folder: Path) -> None:
    """Creates ``folder`` if it does not exist, and checks that it is writable.

    Raises DiskError naming it, so that a command fails before its work rather than after.
    """
    if folder.exists() and not folder.is_dir():
        raise DiskError(errno.ENOTDIR, f"{folder} is not a folder")
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".tmp-{secrets.token_hex(8)}"
        try:
            probe.write_bytes(b"\0")
        finally:
            probe.unlink(missing_ok=True)
