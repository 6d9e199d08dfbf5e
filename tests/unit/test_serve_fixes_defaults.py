"""`--max-tokens` and `--stop` of the command line hold for the requests that a server gets."""

from __future__ import annotations

from pathlib import Path

from llmrun.chat.messages import Message
from llmrun.engine.types import SamplingParams
from llmrun.server.host import ModelHost
from llmrun.server.lifecycle import ServerState
from llmrun.server.opener import Room
from llmrun.server.prompts import ChatModel
from llmrun.server.service import Service
from llmrun.server.types import ChatRequest, Generation, TextRequest
from tests.fakes.cli import Cli
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.served import served

HI = (Message("user", "Hi"),)


def requests_of(generation: Generation) -> list[tuple[int | None, tuple[str, ...]]]:
    model = ChatModel(FakeEngine(), SamplingParams(), max_tokens=7, stop=("END",))
    try:
        chat = model.prepare_chat(ChatRequest(generation, HI))
        text = model.prepare_text(TextRequest(generation, ("Hi",)))
    finally:
        model.close()
    return [(job.request.max_tokens, job.request.stop) for job in (*chat, *text)]


def test_a_request_that_sets_no_bound_gets_the_servers() -> None:
    assert [n for n, _ in requests_of(Generation())] == [7, 7]
    assert [n for n, _ in requests_of(Generation(max_tokens=20))] == [20, 20]


def test_the_servers_stop_texts_are_added_to_a_requests() -> None:
    for _, stop in requests_of(Generation(stop=("now",))):
        assert stop[-2:] == ("now", "END")


def test_the_command_lines_values_reach_the_model(tmp_path: Path) -> None:
    cli = Cli(tmp_path)
    models = served(cli, cli.model(), max_tokens=5, stop=("END",))
    opened = models.open(models.cards()[0], "chat", Room())
    service = Service(ModelHost(models), ServerState(), version="1")
    try:
        (job,) = service.chat_model(opened).prepare_chat(ChatRequest(Generation(), HI))
    finally:
        opened.close()
    assert (job.request.max_tokens, job.request.stop[-1]) == (5, "END")
