"""Download and verification of the published prompt sets."""

import os
from pathlib import Path

from diffusion_nft.data.download import DownloadError, fetch
from diffusion_nft.data.prompts import PUBLISHED_URL, PublishedFile

URL_VARIABLE = "DIFFUSION_NFT_DATA_URL"


def fetch_published(name: str, file: PublishedFile, root: Path) -> str:
    """As ``download.fetch``, for ``file`` of the published set ``name``."""
    base = (os.environ.get(URL_VARIABLE) or PUBLISHED_URL).rstrip("/")
    url, target = f"{base}/{name}/{file.name}", root / name / file.name
    return fetch(url, target, f"git:{file.git_blob}")


def is_published(name: str, file: PublishedFile, root: Path) -> bool:
    """True if ``file`` exists and is identical to the published one."""
    if not (root / name / file.name).is_file():
        return False
    try:
        # Verifies an existing file without downloading.
        fetch_published(name, file, root)
    except DownloadError:
        return False
    return True
