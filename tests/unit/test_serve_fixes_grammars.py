"""A grammar of a request's own can keep an engine busy for ever, so it is taken only when asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llmrun.chat.messages import Message
from llmrun.server.app import OPENAI_CHAT
from llmrun.server.lifecycle import ServerState
from llmrun.server.service import Service
from llmrun.server.types import ApiError, ChatRequest, Generation

NOBODY: Any = None


def test_a_grammar_is_refused_before_anything_is_loaded() -> None:
    service = Service(NOBODY, ServerState(), version="1", takes_grammars=False)
    request = ChatRequest(Generation(grammar='root ::= "a"'), (Message("user", "Hi"),))
    with pytest.raises(ApiError, match="--allow-grammar") as caught:
        asyncio.run(service.answer_request(NOBODY, OPENAI_CHAT, request))
    assert (caught.value.kind, caught.value.param) == ("invalid_request", "grammar")
