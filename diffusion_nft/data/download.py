"""Verified downloads: from the Hugging Face hub by huggingface_hub, from elsewhere by torch.hub."""

import hashlib
import os
import socket
import sys
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from torch.hub import download_url_to_file

from diffusion_nft.utils.files import sha256, sync

TIMEOUT_S = 60


class DownloadError(OSError):
    """A file is not available, or differs from the published one; the message is one line."""


def fetch(url: str, target: Path, published: str) -> str:
    """Downloads ``url`` to ``target`` unless it exists, and verifies it; returns a line to print.

    ``published``: "sha256:" and the hash or its first digits, or "git:" and the blob id.  Raises
    DownloadError.
    """
    if target.is_file():
        how = "already there"
        if problem := _difference(target, published):
            raise DownloadError(f"{target}, from {url}, {problem}: delete it to fetch it again")
    else:
        how = "downloaded"
        _download(url, target, published)
    return f"{target} {how}, {target.stat().st_size:,} bytes (as published)"


def _download(url: str, target: Path, published: str) -> None:
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)  # torch.hub sets none
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
            part = Path(folder, target.name)
            download_url_to_file(url, str(part), progress=sys.stderr.isatty())
            if problem := _difference(part, published):
                raise OSError(f"the download {problem} and was deleted")
            sync(part)
            os.replace(part, target)
    except (OSError, HTTPException) as error:
        raise DownloadError(
            f"{target.name} could not be fetched from {url} to {target}: {_reason(error)}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _difference(path: Path, published: str) -> str:
    """Description of a mismatch between ``path`` and the ``published`` hash, or ""."""
    kind, _, wanted = published.partition(":")
    if kind == "sha256":
        found, name = sha256(path), "SHA-256"
    else:
        content = path.read_bytes()
        blob = b"blob %d\0" % len(content) + content
        found, name = hashlib.sha1(blob, usedforsecurity=False).hexdigest(), "git blob id"
    return "" if found.startswith(wanted) else f"has the {name} {found}, not {wanted}"


def fetch_from_hub(repo: str, files: Sequence[str], target: Path | None = None) -> Path:
    """The folder with ``files`` of ``repo``, downloaded unless present, and verified.

    ``files``: names, and patterns with "*" of optional files.  ``target``: the folder; None: the
    hub's cache.  If the files are there and the hub does not answer, warns that they were not
    verified.  Raises DownloadError.
    """
    page = f"{constants.ENDPOINT}/{repo}"
    folder, present = target, False
    try:
        if folder is None or _missing(folder, files):  # never replaces a user's files
            folder = Path(snapshot_download(repo, allow_patterns=[*files], local_dir=target))
        present = not _missing(folder, files)
        checked = HfApi().verify_repo_checksums(repo, local_dir=folder)
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"{page} does not exist, is private or is gated: check the name, accept the licence "
            "there if it asks for that, and run `hf auth login`"
        ) from error
    except (OSError, HTTPError) as error:
        if folder is not None and present:
            warnings.warn(f"{folder} is not verified: {_reason(error)}", stacklevel=2)
            return folder
        raise DownloadError(
            f"{repo} could not be fetched from {page} to {target or constants.HF_HUB_CACHE}: "
            f"{_reason(error.__cause__ or error)}"
        ) from error
    if missing := _missing(folder, files):
        raise DownloadError(f"{page} does not have {', '.join(missing)}")
    for file in checked.mismatches:
        if any(fnmatch(file["path"], pattern) for pattern in files):
            raise DownloadError(
                f"{(folder / file['path']).resolve()} has the {file['algorithm']} "
                f"{file['actual']}, not {file['expected']}: delete it to fetch it again"
            )
    return folder


def in_hub_cache(repo: str, files: Sequence[str]) -> bool:
    """True if all ``files`` of ``repo`` are in the hub's cache."""
    try:
        folder = snapshot_download(repo, allow_patterns=[*files], local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return not _missing(Path(folder), files)


def _missing(folder: Path, files: Sequence[str]) -> list[str]:
    return [name for name in files if "*" not in name and not (folder / name).is_file()]


def _reason(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
