"""What the server does for a request, whatever its dialect: find the model, wait for a place, run
it, put the answer into the dialect's words."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from llmrun.engine.types import EngineCounters, Tokenizer
from llmrun.errors import EngineStoppedError, LlmrunError
from llmrun.server.background import run_in_thread
from llmrun.server.embeddings import Hold, embed, rerank
from llmrun.server.generate import Batch, generate
from llmrun.server.host import ModelHost, Opened, Role
from llmrun.server.lifecycle import ServerState
from llmrun.server.metrics import Metrics
from llmrun.server.prompts import ChatModel, Job
from llmrun.server.reading import read_json
from llmrun.server.replies import ReplyCollector
from llmrun.server.streaming import StreamedAnswer, json_answer, while_connected
from llmrun.server.tokens import detokenize, tokenize
from llmrun.server.types import (
    AnswerContext,
    ApiError,
    ChatRequest,
    EmbeddingRequest,
    ErrorAnswer,
    Finished,
    Reply,
    RerankRequest,
    StreamEncoder,
    TextRequest,
)
from llmrun.server.wire_extras import DetokenizeRequest, TokenizeRequest
from llmrun.text import escape_line

_log = logging.getLogger("llmrun.server")

# Reading a body of this size takes the event loop a millisecond or so; larger ones go elsewhere.
_LARGE_BODY_BYTES = 64 * 1024

R = TypeVar("R")


def _itself(request: Any) -> Any:
    return request


@dataclass(frozen=True, slots=True)
class Wire(Generic[R]):
    """A dialect's way to ask for text: its module's functions."""

    parse: Callable[[object], R]
    encode: Callable[[AnswerContext, R, Sequence[Reply]], Mapping[str, Any]]
    encoder: Callable[[AnswerContext, R], StreamEncoder]
    media_type: str
    encode_error: Callable[[ApiError], ErrorAnswer]
    work: Callable[[R], ChatRequest | TextRequest] = _itself


@dataclass(frozen=True, slots=True)
class Values:
    """What came of a model that reads only: a vector or a score for each input. `load_s` is a part
    of `total_s`."""

    model: str
    values: Sequence[Any]
    n_tokens: int
    total_s: float
    load_s: float


class Service:
    """One server: its models and its state."""

    def __init__(
        self,
        host: ModelHost,
        state: ServerState,
        *,
        version: str,
        takes_grammars: bool = True,
        now: Callable[[], float] = time.time,
    ) -> None:
        """`takes_grammars`: a request may bring GBNF of its own."""
        self.host = host
        self.state = state
        self.version = version
        self._takes_grammars = takes_grammars
        self.metrics = Metrics(self.engine_counters, lambda: state.n_active)
        self.now = now
        self._models: weakref.WeakKeyDictionary[Opened, ChatModel] = weakref.WeakKeyDictionary()

    # ---- text

    async def answer(self, http: Request, wire: Wire[R]) -> Response:
        """Parse, generate, encode. Raises ApiError and LlmrunError for what fails before anything
        is sent."""
        return await self.answer_request(http, wire, await read_body(http, wire.parse))

    async def answer_request(self, http: Request, wire: Wire[R], request: R) -> Response:
        """`answer` for a request that has been parsed."""
        work = wire.work(request)
        if work.generation.grammar is not None and not self._takes_grammars:
            # An ambiguous one makes llama.cpp follow so many ways at once that a step never ends.
            raise ApiError(
                "invalid_request",
                "grammars are not taken here; use a JSON schema, or start the server with "
                "--allow-grammar",
                param="grammar",
            )
        context = self.context(work.generation.model)
        batches = self._batches(work)
        if work.generation.stream:
            return StreamedAnswer(
                batches, wire.encoder(context, request), wire.media_type, wire.encode_error
            )
        replies = await while_connected(http.receive, _collect(batches))
        return json_answer(wire.encode(context, request, replies))

    async def _batches(self, request: ChatRequest | TextRequest) -> AsyncGenerator[Batch, None]:
        generation = request.generation
        async with self._use(generation.model, "chat", generation.keep_alive_s) as (opened, load_s):
            model = self.chat_model(opened)
            async with opened.admission.enter(_n_replies(request)):
                jobs = await asyncio.to_thread(_prepare, model, request)
                for job in jobs:
                    job.reader.load_s = load_s
                async with contextlib.aclosing(generate(model, jobs)) as batches:
                    async for batch in batches:
                        self._count(opened, batch)
                        yield batch

    @contextlib.asynccontextmanager
    async def _use(
        self, name: str, role: Role, keep_alive_s: float | None = None
    ) -> AsyncIterator[tuple[Opened, float]]:
        """The loaded model, and how long it took to come. Raises ApiError."""
        started_s = time.perf_counter()
        async with self.host.use(name, role, keep_alive_s) as opened:
            try:
                yield opened, time.perf_counter() - started_s
            except EngineStoppedError as error:
                self._give_up(opened, error)
                raise

    def _give_up(self, opened: Opened, error: EngineStoppedError) -> None:
        """Have a broken engine go; all of its requests come here."""
        if opened in self.host.opened():
            name = escape_line(opened.card.name)
            _log.error("%s has to be loaded again: %s", name, error.message, exc_info=error)
        self.host.discard(opened)

    def _count(self, opened: Opened, batch: Batch) -> None:
        for _, event in batch:
            if isinstance(event, Finished):
                self.metrics.count_reply(opened.card.name, event)

    async def count_tokens(self, http: Request, request: ChatRequest) -> int:
        """The tokens of a prompt, which is not run."""

        def work(opened: Opened) -> Callable[[], int]:
            return partial(self.chat_model(opened).count_chat, request)

        counting = self._read_tokens(request.generation.model, "chat", work)
        return await while_connected(http.receive, counting)

    def chat_model(self, opened: Opened) -> ChatModel:
        """The loaded model with its template, made once."""
        model = self._models.get(opened)
        if model is None:
            assert opened.engine is not None
            model = ChatModel(
                opened.engine,
                opened.sampling,
                n_ctx=opened.n_ctx,
                max_tokens=opened.max_tokens,
                stop=opened.stop,
            )
            self._models[opened] = model
            weakref.finalize(opened, model.close)
        return model

    def context(self, name: str) -> AnswerContext:
        """What an answer to a request for the model `name` says of itself."""
        if not name:
            names = [card.name for card in self.host.cards()]
            name = names[0] if len(names) == 1 else ""
        return AnswerContext(secrets.token_hex(12), self.now(), name)

    async def load(self, name: str, keep_alive_s: float | None) -> None:
        """Load a model that is to reply soon."""
        async with self._use(name, "chat", keep_alive_s):
            pass

    # ---- vectors and scores

    async def embed(self, http: Request, request: EmbeddingRequest) -> Values:
        """A vector for each input."""
        return await while_connected(http.receive, self._embed(request))

    async def _embed(self, request: EmbeddingRequest) -> Values:
        started_s = time.perf_counter()
        name, keep_s = request.model, request.keep_alive_s
        async with self._use(name, "embed", keep_s) as (opened, load_s):
            assert opened.embedder is not None
            vectors: list[list[float]] = []
            n_tokens = 0
            if request.inputs:  # without any, only the model is wanted
                async with opened.admission.enter():
                    found = await _run_held(partial(embed, opened.embedder, request))
                    vectors, n_tokens = found
        return Values(
            self.context(name).model, vectors, n_tokens, time.perf_counter() - started_s, load_s
        )

    async def rerank(self, http: Request, request: RerankRequest) -> Values:
        """A score for each document."""
        return await while_connected(http.receive, self._rerank(request))

    async def _rerank(self, request: RerankRequest) -> Values:
        started_s = time.perf_counter()
        async with self._use(request.model, "rank") as (opened, load_s):
            assert opened.embedder is not None
            async with opened.admission.enter():
                scores, n_tokens = await _run_held(partial(rerank, opened.embedder, request))
        name = self.context(request.model).model
        return Values(name, scores, n_tokens, time.perf_counter() - started_s, load_s)

    # ---- tokens

    async def tokenize(self, http: Request, request: TokenizeRequest) -> Iterator[bytes]:
        """The answer's JSON in pieces: the tokens of a text, with each one's bytes where they are
        wanted."""
        return await self._with_tokenizer(http, request.model, partial(tokenize, request=request))

    async def detokenize(self, http: Request, request: DetokenizeRequest) -> dict[str, object]:
        """The answer's body: the text of tokens. Raises ApiError for one outside of the
        vocabulary."""
        return await self._with_tokenizer(http, request.model, partial(detokenize, request=request))

    async def _with_tokenizer(self, http: Request, name: str, work: Callable[[Tokenizer], R]) -> R:
        """`work` with the model's vocabulary, loaded in whatever role is its own."""

        def prepare(opened: Opened) -> Callable[[], R]:
            model = opened.engine or opened.embedder
            assert model is not None
            return partial(work, model.tokenizer)

        async def find_and_run() -> R:
            card = await self.host.find(name)
            role: Role = "chat" if card.can_chat else "rank" if card.can_rerank else "embed"
            return await self._read_tokens(name, role, prepare)

        return await while_connected(http.receive, find_and_run())

    async def _read_tokens(
        self, name: str, role: Role, prepare: Callable[[Opened], Callable[[], R]]
    ) -> R:
        """Run, in a thread, what `prepare` makes: something that needs the model's vocabulary, but
        no step of the model. It waits for its like only, never for replies, and its threads are
        its own, so that replies do not wait for it either."""
        async with self._use(name, role) as (opened, _), opened.token_admission.enter():
            return await _run_to_end(prepare(opened), "llmrun-tokens")

    # ---- state

    def health(self) -> Response:
        """200 where requests are answered, 503 before and after that."""
        body = {
            "status": self.state.phase,
            "models": [
                {"name": each.card.name, "running": each.n_running, "parallel": each.n_parallel}
                for each in self.host.loaded()
            ],
            "loading": [
                {"name": each.name, "doing": each.doing, "share": round(each.share, 3)}
                for each in self.host.loading()
            ],
        }
        return json_answer(body, 200 if self.state.phase == "ready" else 503)

    def engine_counters(self) -> list[tuple[str, EngineCounters]]:
        """Of each loaded model that generates text."""
        return [
            (opened.card.name, opened.engine.counters)
            for opened in self.host.opened()
            if opened.engine is not None
        ]

    def report(self, error: Exception) -> None:
        """Log a defect; what a client did wrong, or was told to wait for, is none."""
        if not isinstance(error, ApiError | LlmrunError):
            _log.error("a request failed", exc_info=error)


def _n_replies(request: ChatRequest | TextRequest) -> int:
    n_prompts = len(request.prompts) if isinstance(request, TextRequest) else 1
    return n_prompts * request.generation.n


def _prepare(model: ChatModel, request: ChatRequest | TextRequest) -> list[Job]:
    if isinstance(request, ChatRequest):
        return model.prepare_chat(request)
    return model.prepare_text(request)


async def _run_to_end(work: Callable[[], R], name: str) -> R:
    """`work` in a thread of its own. When nobody waits for it any more it still runs to its end,
    and so long its place is taken."""
    running = run_in_thread(work, name)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


async def _run_held(work: Callable[[Hold], R]) -> R:
    """`work` in a thread of its own: those for all share few, and this may take long. What it has
    given to an embedder is taken back when nobody waits for it any more."""
    hold = Hold()
    try:
        return await run_in_thread(lambda: work(hold), "llmrun-embed")
    finally:
        hold.let_go()


async def _collect(batches: AsyncGenerator[Batch, None]) -> list[Reply]:
    collectors: dict[int, ReplyCollector] = {}
    async with contextlib.aclosing(batches):
        async for batch in batches:
            for i, event in batch:
                collectors.setdefault(i, ReplyCollector()).feed(event)
    return [collectors[i].reply() for i in sorted(collectors)]


T = TypeVar("T")


async def read_body(http: Request, parse: Callable[[object], T]) -> T:
    """The request's body as `parse` reads it."""
    body = await http.body()

    def read() -> T:
        return parse(read_json(body))

    if len(body) > _LARGE_BODY_BYTES:
        return await asyncio.to_thread(read)
    return read()
