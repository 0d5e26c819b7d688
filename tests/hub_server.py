"""A Hub on localhost: the endpoints that huggingface_hub's client uses to list and fetch models.

    with HubServer() as hub:
        commit = hub.add_model("org/model", folder)
        subprocess.run([...], env=hub.environment(home))      # HF_ENDPOINT, HF_HOME, ...
        assert hub.weight_bytes_sent() == 0

Speaks model info, tree, and resolve (HEAD, GET, Range), sends weights through a redirect as the
real Hub does, answers for gated, private and missing repositories with its status and error codes,
and keeps a record of every request.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

TOKEN = "hf_readsEverything"
TOKEN_WITHOUT_ACCESS = "hf_readsOnlyPublic"
LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf", ".model")
MAX_HASHED_BYTES = 1 << 20
CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class HubFile:
    """A file's bytes, mapped from disk, and its names as a git blob and as a large file."""

    name: str
    data: bytes | mmap.mmap
    git_hash: str
    sha256: str

    @classmethod
    def read(cls, name: str, path: Path) -> HubFile:
        """Hashes no more than the beginning of a large file, which may be sparse."""
        data: bytes | mmap.mmap = b""
        if path.stat().st_size:
            with path.open("rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = b"%d\0" % len(data) + data[:MAX_HASHED_BYTES]
        git_hash = hashlib.sha1(b"blob " + start).hexdigest()
        return cls(name, data, git_hash, hashlib.sha256(start).hexdigest())

    @property
    def is_large(self) -> bool:
        return self.name.endswith(LARGE_SUFFIXES)

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.git_hash

    def describe(self) -> dict[str, Any]:
        """The file as both the model info ("rfilename") and the tree list it."""
        entry: dict[str, Any] = {
            "rfilename": self.name,
            "size": len(self.data),
            "blobId": self.git_hash,
            "oid": self.git_hash,
        }
        if self.is_large:
            large = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.data)}
            entry["lfs"] = {**large, "pointerSize": 134}
        return entry


@dataclass
class HubModel:
    """One repository; `revisions` maps branches and tags to commits, `commits` to files."""

    repo_id: str
    gated: bool = False
    private: bool = False
    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        commit = self.revisions.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Request:
    """What was asked and how many bytes of body were sent so far."""

    method: str
    path: str
    range: str | None
    status: int
    sent_bytes: int
    authorized: bool


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that come at once


class HubServer:
    """Serves models on a free port of localhost while the context lasts.

    Args:
        latency_s: how long every request waits for its answer.
    """

    def __init__(self, latency_s: float = 0) -> None:
        self.latency_s = latency_s
        self.models: dict[str, HubModel] = {}
        self.blobs: dict[str, HubFile] = {}
        self.requests: list[Request] = []
        self.ignore_ranges = False
        self.is_cut_off = False
        self.is_login_page = False  # as the networks of hotels answer
        self.breaks_off = False  # the line breaks in the middle of each reply with weights
        self.has_short_ranges = False  # half of what was asked for arrives
        self.num_connections = 0
        self.failures: list[_Answer] = []  # to the next requests for weights
        self.expire_redirects_after: int | None = None  # this many uses
        # Weights come from another host, as they do from the Hub's content delivery network.
        hosts = ("127.0.0.1", "127.0.0.2")
        self._servers = [_Server((host, 0), _handler_of(self)) for host in hosts]
        self.url, self.cdn_url = (
            f"http://{host}:{server.server_address[1]}"
            for host, server in zip(hosts, self._servers, strict=True)
        )

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop_answering()

    def add_model(
        self,
        repo_id: str,
        folder: Path,
        *,
        revision: str = "main",
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Publish the folder's files as a commit on the branch `revision`; returns the commit."""
        files = {
            name: HubFile.read(name, path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            for name in [path.relative_to(folder).as_posix()]
        }
        self.blobs.update({file.sha256: file for file in files.values()})
        digest = hashlib.sha1(repo_id.encode())
        for file in files.values():
            digest.update(f"{file.name} {file.sha256}".encode())
        model = self.models.setdefault(repo_id, HubModel(repo_id))
        model.gated, model.private = gated, private
        model.commits[digest.hexdigest()] = files
        model.revisions[revision] = digest.hexdigest()
        return digest.hexdigest()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """The variables for a process that knows no Hub but this one, with an empty HF_HOME."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {**kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), **more}

    def sent_bytes(self, suffix: str) -> int:
        """Bytes of bodies sent for files whose names end with `suffix`."""
        return sum(request.sent_bytes for request in self.requests if request.path.endswith(suffix))

    def fail(self, times: int, status: int = 503, headers: Mapping[str, str] | None = None) -> None:
        """Answer the next requests for weights with an error."""
        self.failures += [_Answer(status, "", "try again later", headers or {})] * times

    def stop_answering(self) -> None:
        """Close the ports and open connections, as if the line were cut."""
        self.is_cut_off = True
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers.clear()


@pytest.fixture
def hub_server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


class _Answer(Exception):
    """Ends a request early with a status and the Hub's error code."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}


def _handler_of(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            hub.num_connections += 1

        def do_HEAD(self) -> None:
            self._handle()

        def do_GET(self) -> None:
            self._handle()

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _handle(self) -> None:
            if hub.is_cut_off:
                self.close_connection = True
                return
            if hub.is_login_page:
                self._send(200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
                return
            url = urlsplit(self.path)
            if hub.latency_s:
                time.sleep(hub.latency_s)
            try:
                if self._token() not in ("", TOKEN, TOKEN_WITHOUT_ACCESS):
                    raise _Answer(401, "", "Invalid credentials in Authorization header")
                if url.path.startswith("/api/models/"):
                    query = parse_qs(url.query)
                    self._api(url.path.removeprefix("/api/models/"), query)
                elif url.path.startswith("/cdn/"):
                    self._cdn(url.path)
                else:
                    self._resolve(url.path)
            except _Answer as answer:
                body = json.dumps({"error": answer.message}).encode()
                self._send(answer.status, body, answer.headers)

        # -- endpoints --------------------------------------------------------------------------

        def _api(self, path: str, query: Mapping[str, list[str]]) -> None:
            match = re.fullmatch(r"(.+?)(?:/(revision|tree)/([^/]+)(?:/.*)?)?", path)
            assert match is not None
            repo_id, endpoint, revision = match.groups()
            model, commit = self._find(repo_id, unquote(revision or "main"))
            files = [file.describe() for file in model.commits[commit].values()]
            if endpoint == "tree":
                self._send_json([{"type": "file", "path": f["rfilename"], **f} for f in files])
                return
            if "blobs" not in query:
                files = [{"rfilename": file["rfilename"]} for file in files]
            gated = "manual" if model.gated else False
            self._send_json(
                {
                    "_id": "0" * 24,
                    "id": repo_id,
                    "modelId": repo_id,
                    "sha": commit,
                    "private": model.private,
                    "gated": gated,
                    "disabled": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "library_name": "transformers",
                    "config": _summarize_config(model.commits[commit]),
                    "siblings": files,
                }
            )

        def _resolve(self, path: str) -> None:
            match = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
            if match is None:
                raise _Answer(404, "NotFound", "no such page")
            repo_id, revision, name = map(unquote, match.groups())
            model, commit = self._find(repo_id, revision)
            if model.gated and not self._may_read():
                message = f"Access to model {repo_id} is restricted"
                raise _Answer(403 if self._token() else 401, "GatedRepo", message)
            if name not in model.commits[commit]:
                raise _Answer(404, "EntryNotFound", "Entry not found")
            file = model.commits[commit][name]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"'}
            if file.is_large:
                headers |= {
                    "X-Linked-Etag": headers["ETag"],
                    "X-Linked-Size": str(len(file.data)),
                    "Location": f"{hub.cdn_url}/cdn/{file.sha256}/{quote(name)}",
                }
                self._send(302, b"", headers)
                return
            self._send_ranged(file.data, headers)

        def _cdn(self, path: str) -> None:
            if hub.failures:
                raise hub.failures.pop()
            uses = sum(request.path == unquote(path) for request in hub.requests)
            if uses == hub.expire_redirects_after:
                raise _Answer(403, "", "Request has expired")
            self._send_ranged(hub.blobs[path.split("/")[2]].data, {})

        # -- who asks ---------------------------------------------------------------------------

        def _token(self) -> str:
            return (self.headers.get("authorization") or "").removeprefix("Bearer ")

        def _may_read(self) -> bool:
            return self._token() == TOKEN

        def _find(self, repo_id: str, revision: str) -> tuple[HubModel, str]:
            model = hub.models.get(repo_id)
            if model is None or (model.private and not self._may_read()):
                # The Hub does not tell strangers whether a repository exists.
                if self._token():
                    raise _Answer(404, "RepoNotFound", "Repository not found")
                raise _Answer(401, "RepoNotFound", "Invalid username or password.")
            commit = model.resolve(revision)
            if commit is None:
                raise _Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return model, commit

        # -- sending ----------------------------------------------------------------------------

        def _send_json(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self._send(200, body, {"Content-Type": "application/json"})

        def _send_ranged(self, data: bytes | mmap.mmap, headers: dict[str, str]) -> None:
            headers |= {"Accept-Ranges": "bytes"}
            ranged = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if ranged is None or hub.ignore_ranges:
                self._send(200, data, headers)
                return
            begin, end = int(ranged[1]), min(int(ranged[2] or len(data)), len(data) - 1)
            if hub.has_short_ranges:
                end = (begin + end) // 2
            if begin >= len(data):
                self._send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
                return
            headers |= {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}
            self._send(206, data[begin : end + 1], headers)

        def _send(self, status: int, body: bytes | mmap.mmap, headers: Mapping[str, str]) -> None:
            path = unquote(urlsplit(self.path).path)
            authorized = bool(self._token())
            request = Request(self.command, path, self.headers.get("Range"), status, 0, authorized)
            hub.requests.append(request)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.breaks_off and path.startswith("/cdn/"):
                self.close_connection = True
                body = body[: len(body) // 2]
            try:
                for begin in range(0, len(body), CHUNK_BYTES):
                    chunk = body[begin : begin + CHUNK_BYTES]
                    request.sent_bytes += len(chunk)
                    self.wfile.write(chunk)
            except (BrokenPipeError, ConnectionResetError):  # the client read what it wanted
                self.close_connection = True

    return Handler


def _summarize_config(files: Mapping[str, HubFile]) -> dict[str, Any]:
    """What the model info repeats of config.json."""
    if "config.json" not in files:
        return {}
    config = json.loads(files["config.json"].data[:])
    return {key: config[key] for key in ("architectures", "model_type") if key in config}
