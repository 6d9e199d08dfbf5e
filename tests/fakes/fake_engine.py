"""An engine without a model: it says what the test scripted, by the engine's rules.

    engine = FakeEngine(["Hello!", "Bye."])
    session = ChatSession(engine, template=…)

Each request takes the next answer; the last one is repeated when they run out. An answer is

- a `str`: the text that the model "generates". It is tokenized with specials, so "<|im_end|>" in it
  is the control token: hidden unless the request has `show_special`, and an end token ends it;
- an exception: raised by the first `next()`;
- a sequence of both: an exception in it is raised once when its place is reached, and the stream
  goes on behind it. `("Hel", KeyboardInterrupt(), "lo")` is a Ctrl-C in mid-answer;
- a callable that takes the Request and returns one of these.

`max_tokens`, stop strings, `n_ctx`, `cancel()`, the usage counts and the reuse of the longest
common prefix behave like the real engine's. Timings are constants. Log probabilities are
-0.25 for the token taken and -1, -2, … for those of the next higher numbers.

Nothing happens until an event is asked for, so there is always one to be taken: `take()` gives one
and calls the listener at once for the next.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence

from llmrun.engine.types import (
    EngineCounters,
    Event,
    FinishEvent,
    FinishReason,
    ModelFacts,
    PromptEvent,
    Request,
    SavedPrefix,
    TextEvent,
    Timings,
    TokenLogprob,
    Usage,
)
from llmrun.errors import ContextOverflowError, EngineError, UsageError
from tests.fakes.fake_tokenizer import FakeTokenizer

Answer = str | BaseException | Sequence["str | BaseException"]
Script = Answer | Callable[[Request], Answer]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TIMINGS = Timings(ttft_s=0.05, prompt_tok_s=500.0, decode_tok_s=50.0, total_s=1.0)
FAKE_SEED = 1234


def fake_facts(chat_template: str | None = CHATML, **changes: object) -> ModelFacts:
    values: dict[str, object] = {
        "description": "fake 1B Q4_0",
        "n_params": 1_000_000_000,
        "n_bytes": 600_000_000,
        "n_ctx_train": 8192,
        "n_embd": 64,
        "n_layers": 2,
        "n_vocab": 260,
        "n_swa": 0,
        "is_recurrent": False,
        "is_hybrid": False,
        "chat_template": chat_template,
        "bos_text": "<s>",
        "eos_text": "</s>",
    }
    return ModelFacts(**{**values, **changes})  # type: ignore[arg-type]


class FakeEngine:
    """Implements `engine.types.EngineLike`. `requests` holds all that was submitted.

    `chunk` is the number of tokens in one TextEvent.
    """

    def __init__(
        self,
        answers: Sequence[Script] = ("Hello!",),
        *,
        chunk: int = 1,
        n_ctx: int = 4096,
        tokenizer: FakeTokenizer | None = None,
        facts: ModelFacts | None = None,
    ) -> None:
        self.answers = list(answers)
        self.chunk = chunk
        self.requests: list[Request] = []
        self.closed = False
        self.streams: list[FakeStream] = []
        self._n_ctx = n_ctx
        self._tokenizer = tokenizer or FakeTokenizer()
        self._facts = facts or fake_facts()
        self._cached: tuple[int, ...] = ()

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    @property
    def tokenizer(self) -> FakeTokenizer:
        return self._tokenizer

    @property
    def n_ctx(self) -> int:
        return self._n_ctx

    @property
    def load_s(self) -> float:
        return 0.25

    @property
    def counters(self) -> EngineCounters:
        return EngineCounters(
            n_ctx=self._n_ctx,
            n_seq_max=1,
            n_running=sum(not stream.finished for stream in self.streams),
            n_cells=len(self._cached),
            n_requests=len(self.requests),
            n_prompt=sum(len(request.prompt) for request in self.requests),
            n_cached=sum(stream._n_cached for stream in self.streams),
            n_completion=sum(stream.n_sampled for stream in self.streams),
        )

    def prompt_text(self, index: int = -1) -> str:
        """The prompt of a request as text, special tokens spelled out."""
        pieces = (self._tokenizer.piece(token) for token in self.requests[index].prompt)
        return b"".join(pieces).decode("utf-8", "replace")

    def submit(self, request: Request) -> FakeStream:
        if self.closed:
            raise EngineError("the engine is closed")
        if not request.prompt:
            raise UsageError("the prompt is empty")
        if len(request.prompt) > self._n_ctx:
            raise ContextOverflowError(len(request.prompt), self._n_ctx)
        script = self.answers[min(len(self.requests), len(self.answers) - 1)]
        answer = script(request) if callable(script) else script
        self.requests.append(request)
        n_cached = 0
        for ours, theirs in zip(self._cached, request.prompt[:-1], strict=False):
            if ours != theirs:
                break
            n_cached += 1
        stream = FakeStream(self, request, answer, n_cached)
        self.streams.append(stream)
        return stream

    @property
    def state_key(self) -> str:
        return "fake"

    def save_prefix(self, tokens: Sequence[int], max_bytes: int) -> SavedPrefix | None:
        held = self._cached[:-1]  # the last sampled token is never decoded
        state = repr(held).encode()
        return SavedPrefix(held, state) if held and len(state) <= max_bytes else None

    def restore_prefix(self, saved: SavedPrefix) -> int:
        if bytes(saved.state) != repr(saved.tokens).encode():
            return 0
        self._cached = saved.tokens
        return len(saved.tokens)

    def close(self) -> None:
        self.closed = True


class FakeStream:
    """Implements `engine.types.StreamLike`. `cancelled` says whether `cancel()` was called."""

    def __init__(self, engine: FakeEngine, request: Request, answer: Answer, n_cached: int) -> None:
        self.cancelled = False
        self.finished = False
        self._engine = engine
        self._request = request
        self._n_cached = n_cached
        self.n_sampled = 0
        self._listener: Callable[[], None] | None = None
        parts = [answer] if isinstance(answer, str | BaseException) else list(answer)
        self._steps: list[int | BaseException] = []
        for part in parts:
            if isinstance(part, str):
                self._steps += engine.tokenizer.tokenize(
                    part, add_special=False, parse_special=True
                )
            else:
                self._steps.append(part)
        # A generator dies with the first exception raised through it, so failures travel as values.
        self._events = self._run()

    def __iter__(self) -> FakeStream:
        return self

    def __next__(self) -> Event:
        event = next(self._events)
        if isinstance(event, BaseException):
            raise event
        return event

    def cancel(self) -> None:
        self.cancelled = True

    def listen(self, listener: Callable[[], None]) -> None:
        self._listener = listener
        if not self.finished:
            listener()

    def take(self) -> list[Event]:
        if self.finished:
            return []
        event = next(self)
        if self._listener is not None and not self.finished:
            self._listener()
        return [event]

    def _run(self) -> Iterator[Event | BaseException]:
        request, tokenizer = self._request, self._engine.tokenizer
        n_prompt = len(request.prompt)
        yield PromptEvent(n_prompt, n_prompt)
        room = self._engine.n_ctx - n_prompt + 1
        limit = room if request.max_tokens is None else min(room, request.max_tokens)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, sent = "", 0
        sampled: list[int] = []
        waiting: list[int] = []
        reason: FinishReason = "stop"
        stop: str | None = None
        for step in self._steps:
            if isinstance(step, BaseException):
                yield step
                continue
            if self.cancelled:
                reason = "cancelled"
                break
            if len(sampled) >= limit:
                reason = "length"
                break
            if tokenizer.is_eog(step) and not request.ignore_eog:
                break
            sampled.append(step)
            self.n_sampled += 1
            waiting.append(step)
            if request.show_special or not tokenizer.is_control(step):
                text += decoder.decode(tokenizer.piece(step))
            stop = next((s for s in request.stop if s in text), None)
            if stop is not None:
                text = text[: text.index(stop)]
                break
            ready = len(text) - _n_held(text, request.stop)
            if len(waiting) >= self._engine.chunk and ready > sent:
                yield self._text_event(text[sent:ready], waiting)
                sent, waiting = ready, []
        if self.cancelled:
            reason = "cancelled"
        if len(text) > sent:
            yield self._text_event(text[sent:], waiting)
        self._engine._cached = request.prompt + tuple(sampled)
        self.finished = True
        usage = Usage(n_prompt, len(sampled), self._n_cached)
        seed = request.sampling.seed
        times = tuple(0.05 + 0.02 * i for i in range(len(sampled))) if request.with_times else ()
        yield FinishEvent(reason, usage, TIMINGS, FAKE_SEED if seed is None else seed, stop, times)

    def _text_event(self, text: str, tokens: Sequence[int]) -> TextEvent:
        n_top, tokenizer = self._request.n_logprobs, self._engine.tokenizer
        if n_top is None:
            return TextEvent(text, tuple(tokens))
        logprobs = []
        for token in tokens:
            likely = [(token, -0.25)]
            likely += [((token + i) % tokenizer.n_vocab, -float(i)) for i in range(1, n_top)]
            top = tuple((other, tokenizer.piece(other), chance) for other, chance in likely[:n_top])
            logprobs.append(TokenLogprob(token, tokenizer.piece(token), -0.25, top))
        return TextEvent(text, tuple(tokens), tuple(logprobs))


def _n_held(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of `text` that could be the start of a stop string."""
    longest = max((len(stop) - 1 for stop in stops), default=0)
    for n in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return n
    return 0
