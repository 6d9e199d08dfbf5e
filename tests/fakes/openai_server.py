"""A server on loopback that speaks the OpenAI protocol as far as a bench asks, with faults.

with OpenAiServer(models=("tiny",), faults={"buffered"}) as server:
    measure_url(server.base, workload)
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    authorization: str | None
    body: dict[str, Any]


class OpenAiServer:
    """`faults` are names, see `_Handler`. `missing` are paths that are not there. `refuses` are
    keys of a request that are refused with 400. `replies` maps a path to (status, body) instead.
    `meeting`: requests whose prompt has `meeting[0]` words are answered when `meeting[1]` of them
    are there."""

    def __init__(
        self,
        *,
        models: Sequence[str] = ("tiny",),
        faults: Collection[str] = (),
        missing: Collection[str] = (),
        refuses: Collection[str] = (),
        replies: dict[str, tuple[int, bytes]] | None = None,
        meeting: tuple[int, int] | None = None,
    ) -> None:
        self.models = tuple(models)
        self.faults = set(faults)
        self.missing = set(missing)
        self.refuses = set(refuses)
        self.replies = replies or {}
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self.n_meeting_words = meeting[0] if meeting else 0
        self.meeting = threading.Barrier(meeting[1]) if meeting else None
        self.stopped = threading.Event()
        self._n_open = 0
        self._lock = threading.Lock()

    def __enter__(self) -> OpenAiServer:
        owner = self

        class Handler(_Handler):
            server_owner = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def completions(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.method == "POST"]

    def enter(self, asked: Asked) -> None:
        with self._lock:
            self.asked.append(asked)
            self._n_open += 1
            self.most_at_once = max(self.most_at_once, self._n_open)

    def leave(self) -> None:
        with self._lock:
            self._n_open -= 1


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_owner: OpenAiServer
    n_here = 0  # requests on this connection

    def log_message(self, *arguments: object) -> None:
        pass

    def version_string(self) -> str:
        return "fake/1"

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: dict[str, Any]) -> None:
        owner = self.server_owner
        self.n_here += 1
        owner.enter(Asked(self.command, self.path, self.headers.get("Authorization"), body))
        try:
            self._route(owner, body)
        except (OSError, threading.BrokenBarrierError):
            self.close_connection = True
        finally:
            owner.leave()

    def _route(self, owner: OpenAiServer, body: dict[str, Any]) -> None:
        if self.path in owner.replies:
            self._send(*owner.replies[self.path])
        elif self.path in owner.missing:
            self._send(404, b'{"detail": "Not Found"}')
        elif self.path == "/v1/models":
            self._send_json(
                200, {"object": "list", "data": [{"id": name} for name in owner.models]}
            )
        elif refused := sorted(owner.refuses & body.keys()):
            message = f"unknown field: {refused[0]}"
            self._send_json(400, {"error": {"message": message, "type": "invalid_request_error"}})
        elif self.path in ("/v1/chat/completions", "/v1/completions"):
            self._stream(owner, body)
        else:
            self._send(404, b"404 page not found")

    def _stream(self, owner: OpenAiServer, body: dict[str, Any]) -> None:
        faults = owner.faults
        n_tokens = body.get("max_tokens", body.get("max_completion_tokens", 0))
        if "key_echo" in faults:
            self._send_json(401, {"error": {"message": f"bad key {self.headers['Authorization']}"}})
            return
        if "busy" in faults and n_tokens > 8:
            self._send_json(503, {"error": {"message": "too\x1b[31m busy\nfor you"}})
            return
        if "closes" in faults and self.n_here > 2:
            # As a server that ends a connection just as the next request is on its way.
            self.close_connection = True
            return
        if "redirect" in faults:
            self.send_response(307)
            self.send_header("Location", "http://127.0.0.1:9/v1/chat/completions")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
        if owner.meeting is not None and len(prompt.split()) == owner.n_meeting_words:
            owner.meeting.wait(20)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        is_chat = self.path.endswith("/chat/completions")
        if "silent" in faults and n_tokens > 8:
            owner.stopped.wait(30)
            return
        events = [self._piece(is_chat, i, n_tokens) for i in range(n_tokens)]
        if "empty" in faults:
            events = events[-1:]
            events[0]["choices"][0].pop("delta" if is_chat else "text")
        if "no_usage" not in faults and body.get("stream_options"):
            usage = {"prompt_tokens": 50, "completion_tokens": n_tokens, "total_tokens": 50}
            events.append({"choices": [], "usage": usage})
        self._send_events(faults, events)

    def _send_events(self, faults: set[str], events: list[dict[str, Any]]) -> None:
        if "comments" in faults:
            self._chunk(b": hello\r\nevent: message\r\nid: 1\r\n\r\n")
        if "buffered" in faults:
            self._chunk(
                b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
            )
            events = []
        for number, event in enumerate(events):
            # A client sees a stream only where pieces do not all arrive before it looks.
            self.server_owner.stopped.wait(0.002)
            if "early_end" in faults and number == 3:
                self._chunk(b"")
                return
            if "reset" in faults and number == 3:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                return
            if "garbage" in faults and number == 2:
                self._chunk(b"data: {not json\n\n")
            if "error_event" in faults and number == 2:
                self._chunk(b'data: {"error": {"message": "out of memory"}}\n\n')
            if "huge" in faults:
                self._chunk(b"data: " + b"x" * (3 << 20))
            line = b"data: " + json.dumps(event).encode()
            if "crlf" in faults:
                self._chunk(line[:9])
                self._chunk(line[9:] + b"\r\n\r")
                self._chunk(b"\n")
            else:
                self._chunk(line + b"\n\n")
        if "no_done" not in faults:
            self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _piece(self, is_chat: bool, number: int, n_tokens: int) -> dict[str, Any]:
        text = f" word{number}"
        faults = self.server_owner.faults
        key = "reasoning_content" if "thinks" in faults else "content"
        choice: dict[str, Any] = {"delta": {key: text}} if is_chat else {"text": text}
        choice["index"] = 0
        is_last = number == n_tokens - 1 and "early_end" not in faults
        choice["finish_reason"] = "length" if is_last else None
        return {"choices": [choice]}

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()

    def _send_json(self, status: int, value: object) -> None:
        self._send(status, json.dumps(value).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
