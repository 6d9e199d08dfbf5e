"""What the server counts and logs of its requests, streams and failures included."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

from llmrun.errors import EngineError
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.running_server import RunningServer, fake_server

CHAT = "POST /v1/chat/completions"


def body(**members: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "a secret"}], **members}


def counts(server: RunningServer) -> dict[tuple[str, str], int]:
    """Requests by path and status, without those for the metrics themselves."""
    server.until_answered()  # a stream is counted after its last byte
    text = server.ask("GET /metrics").body.decode()
    rows = re.findall(r'llmrun_requests_total\{path="([^"]*)",status="(\d+)"\} (\d+)', text)
    return {(path, status): int(n) for path, status, n in rows if path != "/metrics"}


def test_requests_are_counted_by_their_real_end() -> None:
    answers = ["Hi", "Hi", EngineError("broken"), EngineError("broken"), ("H", EngineError("x"))]
    with fake_server({"m": lambda: FakeEngine(answers)}) as server:
        path = "/v1/chat/completions"
        for stream in (True, False):
            assert server.ask(CHAT, body(stream=stream)).status == 200
        for stream in (True, False):
            assert server.ask(CHAT, body(stream=stream)).status == 500
        assert counts(server) == {(path, "200"): 2, (path, "500"): 2}
        late = server.ask(CHAT, body(stream=True))
        assert late.status == 200 and b'data: {"error"' in late.body
        assert server.ask(CHAT, body(model="none", stream=True)).status == 404
        found = counts(server)
        assert found == {(path, "200"): 3, (path, "500"): 2, (path, "404"): 1}
        metrics = server.ask("GET /metrics").body.decode()
        assert "\nllmrun_requests_in_flight 1.0\n" in metrics  # the request for the metrics
        assert 'llmrun_reply_seconds_count{model="m"} 2.0' in metrics


@pytest.mark.parametrize("stream", [True, False])
def test_a_defect_is_logged_and_its_words_are_not_sent(
    caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    answers = ["x", ("H", RuntimeError("a defect")), EngineError("no defect")]
    with (
        caplog.at_level(logging.INFO, "llmrun.server"),
        fake_server({"m": lambda: FakeEngine(answers)}) as server,
    ):
        server.ask(CHAT, body())
        answer = server.ask(CHAT, body(stream=stream))
        assert b"a defect" not in answer.body and b"inside the server" in answer.body
        server.until_answered()
        assert [record.getMessage() for record in caplog.records] == ["a request failed"]
        assert isinstance(caplog.records[0].exc_info[1], RuntimeError)  # type: ignore[index]
        # What the program itself says to a client is no defect.
        assert b"no defect" in server.ask(CHAT, body(stream=stream)).body
        server.until_answered()
        assert len(caplog.records) == 1
    assert "a secret" not in caplog.text


def test_a_pinned_model_stays_and_is_not_said_to_have_gone() -> None:
    models = {"m": FakeEngine, "other": FakeEngine}
    with fake_server(models, pinned=("m",), keep_alive_s=-1.0) as server:
        for line in ("POST /api/generate", "POST /api/chat"):
            for name, reason in (("m", "load"), ("other", "unload")):
                server.ask(line, {"model": name})
                answer = server.ask(line, {"model": name, "keep_alive": 0}).json()
                assert (answer["done"], answer["done_reason"]) == (True, reason)
            loaded = server.ask("GET /api/ps").json()["models"]
            assert [each["name"] for each in loaded] == ["m"]
            assert loaded[0]["expires_at"].startswith("2318")


def test_models_are_listed_in_the_words_of_who_asks() -> None:
    with fake_server({"org/m:Q4": FakeEngine}) as server:
        assert server.ask("GET /v1/models").json()["object"] == "list"
        assert server.ask("GET /v1/models/org/m:Q4").json()["id"] == "org/m:Q4"
        other = server.ask("GET /v1/models", None, "anthropic-version: 2023-06-01").json()
        assert other["data"][0]["type"] == "model" and "has_more" in other
        assert server.ask("GET /api/tags").json()["models"][0]["name"] == "org/m:Q4"
        assert server.ask("GET /api/version").json()["llmrun"] == "1.2.3"
        gone = server.ask("GET /v1/models/none", None, "anthropic-version: 2023-06-01")
        assert gone.status == 404
