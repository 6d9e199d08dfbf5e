"""Replies in an event loop: batches, failures, who leaves, and who waits long."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import pytest

from llmrun.engine.loop import Engine
from llmrun.engine.types import SamplingParams
from llmrun.errors import EngineError
from llmrun.server import generate as module
from llmrun.server.generate import generate
from llmrun.server.prompts import ChatModel, Job
from llmrun.server.types import Finished, Generation, ReplyEvent, Started, TextPart, TextRequest
from tests.fakes.fake_backend import FakeBackend, endless_token
from tests.fakes.fake_engine import FakeEngine


def model_of(engine: Any) -> ChatModel:
    return ChatModel(engine, SamplingParams())


def jobs_of(model: ChatModel, *prompts: str, n: int = 1, max_tokens: int = 50) -> list[Job]:
    return model.prepare_text(TextRequest(Generation(n=n, max_tokens=max_tokens), prompts))


async def collect(model: ChatModel, jobs: Sequence[Job]) -> list[list[ReplyEvent]]:
    found: list[list[ReplyEvent]] = [[] for _ in jobs]
    async for batch in generate(model, jobs):
        for i, event in batch:
            found[i].append(event)
    return found


def text_of(events: Sequence[ReplyEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextPart))


def test_replies_that_run_together_each_get_their_own_events() -> None:
    model = model_of(FakeEngine(["one", "two!", "three"]))
    jobs = jobs_of(model, "a", "bc", "def")
    found = asyncio.run(collect(model, jobs))
    assert [text_of(events) for events in found] == ["one", "two!", "three"]
    assert [events[0] for events in found] == [Started(1), Started(2), Started(3)]
    assert all(isinstance(events[-1], Finished) for events in found)


def test_the_real_engines_thread_wakes_the_loop() -> None:
    backend = FakeBackend(n_ctx=512, n_seq_max=4, next_token=endless_token)
    with Engine(backend) as engine:
        model = model_of(engine)
        found = asyncio.run(collect(model, jobs_of(model, "ab", "c", "ab", n=2)))
    assert len(found) == 6 and found[0][-1].usage.n_completion == 50  # type: ignore[union-attr]
    texts = [text_of(events) for events in found]
    assert texts[0] == texts[1] == texts[4] == texts[5] != texts[2] == texts[3]
    assert backend.violations == []


def test_the_first_failure_ends_all_of_them() -> None:
    engine = FakeEngine(["x" * 40, ("ab", EngineError("broken"), "c")])
    model = model_of(engine)
    with pytest.raises(EngineError, match="broken"):
        asyncio.run(collect(model, jobs_of(model, "a", "b")))
    assert [stream.cancelled for stream in engine.streams] == [True, True]


def test_what_cannot_be_submitted_frees_what_was_submitted_before() -> None:
    class Full(FakeEngine):
        def submit(self, request: Any) -> Any:
            if len(self.requests) == 2:
                raise EngineError("the engine is closed")
            return super().submit(request)

    engine = Full(["x" * 40])
    model = model_of(engine)
    with pytest.raises(EngineError):
        asyncio.run(collect(model, jobs_of(model, "a", "b", "c")))
    assert [stream.cancelled for stream in engine.streams] == [True, True]


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_who_leaves_early_cancels_what_runs(how: str) -> None:
    engine = FakeEngine(["x" * 40])

    async def main() -> None:
        model = model_of(engine)
        batches = generate(model, jobs_of(model, "a", "b"))
        for _ in range(4):
            await anext(batches)
        if how == "close":
            await batches.aclose()
        else:
            task = asyncio.ensure_future(_drain(batches))
            await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert [stream.cancelled for stream in engine.streams] == [True, True]


async def _drain(batches: Any) -> None:
    async for _ in batches:
        pass


def test_silence_is_told_as_an_empty_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET_S", 0.001)
    backend = FakeBackend(n_ctx=64, n_seq_max=1, next_token=endless_token)

    async def main(engine: Engine) -> None:
        model = model_of(engine)
        batches = generate(model, jobs_of(model, "a", max_tokens=3))
        with backend.held_back():
            assert [type(event) for _, event in await anext(batches)] == [Started]
            assert [await anext(batches) for _ in range(3)] == [[], [], []]
        rest = [event async for batch in batches for _, event in batch]
        assert len(text_of(rest)) == 3 and isinstance(rest[-1], Finished)

    with Engine(backend) as engine:
        asyncio.run(main(engine))


def test_a_loop_that_has_ended_is_not_woken() -> None:
    """The engine may say something for a request whose loop is gone with the server."""
    calls = []

    async def main() -> None:
        waker = module._Waker()
        calls.append(waker.call)

    asyncio.run(main())
    calls[0]()


def test_the_turn_is_remembered_for_the_next_prompt() -> None:
    from llmrun.chat.messages import Message
    from llmrun.server.types import ChatRequest

    engine = FakeEngine(["Hello!", "Bye."])
    model = model_of(engine)
    first = ChatRequest(Generation(), (Message("user", "Hi"),))
    asyncio.run(collect(model, model.prepare_chat(first)))
    again = ChatRequest(
        Generation(),
        (Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "Go")),
    )
    (job,) = model.prepare_chat(again)
    kept = (*engine.requests[0].prompt, *b"Hello!")
    assert job.request.prompt[: len(kept)] == kept
    assert len(model.turns._turns) == 1
    model.close()
