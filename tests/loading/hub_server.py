"""A small model hub on loopback: lists repositories, redirects large files to another host, sends parts of them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
LARGE = 4096  # bytes from which on a file is behind a redirect and named by its SHA-256


@dataclass
class Repository:
    """Files by revision, and who may see them."""

    files: dict[str, bytes]
    other_files: dict[str, bytes] = field(default_factory=dict)  # of the branch "next"
    access: str = "public"  # or gated, private
    token: str = "good-token"

    def at(self, revision: str) -> dict[str, bytes] | None:
        revisions = {"main": self.files, COMMIT: self.files, "next": self.other_files, OTHER_COMMIT: self.other_files}
        return revisions.get(revision)


@dataclass
class Hub:
    """The server's state, which tests change, and what it has been asked."""

    port: int = 0
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers
    breaks: list[int] = field(default_factory=list)  # bytes after which a transfer breaks off, one entry a transfer
    sends_parts: bool = True
    damages: bool = False  # sends other bytes than it says
    refuses_bytes: int = 0  # a status for large files

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fetched(self) -> set[str]:
        """Files of which bytes were asked for."""
        found = (re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", path) for m, path, _ in self.requests if m == "GET")
        return {match[1] for match in found if match}

    def parts(self) -> list[str]:
        """Byte ranges that were asked of the store of large files, in order; "" stands for a whole file."""
        return [headers.get("range", "") for m, path, headers in self.requests if path.startswith("/store/")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""

    def _serve(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        if listing := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self._list(*listing.groups())
        elif resolve := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*resolve.groups())
        elif store := re.fullmatch(r"/store/([0-9a-f]{64})", path):
            self._store(store[1])
        else:
            self._answer(404)

    def _list(self, name: str, revision: str) -> None:
        files = self._files(name, revision)
        if files is None:
            return
        siblings = []
        for file, content in files.items():
            entry: dict[str, Any] = {"rfilename": file, "size": len(content), "blobId": _blob_id(content)}
            if len(content) >= LARGE:
                entry["lfs"] = {"size": len(content), "sha256": _sha256(content), "pointerSize": 130}
            siblings.append(entry)
        commit = OTHER_COMMIT if revision in ("next", OTHER_COMMIT) else COMMIT
        body = {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings}
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        files = self._files(name, revision)
        if files is None:
            return
        if file not in files:
            self._answer(404, headers={"X-Error-Code": "EntryNotFound"})
            return
        content = files[file]
        commit = {"X-Repo-Commit": OTHER_COMMIT if revision in ("next", OTHER_COMMIT) else COMMIT}
        if len(content) < LARGE:
            self._answer(200, content, {**commit, "ETag": f'"{_blob_id(content)}"'})
            return
        digest = _sha256(content)
        headers = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)), **commit}
        # Another host, as far as a client can see.
        self._answer(302, headers={**headers, "Location": f"http://localhost:{self.hub.port}/store/{digest}"})

    def _store(self, digest: str) -> None:
        every = (r.files | r.other_files for r in self.hub.repositories.values())
        content = next(c for files in every for c in files.values() if _sha256(c) == digest)
        if self.hub.refuses_bytes:
            self._answer(self.hub.refuses_bytes)
            return
        if self.hub.damages:
            content = bytes(len(content))
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and self.hub.sends_parts else 0
        rest = content[start:]
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        if self.hub.breaks and self.command == "GET":
            self._break_off(206 if start else 200, rest, headers, self.hub.breaks.pop(0))
        else:
            self._answer(206 if start else 200, rest, headers)

    def _break_off(self, status: int, body: bytes, headers: dict[str, str], after: int) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:after])
        self.close_connection = True

    def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
        """A repository's files, or an answer that refuses them."""
        repository = self.hub.repositories.get(name)
        allowed = repository and self.headers.get("Authorization") == f"Bearer {repository.token}"
        if repository is None or (repository.access == "private" and not allowed):
            self._answer(401 if "Authorization" not in self.headers else 404, headers={"X-Error-Code": "RepoNotFound"})
        elif repository.access == "gated" and not allowed:
            self._answer(403 if "Authorization" in self.headers else 401, headers={"X-Error-Code": "GatedRepo"})
        elif (files := repository.at(revision)) is None:
            self._answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        else:
            return files
        return None

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
