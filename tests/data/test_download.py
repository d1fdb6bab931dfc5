"""Downloads against servers on the loopback interface."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from diffusion_nft.data.download import DownloadError, fetch
from tests.local_server import Page, hub_pages, serving

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATH = "/weights/model.pth"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with serving() as server:
        server.pages[PATH] = Page(CONTENT)
        yield server


@pytest.fixture
def target(tmp_path):
    return tmp_path / "ckpts" / "model.pth"


def names(target) -> set[str]:
    return {path.name for path in target.parent.iterdir()}


def test_a_whole_file(server, target):
    fetched = fetch(server.url + PATH, target, size=len(CONTENT), sha256=SHA256)
    assert target.read_bytes() == CONTENT
    assert names(target) == {"model.pth"}
    assert (fetched.downloaded, fetched.size, fetched.sha256) == (True, len(CONTENT), SHA256)
    assert "downloaded, 1,024,000 bytes" in str(fetched) and "as published" in str(fetched)


def test_what_is_there_is_checked_but_not_fetched(server, target):
    fetch(server.url + PATH, target, sha256=SHA256[:8])
    again = fetch(server.url + PATH, target, sha256=SHA256[:8])
    assert not again.downloaded and "already there" in str(again)
    assert len(server.requests) == 1
    target.write_bytes(b"other")
    with pytest.raises(DownloadError, match=rf"model\.pth.*SHA-256 .*, not {SHA256[:8]}: delete"):
        fetch(server.url + PATH, target, sha256=SHA256[:8])
    with pytest.raises(DownloadError, match="has 5 bytes, not 6"):
        fetch(server.url + PATH, target, size=6)


def test_git_blob_ids(server, target):
    # `echo hello | git hash-object --stdin`
    blob = "ce013625030ba8dba906f756967f9e9ca394464a"
    server.pages["/prompts.txt"] = Page(b"hello\n", content_type="text/plain")
    fetch(f"{server.url}/prompts.txt", target, git_blob=blob)
    assert target.read_text() == "hello\n"
    assert names(target) == {"model.pth"}
    target.write_bytes(b"hello")
    with pytest.raises(DownloadError, match=f"git blob id .*, not {blob}"):
        fetch(f"{server.url}/prompts.txt", target, git_blob=blob)


def cut_off(server, target, after: int, **checks) -> None:
    """A download whose connection breaks after ``after`` bytes; the server is well again then."""
    server.pages[PATH].cut = after
    with pytest.raises(DownloadError, match=f"ended after {after} of {len(CONTENT)} bytes"):
        fetch(server.url + PATH, target, **checks)
    server.pages[PATH].cut = None
    assert names(target) == {"model.pth.part"}
    assert target.with_name("model.pth.part").stat().st_size == after


def test_a_download_goes_on_where_it_was_cut_off(server, target):
    cut_off(server, target, 300_000, sha256=SHA256)
    fetch(server.url + PATH, target, sha256=SHA256)
    assert [span for _, _, span in server.requests] == [None, "bytes=300000-"]
    assert target.read_bytes() == CONTENT
    assert names(target) == {"model.pth"}


@pytest.mark.parametrize("lacking", ["ranges", "says_range"])
def test_a_server_that_cannot_go_on_starts_anew(server, target, lacking):
    cut_off(server, target, 300_000, sha256=SHA256)
    setattr(server.pages[PATH], lacking, False)
    fetch(server.url + PATH, target, sha256=SHA256)
    assert target.read_bytes() == CONTENT


def test_halves_of_two_files_are_not_joined_where_no_hash_would_tell(server, target):
    cut_off(server, target, 300_000)
    server.pages[PATH].content = other = CONTENT[::-1]
    fetch(server.url + PATH, target)
    assert target.read_bytes() == other


def test_a_part_that_is_too_long_is_started_anew(server, target):
    target.parent.mkdir()
    target.with_name("model.pth.part").write_bytes(CONTENT + b"more")
    fetch(server.url + PATH, target, sha256=SHA256)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("started", [b"", b"wrong beginning"])
def test_a_file_with_another_hash_is_not_put_in_place(server, target, started):
    target.parent.mkdir()
    target.with_name("model.pth.part").write_bytes(started)
    server.pages[PATH].content = b"another file, or a damaged one"
    with pytest.raises(DownloadError) as caught:
        fetch(server.url + PATH, target, sha256=SHA256)
    for part in (server.url + PATH, str(target), "has the SHA-256", SHA256, "nothing of it"):
        assert part in str(caught.value)
    assert names(target) == set()


@pytest.mark.parametrize(("says_length", "why"), [(True, "the server has"), (False, "what came")])
def test_a_file_of_another_size_is_not_put_in_place(server, target, says_length, why):
    server.pages[PATH] = Page(b"short", says_length=says_length)
    with pytest.raises(DownloadError, match=f"{why} .*5 bytes, not {len(CONTENT)}"):
        fetch(server.url + PATH, target, size=len(CONTENT))
    assert names(target) == set()


def test_the_first_hash_is_recorded_and_checked_ever_after(server, target):
    url = server.url + PATH
    first = fetch(url, target)
    assert "no hash is published; recorded in checksums.json and checked from now on" in str(first)
    records = json.loads((target.parent / "checksums.json").read_text())
    assert records == {"model.pth": {"sha256": SHA256, "size": len(CONTENT), "url": url}}
    assert names(target) == {"model.pth", "checksums.json"}

    assert "as recorded in checksums.json" in str(fetch(url, target))

    target.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(DownloadError, match=rf"{target}.*not {SHA256}.*entry in checksums\.json"):
        fetch(url, target)

    target.unlink()
    server.pages[PATH].content = b"a new version"
    with pytest.raises(DownloadError, match=f"not {SHA256}"):
        fetch(url, target)
    assert not target.exists()

    (target.parent / "checksums.json").unlink()
    assert fetch(url, target).downloaded


def test_a_file_put_there_by_hand_is_recorded(server, target):
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    assert "recorded in checksums.json and checked" in str(fetch(server.url + PATH, target))
    assert server.requests == []
    assert "as recorded" in str(fetch(server.url + PATH, target))


def test_broken_records_are_an_error(server, target):
    target.parent.mkdir()
    (target.parent / "checksums.json").write_text('{"model.pth"')
    with pytest.raises(DownloadError, match=r"checksums\.json is no JSON"):
        fetch(server.url + PATH, target)


def on_the_hub(server, sha256: str = SHA256) -> str:
    """The address of a page that redirects to PATH, as the hub does for large files."""
    headers = {"Location": server.url + PATH, "X-Linked-Etag": f'"{sha256}"'}
    server.pages["/me/repo/resolve/main/model.pth"] = Page(status=302, headers=headers)
    return f"{server.url}/me/repo/resolve/main/model.pth"


def test_the_hash_that_the_hub_announces_is_checked(server, target):
    url = on_the_hub(server)
    assert "as the server announced; recorded in checksums.json" in str(fetch(url, target))
    assert "as recorded in checksums.json" in str(fetch(url, target))
    target.unlink()
    (target.parent / "checksums.json").unlink()
    with pytest.raises(DownloadError, match=f"SHA-256 {SHA256}, not {'0' * 64}"):
        fetch(on_the_hub(server, "0" * 64), target)
    assert names(target) == set()


def test_the_hash_that_the_hub_announces_allows_to_go_on(server, target):
    url = on_the_hub(server)
    server.pages[PATH].cut = 300_000
    with pytest.raises(DownloadError, match="ended after"):
        fetch(url, target)
    server.pages[PATH].cut = None
    fetch(url, target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1] == ("GET", PATH, "bytes=300000-")


def test_what_cannot_be_had_is_one_line_with_file_address_and_target(server, target):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}{PATH}"
        server.pages["/login"] = Page(b"<html>log in</html>", content_type="text/html")
        for url, why in (
            (closed, "refused"),
            (f"{server.url}/absent", "404"),
            (f"{server.url}/login", "a web page, not the file"),
        ):
            with pytest.raises(DownloadError, match=why) as caught:
                fetch(url, target)
            message = str(caught.value)
            assert message.startswith(f"model.pth could not be fetched from {url} to {target}: ")
            assert len(message.splitlines()) == 1
            assert names(target) == set()


def test_hf_endpoint_stands_in_for_the_hub_only(server, target, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/mirror/")
    server.pages["/mirror/me/repo/model.pth"] = Page(b"from the mirror")
    fetch("https://huggingface.co/me/repo/model.pth", target)
    assert target.read_bytes() == b"from the mirror"
    fetch(server.url + PATH, target.with_name("other.pth"), sha256=SHA256)


def test_the_proxy_of_the_environment_is_used(server, target, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server.pages["http://weights.invalid/model.pth"] = Page(b"through the proxy")
    fetch("http://weights.invalid/model.pth", target)
    assert target.read_bytes() == b"through the proxy"


def in_threads(*calls) -> list[object]:
    """What each call returned or raised; file locks tell threads apart as they do processes."""
    results: list[object] = [None] * len(calls)

    def keep(index, call):
        try:
            results[index] = call()
        except DownloadError as error:
            results[index] = error

    threads = [threading.Thread(target=keep, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.mark.parametrize(
    ("first_page", "spans"),
    [
        (Page(CONTENT), [None]),
        (Page(CONTENT, cut=300_000), [None, "bytes=300000-"]),
        (Page(b"damaged"), [None, None]),
    ],
    ids=["well", "cut off", "damaged"],
)
def test_a_second_process_waits_for_the_first(server, target, first_page, spans):
    gate = threading.Event()
    server.pages[PATH] = replace(first_page, gate=gate)

    def call():
        return fetch(server.url + PATH, target, sha256=SHA256)

    def release():
        # Time for a second request, if nothing held it back.
        time.sleep(0.3)
        requests = len(server.requests)
        server.pages[PATH] = Page(CONTENT)
        gate.set()
        return requests

    *results, requests_at_once = in_threads(call, call, release)
    assert requests_at_once == 1
    assert [span for _, _, span in server.requests] == spans
    assert target.read_bytes() == CONTENT and names(target) == {"model.pth"}
    fetched = [result for result in results if not isinstance(result, DownloadError)]
    assert len(fetched) == (2 if len(spans) == 1 else 1)
    assert [result.downloaded for result in fetched].count(True) == 1


def test_records_of_files_fetched_at_once_are_all_kept(server, target):
    paths = [target.with_name(f"{i}.pth") for i in range(8)]
    in_threads(*(lambda path=path: fetch(server.url + PATH, path) for path in paths))
    records = json.loads((target.parent / "checksums.json").read_text())
    assert records.keys() == {path.name for path in paths}
    assert names(target) == {"checksums.json", *records}


HUB_CALLS = """
import json, sys
from diffusion_nft.data.download import DownloadError, fetch_from_hub, in_hub_cache
results = []
for repo, part in json.loads(sys.argv[1]):
    try:
        before = in_hub_cache(repo, [part])
        folder = fetch_from_hub(repo, [part])
        files = sorted(path.name for path in folder.iterdir())
        results.append([before, in_hub_cache(repo, [part]), files])
    except DownloadError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def hub(url, home, *calls):
    """What ``fetch_from_hub`` does in a process of its own: the hub's settings are import-time."""
    env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", HUB_CALLS, json.dumps(calls)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_hub_serves_what_is_read_and_no_more(server, tmp_path):
    both = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"the same"}
    rest = {"onnx/model.safetensors": b"", "tokenizer.json": b"{}", "README.md": b"", "tf.h5": b""}
    shards = {"pytorch_model.bin.index.json": b"{}", "pytorch_model-00001-of-00001.bin": b"weights"}
    server.pages |= hub_pages("me/both", both | rest) | hub_pages("me/old", {**shards, **rest})
    calls = [("me/both", "model"), ("me/both", "tokenizer"), ("me/old", "model")]
    first, tokenizer, old, none = hub(server.url, tmp_path, *calls, ("me/old", "images"))
    assert first == [False, True, ["config.json", "model.safetensors"]]
    assert tokenizer == [False, True, ["config.json", "model.safetensors", "tokenizer.json"]]
    assert old == [False, True, sorted(shards)]
    assert none == f"{server.url}/me/old has no images files, like preprocessor_config.json"

    asked = len(server.requests)
    server.pages.clear()
    assert hub(server.url, tmp_path, *calls[:1]) == [[True, True, tokenizer[2]]]
    assert not any("resolve" in path for _, path, _ in server.requests[asked:])


def test_what_the_hub_does_not_serve_comes_with_the_remedy(server, tmp_path):
    for name, status, code in (("gated", 403, "GatedRepo"), ("absent", 401, "RepoNotFound")):
        page = Page(status=status, headers={"X-Error-Code": code})
        server.pages[f"/api/models/me/{name}/revision/main"] = page
    calls = [("me/gated", "model"), ("me/absent", "model"), ("me/broken", "model")]
    server.pages["/api/models/me/broken/revision/main"] = Page(status=500)
    gated, absent, broken = hub(server.url, tmp_path, *calls)
    assert gated == (
        f"me/gated is gated: accept its licence at {server.url}/me/gated and run `hf auth login`"
    )
    assert absent.startswith(f"{server.url}/me/absent does not exist or is private")
    assert broken.startswith(
        f"me/broken could not be fetched from {server.url}/me/broken to {tmp_path}/hub: "
    )
    assert "500" in broken
    for message in (gated, absent, broken):
        assert len(message.splitlines()) == 1


def test_an_unreachable_hub_is_one_line(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        (message,) = hub(url, tmp_path, ("me/repo", "model"))
    assert message.startswith(f"me/repo could not be fetched from {url}/me/repo to {tmp_path}/hub")
    assert "refused" in message and len(message.splitlines()) == 1
