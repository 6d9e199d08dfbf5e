"""From a request to what the engine is asked, for one loaded model.

All of this blocks (a template may render in a process of its own), so it is called in a worker
thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmrun.chat.history import RecentTurns
from llmrun.chat.messages import Message
from llmrun.chat.parsing import ThinkingFormat, detect_format, make_splitter, needs_special_text
from llmrun.chat.prompting import ChatPrompt, render_chat
from llmrun.chat.protect import Guard, RenderedPrompt, tokenize_plain
from llmrun.chat.schema_grammar import schema_grammar
from llmrun.chat.session import MAX_PROMPT_CHARS
from llmrun.chat.template import PromptTemplate, template_for
from llmrun.chat.tool_calls import make_tool_splitter
from llmrun.chat.tool_formats import (
    FALLBACK,
    GRANITE_3,
    LFM2,
    ToolSpec,
    as_template_tools,
    detect_tool_format,
)
from llmrun.chat.tool_grammar import tool_grammar
from llmrun.chat.tool_prompt import plain_messages, tool_prompt, with_calls_as_text
from llmrun.engine.grammar import check_grammar
from llmrun.engine.types import EngineLike, Request, SamplingParams
from llmrun.errors import ContextOverflowError, UsageError
from llmrun.server.replies import ReplyReader
from llmrun.server.types import ApiError, ChatRequest, Generation, SamplingWishes, TextRequest

# Text with more characters in a token is rare, and then all of it is tokenized.
_PROBE_CHARS = 16


@dataclass(slots=True)
class Job:
    """One reply to be made: the engine's request, and how to read what comes."""

    request: Request
    reader: ReplyReader
    prompt: RenderedPrompt | None = None

    @property
    def n_prompt(self) -> int:
        return len(self.request.prompt)


class ChatModel:
    """A loaded model as requests for text see it: its template, its formats, its defaults."""

    def __init__(
        self,
        engine: EngineLike,
        sampling: SamplingParams,
        *,
        template: PromptTemplate | None = None,
        n_ctx: int | None = None,
        max_tokens: int | None = None,
        stop: tuple[str, ...] = (),
    ) -> None:
        """`n_ctx`: the most tokens that one request may have, prompt and answer together, where
        that is less than what the engine allows. `max_tokens` is for requests that set no
        bound; `stop` ends every answer."""
        self.engine = engine
        self.n_ctx = min(n_ctx or engine.n_ctx, engine.n_ctx)
        self.turns = RecentTurns(engine.tokenizer)
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._stop = stop
        self._template = template or template_for(engine.facts)
        self._template.start()
        self._thinking = detect_format(self._template.source, engine.tokenizer)
        self._tools = detect_tool_format(self._template.source, engine.tokenizer) or FALLBACK

    @property
    def thinks(self) -> bool:
        return self._thinking is not None

    def close(self) -> None:
        """End the template's process."""
        self._template.close()

    # ---- chat

    def prepare_chat(self, request: ChatRequest) -> list[Job]:
        """A job for each of the `n` replies. Raises the LlmrunErrors of templates, grammars and
        prompts that are too long."""
        generation = request.generation
        self._check_sizes(request)
        specs = () if request.tool_choice.mode == "none" else _specs(request)
        grammar = self._grammar_of(request, specs)
        found = self._render(request, specs, grammar is not None)
        tokens = self.turns.tokenize(found.prompt)
        self._check_room(tokens)
        stop = (*self._template.stop, *generation.stop)
        shows_special = self._needs_special(found.fmt, specs)
        tools = self._tools if specs else None
        jobs = []
        for sampling in self._samplings(generation, grammar):
            reader = ReplyReader(
                make_splitter(found.fmt, found.starts_inside, tools),
                make_tool_splitter(tools, specs) if tools else None,
                parallel=request.parallel_tool_calls,
            )
            jobs.append(
                Job(
                    self._request(tokens, generation, sampling, stop, show_special=shows_special),
                    reader,
                    found.prompt,
                )
            )
        return jobs

    def count_chat(self, request: ChatRequest) -> int:
        """How many tokens the prompt has."""
        specs = () if request.tool_choice.mode == "none" else _specs(request)
        _check_size(sum(len(message.content) for message in request.messages))
        found = self._render(request, specs, False)
        return len(self.turns.tokenize(found.prompt))

    def _render(
        self, request: ChatRequest, specs: Sequence[ToolSpec], has_grammar: bool
    ) -> ChatPrompt:
        messages = list(request.messages)
        prefill = messages.pop().content if request.continues and messages else ""
        tools = None
        if self._tools.is_fallback:
            messages = plain_messages(messages)
        elif self._tools in (LFM2, GRANITE_3) and "tool_calls" not in self._template.source:
            messages = with_calls_as_text(messages, self._tools)
        if specs and self._tools.is_fallback:
            text = tool_prompt(
                specs, name=request.tool_choice.name, parallel=request.parallel_tool_calls
            )
            messages = _with_system(messages, text)
        elif specs:
            tools = as_template_tools(specs)
        # gpt-oss's calls are messages with heads of their own, which their grammar spells itself: a
        # prompt that ends in another head would not let them begin.
        has_heads = self._thinking is not None and self._thinking.is_harmony
        is_forced = request.tool_choice.mode in ("required", "named")
        arguments: dict[str, object] = dict(request.template_args)
        if request.reasoning_effort is not None:
            arguments.setdefault("reasoning_effort", request.reasoning_effort)
        found = render_chat(
            self._template,
            self.engine.tokenizer,
            messages,
            fmt=self._thinking,
            thinks=False if prefill or is_forced else request.think,
            has_grammar=has_grammar and not (has_heads and is_forced),
            tools=tools,
            template_args=arguments,
        )
        if not prefill:
            return found
        # What the client puts into the model's mouth is text, whatever it spells.
        guard = Guard(self.engine.tokenizer, self._template.source)
        parts = guard.restore(guard.protect(prefill)).segments
        prompt = found.prompt
        if parts and not parts[0].is_literal:
            prompt, parts = prompt.append(parts[0].text), parts[1:]
        return ChatPrompt(RenderedPrompt((*prompt.segments, *parts)), found.fmt, False)

    def _grammar_of(self, request: ChatRequest, specs: Sequence[ToolSpec]) -> str | None:
        generation, choice = request.generation, request.tool_choice
        if choice.mode in ("required", "named"):
            if not specs:
                raise ApiError("invalid_request", "tool_choice asks for a call, but there are no "
                               "tools", param="tool_choice")  # fmt: skip
            if choice.name is not None and choice.name not in [spec.name for spec in specs]:
                raise ApiError("invalid_request", f"tool_choice names the tool {choice.name!r}, "
                               "which is not among the tools", param="tool_choice")  # fmt: skip
            return tool_grammar(
                self._tools,
                specs,
                name=choice.name,
                parallel=request.parallel_tool_calls and choice.mode != "named",
            )
        return _output_grammar(generation)

    def _needs_special(self, fmt: ThinkingFormat | None, specs: Sequence[ToolSpec]) -> bool:
        """Whether tags of thinking or calls are control tokens, which only show on request."""
        formats = [each for each in (fmt, self._tools if specs else None) if each is not None]
        return any(needs_special_text(each, self.engine.tokenizer) for each in formats)

    # ---- plain text

    def prepare_text(self, request: TextRequest) -> list[Job]:
        """A job for each of the `n` answers to each prompt, prompt by prompt."""
        if request.suffix:
            raise ApiError(
                "invalid_request",
                "filling a gap (suffix) is not supported",
                param="suffix",
                code="unsupported_parameter",
            )
        generation = request.generation
        grammar = _output_grammar(generation)
        jobs = []
        for prompt in request.prompts:
            tokens = self._tokens_of(prompt)
            self._check_room(tokens)
            for sampling in self._samplings(generation, grammar):
                request_ = self._request(tokens, generation, sampling, generation.stop)
                jobs.append(Job(request_, ReplyReader()))
        return jobs

    def _tokens_of(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            if not prompt:
                raise UsageError("the prompt is empty")
            return prompt
        _check_size(len(prompt))
        self._check_far_too_long([prompt])
        tokens = tokenize_plain(prompt, self.engine.tokenizer)
        if not tokens:
            raise UsageError("the prompt is empty")
        return tokens

    # ---- both

    def _request(
        self,
        tokens: tuple[int, ...],
        generation: Generation,
        sampling: SamplingParams,
        stop: tuple[str, ...],
        *,
        show_special: bool = False,
    ) -> Request:
        n_room = self.n_ctx - len(tokens)
        wanted = self._max_tokens if generation.max_tokens is None else generation.max_tokens
        return Request(
            prompt=tokens,
            sampling=sampling,
            max_tokens=n_room if wanted is None else min(wanted, n_room),
            stop=(*stop, *self._stop),
            show_special=show_special,
            ignore_eog=generation.ignore_eog,
            n_logprobs=generation.n_logprobs,
        )

    def _samplings(self, generation: Generation, grammar: str | None) -> list[SamplingParams]:
        """The sampling of each of the `n` answers: a seed that was given is the first one's, and
        the others follow it."""
        first = merge_sampling(self._sampling, generation.sampling)
        first = replace(first, grammar=grammar if grammar is not None else first.grammar)
        if first.seed is None:
            return [first] * generation.n
        return [replace(first, seed=first.seed + i) for i in range(generation.n)]

    def _check_sizes(self, request: ChatRequest) -> None:
        _check_size(sum(len(message.content) for message in request.messages))
        # Of the model's own turns templates leave things out.
        others = [each.content for each in request.messages if each.role != "assistant"]
        self._check_far_too_long(others)

    def _check_far_too_long(self, texts: Sequence[str]) -> None:
        """Raise ContextOverflowError, with an estimate, for what is several times too long: all of
        it would keep the processor busy for seconds."""
        n_chars, n_probe = sum(map(len, texts)), _PROBE_CHARS * self.n_ctx
        if n_chars <= 2 * n_probe:
            return
        probe = "".join(text[:n_probe] for text in texts)[:n_probe]
        n_tokens = len(
            self.engine.tokenizer.tokenize(probe, add_special=False, parse_special=False)
        )
        if n_tokens > 2 * self.n_ctx:
            raise ContextOverflowError(n_tokens * n_chars // len(probe), self.n_ctx)

    def _check_room(self, tokens: Sequence[int]) -> None:
        if len(tokens) >= self.n_ctx:
            raise ContextOverflowError(len(tokens), self.n_ctx)


def merge_sampling(defaults: SamplingParams, wishes: SamplingWishes) -> SamplingParams:
    """The model's own values with those that a request gives in their place."""
    given: dict[str, object] = {
        name: value
        for name in SamplingWishes.__dataclass_fields__
        if (value := getattr(wishes, name)) is not None and value != ()
    }
    return replace(defaults, **given)  # type: ignore[arg-type]


def _output_grammar(generation: Generation) -> str | None:
    if generation.json_schema is not None:
        return schema_grammar(generation.json_schema)
    if generation.grammar is not None:
        check_grammar(generation.grammar)
    return generation.grammar


def _specs(request: ChatRequest) -> tuple[ToolSpec, ...]:
    return tuple(
        ToolSpec(tool.name, tool.description, tool.parameters, tool.strict)
        for tool in request.tools
    )


def _with_system(messages: list[Message], text: str) -> list[Message]:
    if messages and messages[0].role in ("system", "developer"):
        first = messages[0]
        return [replace(first, content=f"{first.content}\n\n{text}"), *messages[1:]]
    return [Message("system", text), *messages]


def _check_size(n_chars: int) -> None:
    if n_chars > MAX_PROMPT_CHARS:
        raise UsageError(
            f"the prompt has {n_chars} characters",
            why=f"no more than {MAX_PROMPT_CHARS} are accepted",
        )
