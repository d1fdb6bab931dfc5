"""An HTTP server on the loopback interface that stands in for the network."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Page:
    """What the server answers at one address."""

    content: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/octet-stream"
    # The connection breaks after so many bytes of the content.
    cut: int | None = None


class Server(ThreadingHTTPServer):
    """``pages`` by path; ``requests`` made so far: (method, path)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pages: dict[str, Page] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str]:
        return [path for method, path in self.requests if method == "GET"]


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        # A proxy is asked for whole addresses.
        path = self.path.partition("?")[0]
        self.server.requests.append((self.command, path))
        page = self.server.pages.get(path) or Page(b"nothing here", 404)
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.content)))
        for name, value in page.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page.content[: page.cut])

    do_HEAD = do_GET


def hub_pages(repo: str, files: dict[str, bytes]) -> dict[str, Page]:
    """The pages that huggingface_hub reads of a repository with ``files`` on its main branch."""
    commit = hashlib.sha1(repo.encode()).hexdigest()
    tree, pages = [], {}
    for name, content in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        tree.append({"type": "file", "path": name, "size": len(content), "oid": blob})
        headers = {"ETag": f'"{blob}"', "X-Repo-Commit": commit}
        for revision in (commit, "main"):
            pages[f"/{repo}/resolve/{revision}/{name}"] = Page(content, headers=headers)
    info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
    for path, content in (
        (f"/api/models/{repo}", info),
        (f"/api/models/{repo}/revision/main", info),
        (f"/api/models/{repo}/tree/{commit}", tree),
        (f"/api/models/{repo}/tree/main", tree),
    ):
        pages[path] = Page(json.dumps(content).encode(), content_type="application/json")
    return pages
