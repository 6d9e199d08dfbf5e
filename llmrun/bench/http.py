"""Measuring any server that speaks the OpenAI protocol (vLLM, TGI, Ollama, llama-server, llmrun)
as its clients see it: time to the first token, gaps between tokens, tokens a second by streams."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from llmrun.bench.http_client import (
    CHAT,
    COMPLETIONS,
    NO_SUCH_ENDPOINT,
    Server,
    ServerClient,
    TimeLimits,
    check_api_key,
    clean_base,
)
from llmrun.bench.runner import percentile
from llmrun.bench.sse import EventReader, StreamedError, WrongStreamError
from llmrun.bench.types import Measure, Unit
from llmrun.errors import LlmrunError

Endpoint = Literal["chat", "completions"]

_PATHS: Mapping[Endpoint, str] = {"chat": CHAT, "completions": COMPLETIONS}
# A prompt is read; these few tokens show that the answer streams.
_N_FIRST_TOKENS = 8
_N_TRY = 4
_N_SHORT = 8

# What servers accept differs; the first that one takes is kept. `ignore_eos` makes vLLM and
# llama-server generate to the end, as llmrun's own bench does; newer OpenAI models refuse
# `max_tokens` and any temperature.
_DIALECTS: tuple[Mapping[str, object], ...] = (
    {"stream_options": {"include_usage": True}, "temperature": 0, "ignore_eos": True},
    {"stream_options": {"include_usage": True}, "temperature": 0},
    {"stream_options": {"include_usage": True}, "max_completion_tokens": True},
    {"temperature": 0},
)
_NOT_THIS_DIALECT = (400, 422)


# Short everyday words: one token each in nearly every vocabulary.
_TEXT = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government
number night point home water room mother area money story fact month lot right study book
eye job word business issue side kind head house service friend father power hour game line
end member law car city name team minute idea body back parent face others level office door
"""
_WORDS = tuple(_TEXT.split())


def make_plain_prompt(number: int, n_tokens: int) -> str:
    """About `n_tokens` tokens of words; the same number gives the same words. They say nothing:
    how fast a model reads does not depend on it, and no draft guesses what follows."""
    chosen = random.Random(f"llmrun/{number}")  # noqa: S311 - not a secret
    return " ".join(chosen.choices(_WORDS, k=max(1, n_tokens)))


@dataclass(frozen=True, slots=True)
class UrlWorkload:
    """`make_prompt(number, n_tokens)` gives a text of about `n_tokens` tokens; texts of different
    numbers share no beginning, so that no server's prefix cache helps where it should not."""

    make_prompt: Callable[[int, int], str] = make_plain_prompt
    n_prompt: int = 512
    n_generate: int = 128
    n_streams: tuple[int, ...] = (1, 4, 8)
    n_stream_prompt: int = 32
    n_stream_tokens: int = 64
    n_repeats: int = 3


def measure_url(
    base: str,
    workload: UrlWorkload | None = None,
    *,
    model: str | None = None,
    api_key: str | None = None,
    endpoint: Endpoint | Literal["auto"] = "auto",
    limits: TimeLimits | None = None,
    on_measure: Callable[[Measure], None] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Measure, ...]:
    """Run the workload against the server at `base`.

    Gives `ttft_cold`, `ttft_warm` (the same prompt again), `pp<n>` (prompt tokens a second until
    the first token; only where the server counts them), `tg<n>`, `itl_p50`, `itl_p95`, `itl_p99`
    (between pieces that arrive) and `streams<n>` (all tokens of n requests at once, from the first
    request to the last token). `on_measure` gets each as soon as it is complete, so that an
    interruption loses little; `on_progress` gets a name, the requests done and all of them.

    Raises UsageError for an address or key that cannot be, AuthError, NotFoundError for a model
    that is not there, ServerUnreachableError, ServerError. Not for use inside an event loop.
    """
    client = ServerClient(clean_base(base), check_api_key(api_key), limits or TimeLimits())
    work = workload or UrlWorkload()

    async def measure() -> tuple[Measure, ...]:
        async with client.opened(max(work.n_streams, default=1)):
            server = await client.find(model)
            talk = await _Talk.begin(client, server.model, endpoint, work)
            return await _Run(talk, work, on_measure, on_progress).measure()

    return asyncio.run(measure())


def find_server(
    base: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    limits: TimeLimits | None = None,
) -> Server:
    """Ask the server at `base` what it offers, and choose `model` or the only one. Raises as
    `measure_url`."""
    client = ServerClient(clean_base(base), check_api_key(api_key), limits or TimeLimits())

    async def find() -> Server:
        async with client.opened(1):
            return await client.find(model)

    return asyncio.run(find())


@dataclass(frozen=True, slots=True)
class _Reply:
    """`at` are the clock's seconds at which pieces of text came, one at least. `n_tokens` as the
    server counts them (`is_counted`), else the pieces."""

    started: float
    at: tuple[float, ...]
    n_tokens: int
    n_prompt: int | None
    is_counted: bool

    @property
    def ttft_s(self) -> float:
        return self.at[0] - self.started

    @property
    def tok_s(self) -> float | None:
        """Of all tokens but the first; None when it cannot be said."""
        took = self.at[-1] - self.at[0]
        return (self.n_tokens - 1) / took if self.n_tokens > 1 and took > 0 else None

    @property
    def gaps_ms(self) -> list[float]:
        return [(b - a) * 1000 for a, b in itertools.pairwise(self.at)]


class _RefusedError(Exception):
    """A bad status; `error` is what a user would see of it."""

    def __init__(self, status: int, error: LlmrunError) -> None:
        super().__init__(status)
        self.status = status
        self.error = error


@dataclass(frozen=True, slots=True)
class _Talk:
    """How this server wants to be asked."""

    client: ServerClient
    model: str
    endpoint: Endpoint
    dialect: Mapping[str, object]

    @classmethod
    async def begin(
        cls,
        client: ServerClient,
        model: str,
        endpoint: Endpoint | Literal["auto"],
        workload: UrlWorkload,
    ) -> _Talk:
        """Find the endpoint and the dialect by a short request, which also loads the model."""
        endpoints: tuple[Endpoint, ...] = tuple(_PATHS) if endpoint == "auto" else (endpoint,)
        refusals: list[_RefusedError] = []
        for each in endpoints:
            for dialect in _DIALECTS:
                talk = cls(client, model, each, dialect)
                try:
                    await talk.ask(workload.make_prompt(0, _N_SHORT), _N_TRY)
                except _RefusedError as refused:
                    refusals.append(refused)
                    if refused.status in NO_SUCH_ENDPOINT:
                        break
                    if refused.status not in _NOT_THIS_DIALECT:
                        raise refused.error from None
                else:
                    return talk
        # What one endpoint has against the request says more than that another is missing.
        told = [refused for refused in refusals if refused.status not in NO_SUCH_ENDPOINT]
        raise (told or refusals)[0].error

    async def ask(self, prompt: str, n_tokens: int) -> _Reply:
        """One streamed request. Raises _RefusedError, ServerUnreachableError, ServerError."""
        body = self._body(prompt, n_tokens)
        at: list[float] = []
        n_tokens_said = n_prompt = None
        is_whole = False
        reader = EventReader()
        path = _PATHS[self.endpoint]
        async with self.client.request("POST", path, body) as (response, started):
            if response.status_code != 200:
                error = await self.client.read_refusal(response)
                raise _RefusedError(response.status_code, error)
            try:
                async for events in self.client.read_events(response, reader):
                    now = time.perf_counter()
                    for event in events:
                        if event.text:
                            at.append(now)
                        n_tokens_said = event.n_tokens or n_tokens_said
                        n_prompt = event.n_prompt or n_prompt
                        is_whole = is_whole or event.is_last
                    # No model gives several pieces a token for long.
                    if len(at) > 100 * n_tokens + 1000:
                        raise WrongStreamError("it does not stop at the tokens asked for")
            except WrongStreamError as error:
                raise self.client.misunderstood(str(error)) from None
            except StreamedError as error:
                raise self.client.broken(error.args[0]) from None
        if not is_whole:
            raise self.client.broken("it ended early")
        if not at:
            raise self.client.misunderstood("its answer has no text")
        return _Reply(started, tuple(at), n_tokens_said or len(at), n_prompt, bool(n_tokens_said))

    def _body(self, prompt: str, n_tokens: int) -> dict[str, object]:
        body: dict[str, object] = {"model": self.model, "stream": True, **self.dialect}
        limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        body[limit] = n_tokens
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        return body

    async def ask_or_fail(self, prompt: str, n_tokens: int) -> _Reply:
        try:
            return await self.ask(prompt, n_tokens)
        except _RefusedError as refused:
            raise refused.error from None


class _Run:
    """The workload against one server."""

    def __init__(
        self,
        talk: _Talk,
        workload: UrlWorkload,
        on_measure: Callable[[Measure], None] | None,
        on_progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self._talk = talk
        self._workload = workload
        self._on_measure = on_measure
        self._on_progress = on_progress
        self._found: list[Measure] = []
        self._number = itertools.count(1)
        self._n_done = 0
        self._n_all = workload.n_repeats * (3 + sum(workload.n_streams))

    async def measure(self) -> tuple[Measure, ...]:
        await self._measure_single()
        for n_streams in self._workload.n_streams:
            await self._measure_streams(n_streams)
        return tuple(self._found)

    async def _measure_single(self) -> None:
        work = self._workload
        cold: list[_Reply] = []
        warm: list[_Reply] = []
        long: list[_Reply] = []
        for _ in range(work.n_repeats):
            prompt = self._prompt(work.n_prompt)
            cold.append(await self._ask("time to first token", prompt, _N_FIRST_TOKENS))
            warm.append(await self._ask("time to first token", prompt, _N_FIRST_TOKENS))
            long.append(await self._ask("generation", self._prompt(_N_SHORT), work.n_generate))
        if all(reply.at[0] == reply.at[-1] and reply.n_tokens > 4 for reply in long):
            raise self._talk.client.misunderstood("it does not stream: all text comes at once")
        read = self._parameters(cold, prompt=work.n_prompt)
        wrote = self._parameters(long, tokens=work.n_generate)
        prompts = [reply.n_prompt / reply.ttft_s for reply in cold if reply.n_prompt]
        speeds = [reply.tok_s for reply in long if reply.tok_s is not None]
        gaps = [sorted(reply.gaps_ms) for reply in long if reply.tok_s is not None]
        self._keep(f"pp{work.n_prompt}", "tok/s", prompts, True, "prompt", read)
        self._keep(f"tg{work.n_generate}", "tok/s", speeds, True, "generation", wrote)
        self._keep("ttft_cold", "s", [reply.ttft_s for reply in cold], False, "latency", read)
        self._keep("ttft_warm", "s", [reply.ttft_s for reply in warm], False, "latency", read)
        for name, part in (("itl_p50", 0.5), ("itl_p95", 0.95), ("itl_p99", 0.99)):
            values = [percentile(some, part) for some in gaps]
            self._keep(name, "ms", values, False, "latency", wrote)

    async def _measure_streams(self, n_streams: int) -> None:
        work = self._workload
        name = f"{n_streams} streams" if n_streams > 1 else "1 stream"
        # The connections are opened before the clock runs.
        await self._ask_together([self._prompt(_N_SHORT) for _ in range(n_streams)], 1, None)
        totals = []
        replies: list[_Reply] = []
        for _ in range(work.n_repeats):
            prompts = [self._prompt(work.n_stream_prompt) for _ in range(n_streams)]
            together = await self._ask_together(prompts, work.n_stream_tokens, name)
            took = max(reply.at[-1] for reply in together) - min(r.started for r in together)
            totals.append(sum(reply.n_tokens for reply in together) / max(took, 1e-9))
            replies += together
        how = self._parameters(
            replies, n_streams=n_streams, prompt=work.n_stream_prompt, tokens=work.n_stream_tokens
        )
        self._keep(f"streams{n_streams}", "tok/s", totals, True, "streams", how)

    async def _ask_together(
        self, prompts: Sequence[str], n_tokens: int, name: str | None
    ) -> Sequence[_Reply]:
        """All at once; when one fails the others are given up."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._ask(name, p, n_tokens)) for p in prompts]
        except* LlmrunError as errors:
            raise next(_leaves(errors)) from None
        return [task.result() for task in tasks]

    async def _ask(self, name: str | None, prompt: str, n_tokens: int) -> _Reply:
        reply = await self._talk.ask_or_fail(prompt, n_tokens)
        if name is not None:
            self._n_done += 1
            if self._on_progress is not None:
                self._on_progress(name, self._n_done, self._n_all)
        return reply

    def _prompt(self, n_tokens: int) -> str:
        return self._workload.make_prompt(next(self._number), n_tokens)

    def _parameters(
        self, replies: Sequence[_Reply], **more: int
    ) -> dict[str, str | int | float | bool]:
        """How it was measured; what came differs from what was asked for where a model stops."""
        found: dict[str, str | int | float | bool] = {**more, "endpoint": self._talk.endpoint}
        found["tokens_got"] = round(median(reply.n_tokens for reply in replies))
        prompts = [reply.n_prompt for reply in replies if reply.n_prompt]
        if prompts:
            found["prompt_got"] = round(median(prompts))
        found["counted"] = "server" if all(reply.is_counted for reply in replies) else "pieces"
        return found

    def _keep(
        self,
        name: str,
        unit: Unit,
        values: Sequence[float],
        higher_is_better: bool,
        group: str,
        parameters: Mapping[str, str | int | float | bool],
    ) -> None:
        if not values:
            return
        measure = Measure(name, unit, tuple(values), higher_is_better, group, parameters)
        self._found.append(measure)
        if self._on_measure is not None:
            self._on_measure(measure)


def _leaves(group: BaseExceptionGroup[LlmrunError]) -> Iterator[LlmrunError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


__all__ = [
    "Endpoint",
    "Server",
    "TimeLimits",
    "UrlWorkload",
    "check_api_key",
    "clean_base",
    "find_server",
    "make_plain_prompt",
    "measure_url",
]
