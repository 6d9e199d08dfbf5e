"""The OpenAI dialect's `/v1/chat/completions` and `/v1/models`, and its errors. Pure.

A request's way: `parse_chat` makes a `ChatRequest` of the body, `encode_chat` an answer of whole
replies, `ChatEncoder` (in `wire_openai_stream`) the chunks of streamed ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llmrun.server.reading import Fields
from llmrun.server.types import (
    AnswerContext,
    ChatRequest,
    ModelCard,
    Reply,
)
from llmrun.server.wire_openai_fields import MAX_TOP_LOGPROBS, read_generation
from llmrun.server.wire_openai_messages import read_messages
from llmrun.server.wire_openai_parts import (
    encode_error,
    encode_reason,
    encode_timings,
    encode_token_logprobs,
    encode_usage,
    head_of,
)
from llmrun.server.wire_openai_schema import SCHEMA_CHAT
from llmrun.server.wire_openai_stream import ChatEncoder
from llmrun.server.wire_openai_tools import read_tools

__all__ = [
    "SCHEMA_CHAT",
    "ChatEncoder",
    "encode_chat",
    "encode_error",
    "encode_model",
    "encode_models",
    "encode_usage",
    "parse_chat",
]

_MAX_TEMPLATE_ARGS = 64
_THINK_ARGS = ("enable_thinking", "thinking")
# The templates that know efforts know three, and print what they are given.
_EFFORTS = {
    "none": None,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}


def parse_chat(body: object) -> ChatRequest:
    """The body of `POST /v1/chat/completions`. Raises ApiError.

    A last message of the assistant is gone on with, unless `continue_final_message` is false or
    `add_generation_prompt` is true.
    """
    fields = Fields(body)
    messages = read_messages(fields)
    tools = read_tools(fields)
    generation = read_generation(fields, n_logprobs=_read_logprobs(fields))
    effort, think = _read_effort(fields)
    arguments, thinks = _read_template_args(fields)
    return ChatRequest(
        generation,
        messages,
        tools=tools.tools,
        tool_choice=tools.choice,
        parallel_tool_calls=tools.parallel,
        think=think if thinks is None else thinks,
        reasoning_effort=effort,
        continues=_read_continues(
            fields, messages[-1].role == "assistant" and not messages[-1].tool_calls
        ),
        template_args=arguments,
        legacy_functions=tools.legacy,
    )


def _read_logprobs(fields: Fields) -> int | None:
    n_top = fields.integer("top_logprobs", low=0, high=MAX_TOP_LOGPROBS)
    if fields.flag("logprobs"):
        return n_top or 0
    if n_top:
        raise fields.error("top_logprobs", "needs logprobs to be true")
    return None


def _read_effort(fields: Fields) -> tuple[str | None, bool | None]:
    """The effort, and what it says about thinking at all. The least of them leaves a model that
    does not think by itself alone."""
    word = fields.choice("reasoning_effort", tuple(_EFFORTS))
    if not word:
        return None, None
    return _EFFORTS[word], None if word == "minimal" else word != "none"


def _read_template_args(fields: Fields) -> tuple[dict[str, object], bool | None]:
    """The template's further variables, without those that turn thinking on or off."""
    given = fields.object("chat_template_kwargs")
    if given is None:
        return {}, None
    names = list(given.names())
    if len(names) > _MAX_TEMPLATE_ARGS:
        raise fields.error(
            "chat_template_kwargs", f"must not have more than {_MAX_TEMPLATE_ARGS} members"
        )
    think = None
    for name in _THINK_ARGS:
        if think is None and given.has(name):
            think = given.flag(name)
    return {name: given.value(name) for name in names if name not in _THINK_ARGS}, think


def _read_continues(fields: Fields, can_continue: bool) -> bool:
    prompts = fields.flag("add_generation_prompt")
    if not fields.has("continue_final_message"):
        return can_continue and not prompts
    if not fields.flag("continue_final_message"):
        return False
    if not can_continue:
        raise fields.error(
            "continue_final_message", "needs a last message of the assistant without tool calls"
        )
    if prompts:
        raise fields.error("continue_final_message", "cannot be true with add_generation_prompt")
    return True


def encode_chat(
    context: AnswerContext, request: ChatRequest, replies: Sequence[Reply]
) -> dict[str, object]:
    """A `chat.completion` of whole replies, one choice each."""
    n = request.generation.n
    finishes = [reply.finish for reply in replies]
    return {
        **head_of(context, "chatcmpl", "chat.completion"),
        "choices": [
            _encode_choice(context, request, index, reply) for index, reply in enumerate(replies)
        ],
        "usage": encode_usage(finishes, n),
        "timings": encode_timings(finishes, n),
    }


def _encode_choice(
    context: AnswerContext, request: ChatRequest, index: int, reply: Reply
) -> dict[str, object]:
    reason = encode_reason(reply.finish.reason)
    if request.legacy_functions and reason == "tool_calls":
        reason = "function_call"
    has_logprobs = request.generation.n_logprobs is not None
    return {
        "index": index,
        "message": _encode_message(context, request, index, reply),
        "logprobs": encode_token_logprobs(reply.logprobs) if has_logprobs else None,
        "finish_reason": reason,
    }


def _encode_message(
    context: AnswerContext, request: ChatRequest, index: int, reply: Reply
) -> dict[str, object]:
    message: dict[str, object] = {
        "role": "assistant",
        "content": None if reply.calls and not reply.text else reply.text,
        "refusal": None,
    }
    if reply.thinking:
        message["reasoning_content"] = reply.thinking
    functions = [
        {"name": call.name, "arguments": text}
        for call, text in zip(reply.calls, _argument_texts(reply), strict=True)
    ]
    if functions and request.legacy_functions:
        message["function_call"] = functions[0]
    elif functions:
        message["tool_calls"] = [
            {
                "id": call.id or f"call_{context.id}_{index}_{i}",
                "type": "function",
                "function": function,
            }
            for i, (call, function) in enumerate(zip(reply.calls, functions, strict=True))
        ]
    return message


def _argument_texts(reply: Reply) -> list[str]:
    if len(reply.arguments_texts) == len(reply.calls):
        return list(reply.arguments_texts)
    return [json.dumps(dict(call.arguments), ensure_ascii=False) for call in reply.calls]


def encode_models(cards: Sequence[ModelCard]) -> dict[str, object]:
    """The answer of `GET /v1/models`."""
    return {"object": "list", "data": [encode_model(card) for card in cards]}


def encode_model(card: ModelCard) -> dict[str, object]:
    """The answer of `GET /v1/models/{name}`. `meta` has the names of llama.cpp's server."""
    meta: dict[str, object] = {"size": card.n_bytes}
    known = {
        "n_params": card.n_params,
        "n_ctx_train": card.n_ctx,
        "quant": card.quant,
        "architecture": card.architecture,
    }
    meta |= {name: value for name, value in known.items() if value}
    abilities = {
        "completion": card.can_chat,
        "tools": card.can_call_tools,
        "thinking": card.can_think,
        "embedding": card.can_embed,
        "rerank": card.can_rerank,
    }
    meta["capabilities"] = [name for name, has in abilities.items() if has]
    return {
        "id": card.name,
        "object": "model",
        "created": int(card.modified_s),
        "owned_by": card.repo.partition("/")[0] if "/" in card.repo else "llmrun",
        "meta": meta,
    }
