"""The live line on a terminal that may be stopped."""

from __future__ import annotations

import asyncio

import pytest

from llmrun.cli import serve_status
from llmrun.cli.serve_status import StatusLine
from llmrun.engine.types import EngineCounters
from tests.fakes.manual_clock import until
from tests.fakes.stopped_terminal import PATIENCE_S, Stopped, output_to


class FakeHost:
    def loading(self) -> list[object]:
        return []


class FakeService:
    """The part of `server.service.Service` that the line asks."""

    def __init__(self) -> None:
        self.host = FakeHost()
        self.n_asked = 0

    def engine_counters(self) -> list[tuple[str, EngineCounters]]:
        self.n_asked += 1
        return [("m", EngineCounters(n_ctx=100, n_seq_max=2, n_running=self.n_asked))]


def test_a_stopped_terminal_does_not_stop_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_status, "_EVERY_S", 0.0)
    stream, service = Stopped(is_terminal=True), FakeService()
    output = output_to(stream)

    async def main() -> None:
        status = StatusLine(output, service)  # type: ignore[arg-type]
        output.begin()
        stream.is_going.set()
        status.start()
        await until(lambda: "streams" in stream.getvalue(), "the line")
        stream.is_going.clear()
        await until(lambda: stream.is_waited_for, "the stop")
        n_before = service.n_asked
        await until(lambda: service.n_asked > n_before + 10, "the loop's next turns")
        # A line that nobody sees makes room for the next one.
        assert output._n_waiting <= 2
        await status.stop()
        stream.is_going.set()
        await asyncio.to_thread(output.end, PATIENCE_S)

    asyncio.run(main())


def test_the_line_is_gone_before_others_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_status, "_EVERY_S", 0.0)
    stream, service = Stopped(is_terminal=True), FakeService()
    stream.is_going.set()
    output = output_to(stream)

    async def main() -> None:
        status = StatusLine(output, service)  # type: ignore[arg-type]
        output.begin()
        status.start()
        await until(lambda: "streams" in stream.getvalue(), "the line")
        status.pause()
        output.note("ending")
        await status.stop()
        await asyncio.to_thread(output.end, PATIENCE_S)

    asyncio.run(main())
    before, _, after = stream.getvalue().partition("ending")
    assert "\x1b[2K" in before.rpartition("streams")[2]  # erased
    assert "stream" not in after


def test_without_a_terminal_there_is_no_line() -> None:
    output, service = output_to(Stopped()), FakeService()

    async def main() -> None:
        status = StatusLine(output, service)  # type: ignore[arg-type]
        status.start()
        await status.stop()

    asyncio.run(main())
    assert service.n_asked == 0
