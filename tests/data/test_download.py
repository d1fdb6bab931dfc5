"""Downloads against servers on the loopback interface."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_nft.data.download import DownloadError, fetch
from tests.local_server import Page, hub_pages, serving

CONTENT = bytes(range(256)) * 4000
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
PATH = "/weights/model.pth"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with serving() as server:
        server.pages[PATH] = Page(CONTENT)
        yield server


def gone() -> str:
    """The address of a server that has stopped."""
    with serving() as server:
        return server.url


@pytest.fixture
def target(tmp_path):
    return tmp_path / "ckpts" / "model.pth"


@pytest.mark.parametrize("digits", [len(SHA256), 15])
def test_a_file_is_fetched_once_and_checked_every_time(server, target, digits):
    said = fetch(server.url + PATH, target, SHA256[:digits])
    assert said == f"{target} downloaded, 1,024,000 bytes (as published)"
    assert target.read_bytes() == CONTENT and os.listdir(target.parent) == ["model.pth"]
    assert fetch(server.url + PATH, target, SHA256[:digits]) == said.replace(
        "downloaded", "already there"
    )
    assert len(server.requests) == 1
    target.write_bytes(b"other")
    with pytest.raises(DownloadError, match=r"model\.pth, from http.*SHA-256 .*, not .*: delete"):
        fetch(server.url + PATH, target, SHA256[:digits])


def test_git_blob_ids(server, target):
    # `echo hello | git hash-object --stdin`
    blob = "ce013625030ba8dba906f756967f9e9ca394464a"
    server.pages["/prompts.txt"] = Page(b"hello\n", content_type="text/plain")
    fetch(f"{server.url}/prompts.txt", target, f"git:{blob}")
    assert target.read_text() == "hello\n"
    target.write_bytes(b"hello")
    with pytest.raises(DownloadError, match=f"git blob id .*, not {blob}"):
        fetch(f"{server.url}/prompts.txt", target, f"git:{blob}")


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (Page(CONTENT, cut=300_000), "SHA-256"),
        (Page(b"<html>log in</html>", content_type="text/html"), "SHA-256"),
        (Page(status=404), "404"),
        (None, "refused"),
    ],
    ids=["cut off", "web page", "absent", "no server"],
)
def test_a_failure_is_one_line_with_file_address_and_target(server, target, page, why):
    url = server.url + PATH
    if page:
        server.pages[PATH] = page
    else:
        url = gone() + PATH
    with pytest.raises(DownloadError, match=why) as caught:
        fetch(url, target, SHA256)
    message = str(caught.value)
    assert message.startswith(f"model.pth could not be fetched from {url} to {target}: ")
    assert len(message.splitlines()) == 1
    assert os.listdir(target.parent) == []


def test_the_proxy_of_the_environment_is_used(server, target, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    # urlopen keeps the proxies that it saw first.
    monkeypatch.setattr("urllib.request._opener", None)
    server.pages["http://weights.invalid/model.pth"] = Page(CONTENT)
    fetch("http://weights.invalid/model.pth", target, SHA256)
    assert target.read_bytes() == CONTENT


HUB_CALLS = """
import json, sys
from pathlib import Path
from diffusion_nft.data.download import DownloadError, fetch_from_hub, in_hub_cache
results = []
for repo, files, target in json.loads(sys.argv[1]):
    try:
        before = in_hub_cache(repo, files)
        folder = fetch_from_hub(repo, files, target and Path(target))
        results.append([before, in_hub_cache(repo, files), str(folder)])
    except DownloadError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def hub(url, home, *calls):
    """Results of the calls in a new process, as the hub's settings are read at import."""
    env = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", HUB_CALLS, json.dumps(calls)]
    env = os.environ | env | {"NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def names(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir() if path.name != ".cache"}


def test_the_hub_serves_what_is_read_and_no_more(server, tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"too"}
    files |= {"tokenizer.json": b"{}", "onnx/model.safetensors": b"", "README.md": b"hub's"}
    server.pages |= hub_pages("me/repo", files)
    ckpts = tmp_path / "ckpts"
    ckpts.mkdir()
    (ckpts / "README.md").write_text("ours")
    calls = [
        ("me/repo", ["config.json", "model.safetensors"], None),
        ("me/repo", ["config.json", "*token*", "vocab*"], None),
        ("me/repo", ["model.safetensors"], str(ckpts)),
        ("me/repo", ["config.json", "preprocessor_config.json"], None),
    ]
    weights, tokenizer, in_folder, none = hub(server.url, tmp_path, *calls)
    assert weights[:2] == tokenizer[:2] == [False, True]
    assert names(weights[2]) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert in_folder[2] == str(ckpts) and names(ckpts) == {"README.md", "model.safetensors"}
    assert none == f"{server.url}/me/repo does not have preprocessor_config.json"

    server.requests.clear()
    assert hub(server.url, tmp_path, calls[0]) == [[True, True, weights[2]]]
    assert not any("resolve" in path for _, path in server.requests)

    path = (Path(weights[2]) / "model.safetensors").resolve()
    path.write_bytes(b"damaged")
    (damaged,) = hub(server.url, tmp_path, calls[0])
    assert damaged.startswith(f"{path} has the ") and damaged.endswith(
        "delete it to fetch it again"
    )


def test_what_the_hub_does_not_serve_comes_with_the_remedy(server, tmp_path):
    for name, status, code in (("gated", 403, "GatedRepo"), ("absent", 401, "RepoNotFound")):
        page = Page(status=status, headers={"X-Error-Code": code})
        server.pages[f"/api/models/me/{name}/revision/main"] = page
    server.pages["/api/models/me/broken/revision/main"] = Page(status=500)
    repos = ("me/gated", "me/absent", "me/broken")
    gated, absent, broken = hub(server.url, tmp_path, *[(repo, ["a"], None) for repo in repos])
    for repo, message in (("me/gated", gated), ("me/absent", absent)):
        assert message.startswith(f"{server.url}/{repo} does not exist, is private or is gated: ")
    assert "500" in broken
    address = gone()
    (refused,) = hub(address, tmp_path, ("me/broken", ["a"], None))
    assert "refused" in refused
    for url, message in ((server.url, broken), (address, refused)):
        page = f"{url}/me/broken"
        assert message.startswith(f"me/broken could not be fetched from {page} to {tmp_path}/hub: ")
        assert len(message.splitlines()) == 1
