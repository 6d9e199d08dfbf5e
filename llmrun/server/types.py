"""What the wire formats make of requests, and what they make answers of.

A dialect's module (`wire_*`) turns a JSON body into one of the requests here and `ReplyEvent`s into
bytes; nothing between them knows which dialect is spoken. Times are seconds, tokens are counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from llmrun.chat.messages import Message, ToolCall
from llmrun.engine.types import TokenLogprob, Usage

ErrorKind = Literal[
    "invalid_request",
    "context_overflow",
    "authentication",
    "permission",
    "not_found",
    "method_not_allowed",
    "timeout",
    "too_large",
    "unsupported_media_type",
    "rate_limit",
    "internal",
    "not_supported",
    "unavailable",
]

STATUS: Mapping[ErrorKind, int] = {
    "invalid_request": 400,
    "context_overflow": 400,
    "authentication": 401,
    "permission": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "timeout": 408,
    "too_large": 413,
    "unsupported_media_type": 415,
    "rate_limit": 429,
    "internal": 500,
    "not_supported": 501,
    "unavailable": 503,
}
"""The HTTP status of each kind where a dialect has none of its own."""


class ApiError(Exception):
    """What a client gets to hear instead of an answer.

    `param` names the field at fault (`messages[0].content`), `code` is a stable name within the
    kind (`context_length_exceeded`, `model_not_found`), `retry_after_s` when to try again.
    `fields` are further members of the error's body (`n_prompt_tokens`, `n_ctx`).
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        fields: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.fields = dict(fields or {})

    @property
    def status(self) -> int:
        return STATUS[self.kind]


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error in a dialect's own shape."""

    status: int
    body: Mapping[str, object]
    headers: Mapping[str, str] = field(default_factory=dict)


# ---- requests


@dataclass(frozen=True, slots=True)
class SamplingWishes:
    """What a request says about sampling, in the names of `engine.types.SamplingParams`.
    None: as the model's own defaults have it."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON schema of an object."""

    name: str
    description: str = ""
    parameters: Mapping[str, object] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`none`: no calls. `auto`: the model decides. `required`: at least one call. `named`: a call
    of the tool `name`."""

    mode: Literal["none", "auto", "required", "named"] = "auto"
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """What all requests for text have in common.

    `model` is empty where the request names none. `max_tokens` None: to the end of the context.
    `n` answers to each prompt. `n_logprobs`: with the log probabilities of the tokens taken, and
    of so many likely ones; None: without. `json_schema` is the text of a schema that the answer
    has to follow, `grammar` is GBNF; at most one of the two. `keep_alive_s`: how long the model
    stays loaded afterwards (negative: for good; None: as the server is set). `include_usage`: the
    dialect's stream tells usage although that is not its default.
    """

    model: str = ""
    sampling: SamplingWishes = SamplingWishes()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    n_logprobs: int | None = None
    json_schema: str | None = None
    grammar: str | None = None
    stream: bool = False
    include_usage: bool = False
    keep_alive_s: float | None = None
    n_ctx: int | None = None
    ignore_eog: bool = False


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """Messages to reply to. `think`: with thinking, without, or as the template does by itself.
    `continues`: the last message is the assistant's, and the reply goes on from its end.
    `template_args` are further variables for the chat template. `legacy_functions`: the tools came
    in the dialect's older form, and calls are answered in it. `echo` are members that the
    dialect's answer says again as they were given."""

    generation: Generation
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    think: bool | None = None
    reasoning_effort: str | None = None
    continues: bool = False
    template_args: Mapping[str, object] = field(default_factory=dict)
    legacy_functions: bool = False
    echo: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Text to continue, without any template; each prompt is text or tokens. `echo`: the answer
    begins with the prompt, which the encoder puts there. `suffix`: what stands behind the gap to be
    filled (needs a model with tokens for that)."""

    generation: Generation
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool = False
    suffix: str | None = None


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts (or tokens) to be turned into vectors. `dimensions`: only so many of each, scaled to
    length 1 again. `truncate`: cut what is too long instead of refusing it. `base64`: as bytes of
    little-endian 32-bit floats in base64 instead of numbers."""

    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None
    base64: bool = False
    truncate: bool = False
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """Documents to be ordered by how well they answer `query`. `top_n` None: all of them."""

    model: str
    query: str
    documents: tuple[str, ...]
    top_n: int | None = None
    return_documents: bool = False


# ---- answers


@dataclass(frozen=True, slots=True)
class Started:
    """The first event of a reply: its prompt has `n_prompt` tokens."""

    n_prompt: int


@dataclass(frozen=True, slots=True)
class ThinkingPart:
    """A piece of the thinking before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of the answer. `logprobs`, where asked for, are those of its tokens; a token whose
    text is held back comes with the next piece."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class CallStarted:
    """The reply's `index`-th tool call (from 0) begins. `id` is unguessable: `call_…`."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of the `index`-th call's arguments."""

    index: int
    text: str


Reason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a reply. `stop` is the stop string that ended it, if one did. `prompt_s`
    is the time from the start of the work on the prompt to the first token, `decode_s` that of all
    tokens at the pace of those after the first, `load_s` what loading the model took for this
    request. `n_thinking` of the tokens were thinking; None where they were not counted."""

    reason: Reason
    usage: Usage
    stop: str | None = None
    seed: int = 0
    total_s: float = 0.0
    load_s: float = 0.0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    n_thinking: int | None = None


ReplyEvent = Started | ThinkingPart | TextPart | CallStarted | CallArguments | Finished


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply. The arguments of `calls` are objects; `arguments_texts` their JSON texts as
    the model gave them, in the same order."""

    finish: Finished
    text: str = ""
    thinking: str = ""
    calls: tuple[ToolCall, ...] = ()
    arguments_texts: tuple[str, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class AnswerContext:
    """What an answer says beside the reply. `id` is random text without a prefix (`chatcmpl-` and
    the like are the dialect's), `created_s` seconds since the epoch, `model` the name to show."""

    id: str
    created_s: float
    model: str


class StreamEncoder(Protocol):
    """One streamed answer in a dialect. Each method gives what goes on the wire now, maybe b"".

    Replies that come beside one another (`n` > 1, several prompts) have an `index` from 0.
    """

    def feed(self, index: int, event: ReplyEvent) -> bytes: ...

    def finish(self) -> bytes:
        """The end, after the last reply's `Finished`."""

    def fail(self, error: ApiError) -> bytes:
        """The end of an answer that fails on the way."""

    def keep_alive(self) -> bytes:
        """Something without meaning, for a connection on which nothing has been said for long."""


# ---- models


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model that this server can answer for. `name` is what requests call it. `n_ctx` is the
    context that it was trained for, as its header says; 0 where that was not read. `can_*`: what
    it is for. `digest` is the sha256 of its first file, where known."""

    name: str
    n_bytes: int
    n_params: int = 0
    quant: str = ""
    architecture: str = ""
    n_ctx: int = 0
    modified_s: float = 0.0
    digest: str = ""
    repo: str = ""
    can_chat: bool = True
    can_think: bool = False
    can_call_tools: bool = False
    can_embed: bool = False
    can_rerank: bool = False
    chat_template: str | None = None
    license: str = ""


@dataclass(frozen=True, slots=True)
class LoadedCard:
    """A loaded model. `expires_s` (epoch) is when it goes if nobody asks; None: it stays.
    `memory_bytes` and `gpu_bytes` are the plan's."""

    card: ModelCard
    n_ctx: int
    n_parallel: int
    memory_bytes: int
    gpu_bytes: int = 0
    expires_s: float | None = None
    n_running: int = 0


def describe_models(cards: Sequence[ModelCard]) -> str:
    """The names, for an error's message: `a, b and 3 more`."""
    names = [card.name for card in cards]
    if len(names) > 5:
        return f"{', '.join(names[:5])} and {len(names) - 5} more"
    return ", ".join(names) or "none"
