"""What `-v` shows of requests, from the words on the command line to the line on stderr."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmrun.server import lifecycle
from tests.fakes.chat_server import HeldEngine
from tests.fakes.cli import Cli
from tests.fakes.manual_clock import until

PATH = "/v1/chat/completions"


class Client:
    """Asks once; goes as soon as `goes` says so."""

    def __init__(self, goes: Callable[[], bool], *, stream: bool = False) -> None:
        messages = [{"role": "user", "content": "a secret"}]
        self._body: bytes | None = json.dumps({"messages": messages, "stream": stream}).encode()
        self._goes = goes

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await until(self._goes, "the client's going")
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        pass

    async def ask(self, app: Any) -> None:
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": PATH,
            "raw_path": PATH.encode(),
            "query_string": b"k=secret",
            "headers": headers,
        }
        await app(scope, self.receive, self.send)


def serve(
    monkeypatch: pytest.MonkeyPatch, folder: Path, engine: HeldEngine, client: Client, *words: str
) -> str:
    """What stands on stderr after one request of `client`."""

    def serve_once(app: Any, options: object, state: Any, **hooks: Any) -> int:
        async def main() -> None:
            hooks["on_listen"]("http://127.0.0.1:1")
            await hooks["on_start"]()
            state.become_ready()
            await client.ask(app)
            await hooks["on_stop"]()

        asyncio.run(main())
        return 0

    monkeypatch.setattr(lifecycle, "serve", serve_once)
    cli = Cli(folder, engine)  # type: ignore[arg-type]
    run = cli("serve", cli.model(), *words)
    assert run.code == 0, run.err
    assert "secret" not in run.err
    return run.err


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_went_away_is_a_499(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stream: bool
) -> None:
    engine = HeldEngine(["Hello!"])
    engine.hold(0)
    client = Client(engine.submitted.is_set, stream=stream)
    shown = serve(monkeypatch, tmp_path, engine, client, "-v")
    assert re.search(rf"^POST {PATH} 499 \d+ ms$", shown, re.MULTILINE)
    assert engine.cancelled.is_set()


def test_an_answer_has_its_status_and_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = Client(lambda: False)
    shown = serve(monkeypatch, tmp_path, HeldEngine(["Hello!"]), client, "-v")
    assert re.search(rf"^POST {PATH} 200 \d+ ms$", shown, re.MULTILINE)


def test_without_v_requests_leave_no_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = Client(lambda: False)
    assert PATH not in serve(monkeypatch, tmp_path, HeldEngine(["Hello!"]), client)
