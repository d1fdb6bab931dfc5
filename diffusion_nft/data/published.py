"""The published prompt sets: fetched, and told apart from a user's own files."""

import os
from pathlib import Path

from diffusion_nft.data.download import DownloadError, fetch
from diffusion_nft.data.prompts import PUBLISHED_URL, PublishedFile

URL_VARIABLE = "DIFFUSION_NFT_DATA_URL"


def fetch_published(name: str, file: PublishedFile, root: Path) -> str:
    """Fetches ``file`` of the set ``name`` unless it exists; returns a line for the user.

    Raises DownloadError if the existing file is another.
    """
    base = (os.environ.get(URL_VARIABLE) or PUBLISHED_URL).rstrip("/")
    url, target = f"{base}/{name}/{file.name}", root / name / file.name
    return fetch(url, target, f"git:{file.git_blob}")


def is_published(name: str, file: PublishedFile, root: Path) -> bool:
    """Whether ``file`` is there and is the published one."""
    if not (root / name / file.name).is_file():
        return False
    try:
        # Of a file that is there, fetch only compares the hash.
        fetch_published(name, file, root)
    except DownloadError:
        return False
    return True
