"""A small model hub on this machine, which speaks the file protocol of the Hugging Face Hub.

Small files are in the repository, and their entity tag is git's SHA-1; weights are elsewhere, as on the hub: a redirect
leads to another host, and their tag is their SHA-256. Faults can be set: broken connections, other bytes, gates.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api

WEIGHTS = (".safetensors", ".bin", ".pt")
TOKEN = "hf_of_somebody_with_access"


@dataclass
class Repository:
    """The files of a repository by path; `tag` is a further name of its only commit."""

    files: dict[str, bytes]
    gated: bool = False
    tag: str | None = None

    @classmethod
    def of(cls, folder: Path, *, gated: bool = False) -> "Repository":
        """The files of a folder."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return cls({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}, gated)

    @property
    def commit(self) -> str:
        """A commit hash that changes with the files."""
        return hashlib.sha1(
            repr(sorted((name, tag(name, data)) for name, data in self.files.items())).encode()
        ).hexdigest()


@dataclass
class Served:
    """An answer with content: the file, the status, and the bytes that were sent."""

    path: str
    status: int
    bytes: int


@dataclass
class LocalHub:
    """The repositories by name ("datasets/owner/name" for data), the faults of their files, and what was asked.

    Attributes:
        breaks: By file, after how many bytes the next answers end, one after the other.
        changed: Files that arrive with other bytes of the same number.
        served: All contents that were sent.
        requests: Method, path and whether there was a token, of all requests.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    breaks: dict[str, list[int]] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    served: list[Served] = field(default_factory=list)
    requests: list[tuple[str, str, bool]] = field(default_factory=list)
    port: int = 0

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        """Where weights are: another host than the hub's."""
        return f"http://localhost:{self.port}/storage"

    def bytes_of(self, name: str) -> int:
        """Bytes that were sent of the files that end so."""
        return sum(one.bytes for one in self.served if one.path.endswith(name))


@lru_cache(maxsize=64)  # every answer asks for the commit, and so for the tags of all files
def tag(name: str, data: bytes) -> str:
    """The entity tag of a file."""
    if name.endswith(WEIGHTS):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        """Facts of a file."""
        self._answer()

    def do_GET(self) -> None:
        """A file, or facts of a repository."""
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.hub.requests.append((self.command, path, allowed))
        if path.startswith("storage/"):
            owner, name, file = path.removeprefix("storage/").split("/", 2)
            return self._content(f"{owner}/{name}", file, {})
        if not path:
            return self._send(200, b"a hub")
        api, named = path.startswith("api/"), path.removeprefix("api/").removeprefix("models/")
        parts, of_name = named.split("/"), 3 if named.startswith("datasets/") else 2
        repository, rest = "/".join(parts[:of_name]), parts[of_name:]
        found = self.hub.repositories.get(repository)
        if found is None:
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", found.commit, found.tag):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api:
            return self._facts(repository, found, rest)
        if found.gated and not allowed:
            return self._refuse(
                401, "GatedRepo", f"Access to model {repository} is restricted. You must have access to it and be "
                "authenticated to access it. Please log in.",
            )  # fmt: skip
        file = "/".join(rest[2:])
        headers = {"X-Repo-Commit": found.commit}
        if file not in found.files:
            return self._refuse(404, "EntryNotFound", "Entry not found", headers)
        if not file.endswith(WEIGHTS):
            return self._content(repository, file, headers)
        data = found.files[file]
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{tag(file, data)}"'}
        return self._send(302, b"", headers | {"Location": f"{self.hub.storage}/{repository}/{file}"})

    def _facts(self, repository: str, found: Repository, rest: list[str]) -> None:
        if rest[:1] == ["tree"]:
            listed = []
            for name, data in found.files.items():
                entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": tag("", data)}
                if name.endswith(WEIGHTS):
                    entry["lfs"] = {"oid": tag(name, data), "size": len(data), "pointerSize": 134}
                listed.append(entry)
            return self._send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
        facts = {
            "_id": "1", "id": repository, "modelId": repository, "sha": found.commit, "private": False,
            "gated": "manual" if found.gated else False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "siblings": [{"rfilename": name} for name in found.files], "createdAt": "2026-01-01T00:00:00.000Z",
            "lastModified": "2026-01-01T00:00:00.000Z", "library_name": "diffusers",
        }  # fmt: skip
        return self._send(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def _content(self, repository: str, file: str, headers: Mapping[str, str]) -> None:
        whole = self.hub.repositories[repository].files[file]
        etag = f'"{tag(file, whole)}"'
        if file in self.hub.changed:
            whole = whole[:-1] + bytes([whole[-1] ^ 1])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers = {**headers, "ETag": etag, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        breaks = self.hub.breaks.get(file, [])
        stop = breaks.pop(0) if breaks and self.command == "GET" else None
        self._send(206 if start else 200, whole[start:], headers, f"{repository}/{file}", stop)

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, b"", {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message})

    def _send(
        self,
        status: int,
        data: bytes,
        headers: Mapping[str, str] | None = None,
        path: str = "",
        stop: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "GET":
            return
        self.wfile.write(data[:stop])
        if path:
            self.hub.served.append(Served(path, status, len(data[:stop])))
        if stop is not None:
            self.wfile.flush()
            self.close_connection = True


@contextmanager
def serving(hub: LocalHub) -> Iterator[LocalHub]:
    """The hub answers inside this block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def connect(hub: LocalHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client asks this hub from now on, as with HF_ENDPOINT, and keeps its files in another cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**12)  # so that small files arrive in several parts
