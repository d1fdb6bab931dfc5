"""Files from the network: resumed, checked, and put in place only as a whole.

Plain files come by urllib, which honours HTTPS_PROXY and its kin and is always there; the HTTP
client that huggingface_hub brings along has changed from release to release.  HF_ENDPOINT stands in
for huggingface.co.  Files of the hub's models come by huggingface_hub into its own cache.
"""

import fcntl
import hashlib
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

HUB = "https://huggingface.co"
CHECKSUMS = "checksums.json"
TIMEOUT_S = 60
BLOCK = 1 << 20

# part of a hub repository -> the files that are read, in order of preference.
HUB_PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "model": (
        ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    ),
    "tokenizer": (
        (
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
            "vocab.txt",
            "merges.txt",
        ),
    ),
    "images": (("preprocessor_config.json", "processor_config.json"),),
    "open_clip": (("open_clip_model.safetensors",), ("open_clip_pytorch_model.bin",)),
}


class DownloadError(OSError):
    """What could not be had, or is not what it should be, with the remedy, in one line."""


@dataclass(frozen=True)
class Fetched:
    """A file in place; ``check``: what its hash was held against, in words."""

    path: Path
    size: int
    sha256: str
    downloaded: bool
    check: str

    def __str__(self) -> str:
        how = "downloaded" if self.downloaded else "already there"
        return f"{self.path} {how}, {self.size:,} bytes, SHA-256 {self.sha256} ({self.check})"


def fetch(
    url: str,
    target: Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    git_blob: str | None = None,
) -> Fetched:
    """Fetches ``url`` to ``target`` unless it is there, and checks it in either case.

    ``size``: in bytes; ``sha256``: lower-case hex digits, all or the first ones; ``git_blob``:
    the id that git gives the content.  With neither hash the first SHA-256 seen is recorded in
    ``checksums.json`` beside the file, and later ones must equal it.  Raises DownloadError.

    A download that was cut off goes on from its ``.part`` file if a hash tells whether the whole
    came out right.  A second process that wants the same file waits for the first.
    """
    url = _mirrored(url)
    recorded = None if sha256 or git_blob else _recorded(target)
    wanted = _Wanted(size, sha256 or recorded, git_blob)
    content, announced = None, False
    if not target.is_file():
        content, announced = _download(url, target, wanted)
    downloaded = content is not None
    if content is None:
        content = _Content.of(target)
        problem = wanted.problem(content)
        if problem:
            remedy = "delete it to fetch it anew"
            if recorded:
                remedy += f" (and its entry in {CHECKSUMS}, if it was meant to change)"
            raise DownloadError(f"{target}, from {url}, {problem}: {remedy}")
    if sha256 or git_blob:
        check = "as published"
    elif recorded:
        check = f"as recorded in {CHECKSUMS} at the first download"
    else:
        _record(target, url, content)
        source = "as the server announced" if announced else "no hash is published"
        check = f"{source}; recorded in {CHECKSUMS} and checked from now on"
    return Fetched(target, content.size, content.sha256, downloaded, check)


def fetch_from_hub(repo: str, parts: Sequence[str]) -> Path:
    """The folder of ``repo`` in the hub's cache, with its ``parts`` (of HUB_PARTS) downloaded.

    Raises DownloadError.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError

    page = f"{constants.ENDPOINT}/{repo}"
    folder = Path()
    for part in parts:
        try:
            found = _snapshot(repo, part, local=False)
        except GatedRepoError as error:
            raise DownloadError(
                f"{repo} is gated: accept its licence at {page} and run `hf auth login`"
            ) from error
        except RepositoryNotFoundError as error:
            raise DownloadError(
                f"{page} does not exist or is private: check the name, or run `hf auth login` as "
                "someone who may read it"
            ) from error
        except (OSError, HTTPError) as error:
            raise DownloadError(
                f"{repo} could not be fetched from {page} to {constants.HF_HUB_CACHE}: "
                f"{_reason(error.__cause__ or error)}"
            ) from error
        if found is None:
            wanted = " or ".join(names[0] for names in HUB_PARTS[part])
            raise DownloadError(f"{page} has no {part} files, like {wanted}")
        folder = found
    return folder


def in_hub_cache(repo: str, parts: Sequence[str]) -> bool:
    """Whether ``fetch_from_hub`` would find everything on this machine."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return all(_snapshot(repo, part, local=True) for part in parts)
    except LocalEntryNotFoundError:
        return False


def _snapshot(repo: str, part: str, *, local: bool) -> Path | None:
    """The folder with the preferred files of ``part``; None if there are none of them."""
    from huggingface_hub import snapshot_download

    for names in HUB_PARTS[part]:
        patterns = ["config.json", *names]
        folder = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=local))
        if any(next(folder.glob(name), None) for name in names):
            return folder
    return None


@dataclass(frozen=True)
class _Content:
    size: int
    sha256: str
    git_blob: str

    @staticmethod
    def of(path: Path) -> "_Content":
        size = path.stat().st_size
        sha256 = hashlib.sha256()
        blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                sha256.update(block)
                blob.update(block)
        return _Content(size, sha256.hexdigest(), blob.hexdigest())


@dataclass(frozen=True)
class _Wanted:
    """What is known of a file; of its SHA-256 perhaps only the first digits."""

    size: int | None
    sha256: str | None
    git_blob: str | None

    def problem(self, content: _Content) -> str:
        """In which way ``content`` is another file; empty if it is the one wanted."""
        if self.size not in (None, content.size):
            return f"has {content.size} bytes, not {self.size}"
        if self.sha256 and not content.sha256.startswith(self.sha256):
            return f"has the SHA-256 {content.sha256}, not {self.sha256}"
        if self.git_blob not in (None, content.git_blob):
            return f"has the git blob id {content.git_blob}, not {self.git_blob}"
        return ""


def _download(url: str, target: Path, wanted: _Wanted) -> tuple[_Content | None, bool]:
    """Puts ``url`` at ``target``: what came, and whether the server announced its SHA-256.

    None if another process has put it there meanwhile.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part) as file:
            if target.is_file():
                return None, False
            announced = _transfer(url, file, target.name, wanted)
            content = _Content.of(part)
            promised = _Wanted(None, announced, None)
            problem = wanted.problem(content) or promised.problem(content)
            if problem:
                file.truncate(0)
                raise OSError(f"what came {problem}; nothing of it was kept")
            os.replace(part, target)
            return content, announced is not None
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(
            f"{target.name} could not be fetched from {url} to {target}: {_reason(error)}"
        ) from error


def _transfer(url: str, file: IO[bytes], name: str, wanted: _Wanted) -> str | None:
    """Completes ``file`` from ``url``; returns the SHA-256 that the server announced, if any."""
    start = file.seek(0, os.SEEK_END)
    answer = _ask_to_resume(url, start, checkable=bool(wanted.sha256 or wanted.git_blob))
    with answer.stream as stream:
        if wanted.size not in (None, answer.total) and answer.total is not None:
            raise OSError(f"the server has {answer.total} bytes, not {wanted.size}")
        file.truncate(answer.start)
        with tqdm(
            desc=name,
            total=answer.total,
            initial=answer.start,
            unit="B",
            unit_scale=True,
            disable=None,
        ) as bar:
            while block := stream.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    file.flush()
    os.fsync(file.fileno())
    size = os.fstat(file.fileno()).st_size
    if answer.total is not None and size < answer.total:
        raise OSError(
            f"the connection ended after {size} of {answer.total} bytes; run the same command again"
        )
    return answer.sha256


def _recorded(target: Path) -> str | None:
    """The SHA-256 recorded for ``target``, if any."""
    entry = _records(target.parent).get(target.name)
    return entry["sha256"] if entry else None


def _record(target: Path, url: str, content: _Content) -> None:
    path = target.parent / CHECKSUMS
    with _locked(path):
        entry = {"sha256": content.sha256, "size": content.size, "url": url}
        records = _records(target.parent) | {target.name: entry}
        new = path.with_name(f"{CHECKSUMS}.new")
        new.write_text(json.dumps(records, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(new, path)


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text) if text else {}
    except ValueError as error:
        raise DownloadError(f"{path} is no JSON: repair or delete it ({error})") from error


def _mirrored(url: str) -> str:
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint and url.startswith(f"{HUB}/"):
        return endpoint.rstrip("/") + url.removeprefix(HUB)
    return url


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        return str(error.reason)
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """``path``, made if need be and opened to read and append, for one process at a time.

    What is still empty at the end is removed.
    """
    while True:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_open(path, file):  # the last holder renamed or removed it
                continue
            try:
                yield file
            finally:
                if os.fstat(file.fileno()).st_size == 0 and _is_open(path, file):
                    path.unlink()
            return


def _is_open(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@dataclass
class _Answer:
    """A response that starts at byte ``start`` of a file of ``total`` bytes.

    -1 and None: it does not say.
    """

    stream: http.client.HTTPResponse
    start: int
    total: int | None
    sha256: str | None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the SHA-256 that the hub announces where it redirects to its storage."""

    sha256: str | None = None

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        self.sha256 = self.sha256 or _announced_sha256(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _announced_sha256(headers: Message) -> str | None:
    match = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-Etag", ""))
    return match[1] if match else None


def _ask(url: str, start: int) -> _Answer:
    """The answer to a request for ``url`` from byte ``start`` on; the server may not heed that."""
    request = urllib.request.Request(url, headers={"User-Agent": "diffusion-nft"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    redirects = _Redirects()
    stream = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT_S)
    if stream.headers.get_content_type() == "text/html":
        stream.close()
        raise OSError("the answer is a web page, not the file")
    sha256 = redirects.sha256 or _announced_sha256(stream.headers)
    if stream.status == http.HTTPStatus.PARTIAL_CONTENT:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", stream.headers.get("Content-Range", ""))
        start, total = (int(span[1]), int(span[2])) if span else (-1, None)
        return _Answer(stream, start, total, sha256)
    length = stream.headers.get("Content-Length")
    return _Answer(stream, 0, int(length) if length else None, sha256)


def _ask_to_resume(url: str, start: int, checkable: bool) -> _Answer:
    """An answer that starts at ``start`` or at 0.

    At 0 as well where no hash would tell that the two halves are of different files.
    """
    try:
        answer = _ask(url, start)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
    else:
        if answer.start == 0 or (answer.start == start and (checkable or answer.sha256)):
            return answer
        answer.stream.close()
    return _ask(url, 0)
