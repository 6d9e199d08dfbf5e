"""A hub on loopback that speaks the hub's protocol, with faults to switch on.

    with LoopbackHub({"org/tiny": {"tiny-Q4_0.gguf": data}}) as hub:
        hub.inject("rst", after=100_000, times=2)
        subprocess.run([...], env=hub.environment(tmp_path))

or by hand, to try the program against a folder of repositories:

    python -m tests.fakes.loopback_hub --serve DIR --port 8899     # DIR/<org>/<name>/<files>
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Content = bytes | Path
CANARY_TOKEN = "hf_canary0123456789canary0123456789"
LARGE_SUFFIXES = (".gguf", ".safetensors", ".bin")


@dataclass
class Fault:
    """Something that goes wrong: for `times` replies (None: for ever) whose URL contains `match`.

    drop, rst, stall: the body breaks off after `after` bytes (clean close, reset, open but silent).
    corrupt: the file's last byte is flipped. truncate: the body ends at `after`, and says so.
    ignore_range, wrong_content_range, no_size, no_etag: as named. xet: X-Xet-Hash is sent.
    status: answer with `status` and `headers` instead.
    """

    kind: str
    match: str = ""
    times: int | None = None
    after: int = 0
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = ""


@dataclass(frozen=True)
class Request:
    """One request as a server saw it. `origin` is `hub` or `cdn`."""

    origin: str
    method: str
    path: str
    range: str | None
    authorization: str | None


class Repo:
    """A repository: its files at each commit, and where `main` points."""

    def __init__(self, name: str, files: Mapping[str, Content]) -> None:
        self.name = name
        self.commits: dict[str, dict[str, Content]] = {}
        self.gated: str | bool = False
        self.private = False
        self.tags = ["gguf", "license:apache-2.0"]
        self.gguf = {"total": 135_000_000, "architecture": "llama", "context_length": 8192}
        self.extra_tree: list[dict[str, object]] = []
        self._hashes: dict[int, str] = {}
        self.main = ""
        self.move(files)

    def move(self, files: Mapping[str, Content]) -> str:
        """Make a new commit of these files and point `main` to it."""
        text = f"{self.name}{len(self.commits)}{sorted(files)}"
        self.main = hashlib.sha1(text.encode()).hexdigest()
        self.commits[self.main] = dict(files)
        return self.main

    def commit_of(self, revision: str) -> str | None:
        return self.main if revision == "main" else revision if revision in self.commits else None

    def sha256(self, content: Content) -> str:
        key = id(content)
        if key not in self._hashes:
            if isinstance(content, Path):
                with content.open("rb") as data:
                    self._hashes[key] = hashlib.file_digest(data, "sha256").hexdigest()
            else:
                self._hashes[key] = hashlib.sha256(content).hexdigest()
        return self._hashes[key]

    def etag(self, path: str, content: Content) -> str:
        if path.endswith(LARGE_SUFFIXES):
            return self.sha256(content)
        data = content.read_bytes() if isinstance(content, Path) else content
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def info(self, commit: str) -> dict[str, object]:
        files = self.commits[commit]
        return {
            "id": self.name,
            "modelId": self.name,
            "sha": commit,
            "siblings": [{"rfilename": path} for path in files],
            "tags": self.tags,
            "gated": self.gated,
            "private": self.private,
            "gguf": self.gguf,
            "downloads": 1234,
            "likes": 7,
            "lastModified": "2026-10-01T12:00:00.000Z",
            "cardData": {"license": "apache-2.0"},
        }

    def tree(self, commit: str) -> list[dict[str, object]]:
        entries: list[dict[str, object]] = []
        for path, content in self.commits[commit].items():
            size, etag = size_of(content), self.etag(path, content)
            entry: dict[str, object] = {"type": "file", "path": path, "size": size, "oid": etag}
            if path.endswith(LARGE_SUFFIXES):
                entry["oid"] = hashlib.sha1(etag.encode()).hexdigest()
                entry["lfs"] = {"oid": etag, "size": size, "pointerSize": 134}
            entries.append(entry)
        return entries + self.extra_tree


class LoopbackHub:
    """Two servers on 127.0.0.1: the hub, and the storage that it may redirect to (`use_cdn`)."""

    def __init__(self, repos: Mapping[str, Mapping[str, Content]], *, port: int = 0) -> None:
        self.repos = {name: Repo(name, files) for name, files in repos.items()}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.served: dict[str, int] = {}  # body bytes sent per file path
        self.chunk_bytes = 64 * 1024
        self.delay_s = 0.0  # before each chunk of a file
        self.use_cdn = False
        self.require_token = False
        self._lock = threading.Lock()
        self.released = threading.Event()  # set at the end: wakes stalled replies
        self._servers = [
            _Server(("127.0.0.1", port if origin == "hub" else 0), self, origin)
            for origin in ("hub", "cdn")
        ]
        self.url, self.cdn_url = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)

    def __enter__(self) -> LoopbackHub:
        for server in self._servers:
            threading.Thread(
                target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
            ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, folder: Path) -> dict[str, str]:
        """The environment of a client process: this hub, and every folder below `folder`."""
        kept = {k: os.environ[k] for k in ("PATH", "SYSTEMROOT", "LANG") if k in os.environ}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(folder / "hf"),
            "HF_TOKEN": CANARY_TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HOME": str(folder / "home"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "XDG_DATA_HOME": str(folder / "data"),
            "XDG_STATE_HOME": str(folder / "state"),
            "no_proxy": "127.0.0.1",
            "NO_COLOR": "1",
            "COLUMNS": "100",
            "LINES": "24",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        }

    def inject(self, kind: str, **settings: object) -> Fault:
        """Switch a fault on; see `Fault` for kinds and settings."""
        fault = Fault(kind, **settings)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def spend(self, kind: str, url: str, method: str) -> Fault | None:
        """The first fault of `kind` that applies to this request, counted as used once."""
        with self._lock:
            for fault in self.faults:
                fits = fault.kind == kind and fault.match in url and fault.method in ("", method)
                if fits and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def count_served(self, path: str, n_bytes: int) -> None:
        with self._lock:
            self.served[path] = self.served.get(path, 0) + n_bytes

    def gets(self, path: str) -> list[Request]:
        """The GET requests for the contents of `path`, at the hub or at its storage."""
        return [r for r in self.requests if r.method == "GET" and r.path.endswith("/" + path)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], hub: LoopbackHub, origin: str) -> None:
        super().__init__(address, _Handler)
        self.hub, self.origin = hub, origin

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed in mid-transfer are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        # Small, so that bytes counted as sent are (nearly) bytes that the client has.
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        super().setup()

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, headers = self.server.hub, self.headers
        hub.record(
            Request(
                self.server.origin,
                self.command,
                self.path,
                headers.get("Range"),
                headers.get("Authorization"),
            )
        )
        fault = hub.spend("status", self.path, self.command)
        if fault is not None:
            self._reply(fault.status, fault.headers, b"{}")
            return
        url = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(url.path)
        if self.server.origin == "cdn":
            _, sha256, name = path.split("/", 2)
            for repo in hub.repos.values():
                for files in repo.commits.values():
                    if name in files and repo.sha256(files[name]) == sha256:
                        self._send_file(name, files[name], {"ETag": '"cdn-etag"'})
                        return
            self._error(404, "EntryNotFound")
            return
        if path == "/api/models":
            search = urllib.parse.parse_qs(url.query).get("search", [""])[0].lower()
            found = [r.info(r.main) for r in hub.repos.values() if search in r.name.lower()]
            self._json(found)
            return
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            self._api(*match.groups(default=""))
            return
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
            return
        self._error(404, "RepoNotFound")

    def _repo(self, name: str, *, contents: bool) -> Repo | None:
        """The repository, or None when an error has been sent."""
        repo = self.server.hub.repos.get(name)
        has_token = bool(self.headers.get("Authorization"))
        if repo is None or (repo.private and not has_token):
            self._error(404 if has_token else 401, "RepoNotFound")
            return None
        if contents and repo.gated:
            self._error(403, "GatedRepo")
            return None
        if self.server.hub.require_token and not has_token:
            self._error(401, "")
            return None
        return repo

    def _api(self, name: str, verb: str, revision: str) -> None:
        repo = self._repo(name, contents=False)
        if repo is None:
            return
        commit = repo.commit_of(revision or "main")
        if commit is None:
            self._error(404, "RevisionNotFound")
            return
        self._json(repo.tree(commit) if verb == "tree" else repo.info(commit))

    def _resolve(self, name: str, revision: str, path: str) -> None:
        hub, repo = self.server.hub, self._repo(name, contents=True)
        if repo is None:
            return
        commit = repo.commit_of(revision)
        if commit is None:
            self._error(404, "RevisionNotFound")
            return
        content = repo.commits[commit].get(path)
        if content is None:
            self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        etag = repo.etag(path, content)
        headers = {"X-Repo-Commit": commit}
        if hub.spend("xet", self.path, self.command):
            headers |= {"X-Xet-Hash": "ab" * 32, "X-Xet-Refresh-Route": "/api/none"}
        if hub.use_cdn and path.endswith(LARGE_SUFFIXES):
            headers |= {
                "X-Linked-Etag": f'"{etag}"',
                "X-Linked-Size": str(size_of(content)),
                "Location": f"{hub.cdn_url}/{etag}/{urllib.parse.quote(path)}",
            }
            self._reply(302, headers, b"")
            return
        if not hub.spend("no_etag", self.path, self.command):
            headers["ETag"] = f'"{etag}"'
        self._send_file(path, content, headers)

    def _send_file(self, path: str, content: Content, headers: dict[str, str]) -> None:
        hub, size = self.server.hub, size_of(content)
        start, end, status = 0, size, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and not hub.spend("ignore_range", self.path, self.command):
            start = int(wanted[1])
            end = min(size, int(wanted[2]) + 1 if wanted[2] else size)
            if start >= size:
                self._reply(416, {"Content-Range": f"bytes */{size}"}, b"")
                return
            status = 206
            shown = start
            if hub.spend("wrong_content_range", self.path, self.command):
                shown += 1
            headers["Content-Range"] = f"bytes {shown}-{end - 1}/{size}"
        headers["Accept-Ranges"] = "bytes"
        headers.setdefault("Content-Type", "application/octet-stream")
        body_end = end
        if self.command == "GET" and (cut := hub.spend("truncate", self.path, "GET")):
            body_end = min(end, start + cut.after)
        if hub.spend("no_size", self.path, self.command):
            self.close_connection = True
            headers["Connection"] = "close"
        else:
            headers["Content-Length"] = str(body_end - start)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self._send_body(path, content, start, body_end)

    def _send_body(self, path: str, content: Content, start: int, end: int) -> None:
        hub = self.server.hub
        breaks = {k: hub.spend(k, self.path, "GET") for k in ("drop", "rst", "stall")}
        flip = size_of(content) - 1 if hub.spend("corrupt", self.path, "GET") else -1
        limit = min((f.after for f in breaks.values() if f), default=end - start)
        position = start
        for chunk in _pieces(content, start, min(end, start + limit), hub.chunk_bytes):
            if hub.delay_s:
                time.sleep(hub.delay_s)
            if position <= flip < position + len(chunk):
                at = flip - position
                chunk = chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :]
            self.wfile.write(chunk)
            position += len(chunk)
            hub.count_served(path, len(chunk))
        if breaks["stall"]:
            self.wfile.flush()
            hub.released.wait()
        if breaks["rst"]:
            linger = struct.pack("ii", 1, 0)
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if any(breaks.values()):
            self.close_connection = True
            if breaks["rst"]:
                self.request.close()

    def _json(self, value: object) -> None:
        self._reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _error(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        shown = {"X-Error-Code": code} if code else {}
        self._reply(status, {**shown, **(headers or {})}, b'{"error": "as asked"}')

    def _reply(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def size_of(content: Content) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def _pieces(content: Content, start: int, end: int, n_bytes: int) -> Iterator[bytes]:
    if isinstance(content, bytes):
        for at in range(start, end, n_bytes):
            yield content[at : min(at + n_bytes, end)]
        return
    with content.open("rb") as data:
        data.seek(start)
        while start < end and (piece := data.read(min(n_bytes, end - start))):
            start += len(piece)
            yield piece


def repos_in(folder: Path) -> dict[str, dict[str, Content]]:
    """`folder`/<org>/<name>/<files> as repositories."""
    return {
        f"{repo.parent.name}/{repo.name}": {
            path.relative_to(repo).as_posix(): path
            for path in sorted(repo.rglob("*"))
            if path.is_file()
        }
        for repo in sorted(folder.glob("*/*"))
        if repo.is_dir()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a folder as a hub on loopback.")
    parser.add_argument("--serve", type=Path, required=True, help="folder with ORG/NAME/files")
    parser.add_argument("--port", type=int, default=8899)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each chunk")
    parser.add_argument("--chunk", type=int, default=64 * 1024, help="bytes in a chunk")
    args = parser.parse_args()
    with LoopbackHub(repos_in(args.serve), port=args.port) as hub:
        hub.delay_s, hub.chunk_bytes = args.delay, args.chunk
        print(f"export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1", flush=True)
        print("\n".join(hub.repos) or "no repositories found", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
