"""The server's routes. Each reads a body, asks the service, and answers in its dialect's words.

What may not pass (keys, hosts, sizes, times) has been turned away before it comes here: `limits`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from llmrun.server import (
    wire_anthropic,
    wire_completions,
    wire_embeddings,
    wire_extras,
    wire_ollama,
    wire_openai,
    wire_responses,
)
from llmrun.server.failures import as_api_error
from llmrun.server.metrics import CONTENT_TYPE
from llmrun.server.service import Service, Wire, read_body
from llmrun.server.streaming import (
    StreamedAnswer,
    error_answer,
    json_answer,
    long_json_answer,
)
from llmrun.server.types import ApiError, ErrorAnswer, ErrorKind

Handler = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")

OPENAI_CHAT = Wire(
    wire_openai.parse_chat,
    wire_openai.encode_chat,
    wire_openai.ChatEncoder,
    wire_openai.ChatEncoder.media_type,
    wire_openai.encode_error,
)
OPENAI_TEXT = Wire(
    wire_completions.parse_completion,
    wire_completions.encode_completion,
    wire_completions.CompletionEncoder,
    wire_completions.CompletionEncoder.media_type,
    wire_openai.encode_error,
)
OPENAI_RESPONSES = Wire(
    wire_responses.parse_response,
    wire_responses.encode_response,
    wire_responses.ResponseEncoder,
    wire_responses.ResponseEncoder.media_type,
    wire_openai.encode_error,
)
ANTHROPIC = Wire(
    wire_anthropic.parse_messages,
    wire_anthropic.encode_message,
    wire_anthropic.MessageEncoder,
    wire_anthropic.MessageEncoder.media_type,
    wire_anthropic.encode_error,
)
OLLAMA_CHAT = Wire(
    wire_ollama.parse_chat,
    wire_ollama.encode_chat,
    wire_ollama.ChatEncoder,
    wire_ollama.ChatEncoder.media_type,
    wire_ollama.encode_error,
)
OLLAMA_GENERATE = Wire(
    wire_ollama.parse_generate,
    wire_ollama.encode_generate,
    wire_ollama.GenerateEncoder,
    wire_ollama.GenerateEncoder.media_type,
    wire_ollama.encode_error,
    lambda request: request.work,
)

_KIND_OF_STATUS: Mapping[int, ErrorKind] = {404: "not_found", 405: "method_not_allowed"}
_GONE_STATUS = 499
"""What the log says of a client that went away; nobody is sent it."""


def encode_error_for(scope: Scope, error: ApiError) -> ErrorAnswer:
    """`error` in the dialect of the path that was asked for."""
    path = str(scope.get("path", ""))
    if path.startswith("/api/"):
        return wire_ollama.encode_error(error)
    if path.startswith("/v1/messages"):
        return wire_anthropic.encode_error(error)
    return wire_openai.encode_error(error)


def build_app(service: Service, *, ui: Mapping[str, Handler] | None = None) -> FastAPI:
    """The application. `ui`: further pages for people by path, such as the web chat at `/`."""
    app = FastAPI(
        title="llmrun",
        version=service.version,
        docs_url=None,  # both pages of the framework load their scripts from elsewhere
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    _add_errors(app, service)
    _add_openai(app, service)
    _add_anthropic(app, service)
    _add_ollama(app, service)
    _add_extras(app, service)
    for path, handler in (ui or {}).items():
        app.add_api_route(path, handler, methods=["GET", "HEAD"], include_in_schema=False)
    return app


# ---- routes


def _post(
    app: FastAPI,
    service: Service,
    paths: tuple[str, ...],
    handler: Handler,
    schema: Mapping[str, Any],
    words: str,
    tag: str,
) -> None:
    """A route whose body is JSON of `schema`. The handler reads it itself: each dialect has errors
    of its own shape."""
    body = {"required": True, "content": {"application/json": {"schema": dict(schema)}}}

    async def run(http: Request) -> Response:
        return await _answer(service, http, paths[0], handler)

    for path in paths:
        app.add_api_route(
            path,
            run,
            methods=["POST"],
            summary=words,
            tags=[tag],
            operation_id=path.strip("/").replace("/", "_"),
            openapi_extra={"requestBody": body},
            response_model=None,
        )


def _get(app: FastAPI, service: Service, path: str, handler: Handler, words: str, tag: str) -> None:
    async def run(http: Request) -> Response:
        return await _answer(service, http, path, handler)

    # Some clients ask with HEAD whether a server is there.
    app.add_api_route(path, run, methods=["HEAD"], include_in_schema=False, response_model=None)
    app.add_api_route(
        path,
        run,
        methods=["GET"],
        summary=words,
        tags=[tag],
        operation_id="get_" + path.strip("/").replace("/", "_"),
        response_model=None,
    )


async def _answer(service: Service, http: Request, path: str, handler: Handler) -> Response:
    """The handler's answer, or its failure in the dialect's words; both are counted, a stream at
    its end."""

    def end(status: int, failure: Exception | None) -> None:
        if failure is not None:
            service.report(failure)
        service.metrics.count_request(path, status or _GONE_STATUS)

    try:
        answer = await handler(http)
    except ClientDisconnect:
        answer = Response(status_code=_GONE_STATUS)
    except Exception as error:  # noqa: BLE001 - told to the client, in its dialect
        answer = error_answer(encode_error_for(http.scope, as_api_error(error)))
        end(answer.status_code, error)
        return answer
    if isinstance(answer, StreamedAnswer):
        answer.on_end = end
    else:
        end(answer.status_code, None)
    return answer


def _add_errors(app: FastAPI, service: Service) -> None:
    async def http_error(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = _KIND_OF_STATUS.get(error.status_code, "invalid_request")
        what = f"{http.method} {http.url.path}" if kind == "not_found" else str(error.detail)
        message = f"there is no {what}; see /docs" if kind == "not_found" else what
        answer = error_answer(encode_error_for(http.scope, ApiError(kind, message)))
        answer.headers.update(error.headers or {})  # which methods there are
        return answer

    async def defect(http: Request, error: Exception) -> Response:
        service.report(error)
        return error_answer(encode_error_for(http.scope, as_api_error(error)))

    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, defect)


def _add_openai(app: FastAPI, service: Service) -> None:
    tag = "OpenAI"

    async def chat(http: Request) -> Response:
        return await service.answer(http, OPENAI_CHAT)

    async def completion(http: Request) -> Response:
        return await service.answer(http, OPENAI_TEXT)

    async def response(http: Request) -> Response:
        return await service.answer(http, OPENAI_RESPONSES)

    async def embeddings(http: Request) -> Response:
        request = await read_body(http, wire_embeddings.parse_embeddings)
        found = await service.embed(http, request)
        return await long_json_answer(
            wire_embeddings.encode_embeddings(request, found.model, found.values, found.n_tokens)
        )

    async def models(http: Request) -> Response:
        cards = service.host.cards()
        if "anthropic-version" in http.headers:
            return json_answer(wire_anthropic.encode_models(cards))
        return json_answer(wire_openai.encode_models(cards))

    async def model(http: Request) -> Response:
        card = await service.host.find(http.path_params["name"])
        if "anthropic-version" in http.headers:
            return json_answer(wire_anthropic.encode_model(card))
        return json_answer(wire_openai.encode_model(card))

    _post(app, service, ("/v1/chat/completions",), chat, wire_openai.SCHEMA_CHAT,
          "Reply to messages", tag)  # fmt: skip
    _post(app, service, ("/v1/completions",), completion, wire_completions.SCHEMA_COMPLETION,
          "Continue text", tag)  # fmt: skip
    _post(app, service, ("/v1/responses",), response, wire_responses.SCHEMA_RESPONSE,
          "Reply to input (nothing is stored)", tag)  # fmt: skip
    _post(app, service, ("/v1/embeddings",), embeddings, wire_embeddings.SCHEMA_EMBEDDINGS,
          "Turn texts into vectors", tag)  # fmt: skip
    _get(app, service, "/v1/models", models, "The models that can be asked for", tag)
    _get(app, service, "/v1/models/{name:path}", model, "One model", tag)


def _add_anthropic(app: FastAPI, service: Service) -> None:
    tag = "Anthropic"

    async def messages(http: Request) -> Response:
        return await service.answer(http, ANTHROPIC)

    async def count(http: Request) -> Response:
        request = await read_body(http, wire_anthropic.parse_count_tokens)
        return json_answer(wire_anthropic.encode_count(await service.count_tokens(http, request)))

    _post(app, service, ("/v1/messages",), messages, wire_anthropic.SCHEMA_MESSAGES,
          "Reply to messages", tag)  # fmt: skip
    _post(app, service, ("/v1/messages/count_tokens",), count, wire_anthropic.SCHEMA_COUNT,
          "Count the tokens of messages", tag)  # fmt: skip


def _add_ollama(app: FastAPI, service: Service) -> None:
    tag = "Ollama"

    async def chat(http: Request) -> Response:
        request = await read_body(http, wire_ollama.parse_chat)
        action = wire_ollama.action_of(request)
        if action != "reply":
            return await idle(request, action, wire_ollama.encode_idle_chat)
        return await service.answer_request(http, OLLAMA_CHAT, request)

    async def generate(http: Request) -> Response:
        request = await read_body(http, wire_ollama.parse_generate)
        action = wire_ollama.action_of(request)
        if action != "reply":
            return await idle(request, action, wire_ollama.encode_idle_generate)
        return await service.answer_request(http, OLLAMA_GENERATE, request)

    async def idle(request: Any, action: Any, encode: Callable[..., Mapping[str, Any]]) -> Response:
        generation = request.generation
        if action == "load":
            await service.load(generation.model, generation.keep_alive_s)
        elif not await service.host.unload(generation.model):
            action = "load"  # a pinned one, which stays: the dialect's other word is the true one
        return json_answer(encode(service.context(generation.model), action))

    async def embed(http: Request) -> Response:
        request = await read_body(http, wire_ollama.parse_embed)
        found = await service.embed(http, request)
        return await long_json_answer(
            wire_ollama.encode_embed(
                found.model, found.values, found.n_tokens,
                total_s=found.total_s, load_s=found.load_s,
            )
        )  # fmt: skip

    async def embedding(http: Request) -> Response:
        request = await read_body(http, wire_ollama.parse_embedding)
        return json_answer(
            wire_ollama.encode_embedding((await service.embed(http, request)).values)
        )

    async def show(http: Request) -> Response:
        name = await read_body(http, wire_ollama.parse_show)
        return json_answer(wire_ollama.encode_show(await service.host.find(name)))

    async def tags(http: Request) -> Response:
        return json_answer(wire_ollama.encode_tags(service.host.cards()))

    async def ps(http: Request) -> Response:
        return json_answer(wire_ollama.encode_ps(service.host.loaded()))

    async def version(http: Request) -> Response:
        return json_answer(wire_ollama.encode_version(service.version))

    _post(app, service, ("/api/chat",), chat, wire_ollama.SCHEMA_CHAT, "Reply to messages", tag)
    _post(app, service, ("/api/generate",), generate, wire_ollama.SCHEMA_GENERATE,
          "Reply to a prompt", tag)  # fmt: skip
    _post(app, service, ("/api/embed",), embed, wire_ollama.SCHEMA_EMBED,
          "Turn texts into vectors", tag)  # fmt: skip
    _post(app, service, ("/api/embeddings",), embedding, wire_ollama.SCHEMA_EMBEDDING,
          "Turn a text into a vector (older)", tag)  # fmt: skip
    _post(app, service, ("/api/show",), show, wire_ollama.SCHEMA_SHOW, "Show a model", tag)
    _get(app, service, "/api/tags", tags, "The models that are here", tag)
    _get(app, service, "/api/ps", ps, "The models that are loaded", tag)
    _get(app, service, "/api/version", version, "The version", tag)


def _add_extras(app: FastAPI, service: Service) -> None:
    tag = "llmrun"

    async def rank(http: Request) -> Response:
        request = await read_body(http, wire_extras.parse_rerank)
        found = await service.rerank(http, request)
        return json_answer(
            wire_extras.encode_rerank(request, found.model, found.values, found.n_tokens)
        )

    async def tokenize(http: Request) -> Response:
        request = await read_body(http, wire_extras.parse_tokenize)
        return await long_json_answer(await service.tokenize(http, request))

    async def detokenize(http: Request) -> Response:
        request = await read_body(http, wire_extras.parse_detokenize)
        return json_answer(await service.detokenize(http, request))

    async def health(http: Request) -> Response:
        return service.health()

    async def metrics(http: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    _post(app, service, ("/rerank", "/v1/rerank"), rank, wire_extras.SCHEMA_RERANK,
          "Order documents by how well they answer a query", tag)  # fmt: skip
    _post(app, service, ("/tokenize",), tokenize, wire_extras.SCHEMA_TOKENIZE,
          "Turn text into tokens", tag)  # fmt: skip
    _post(app, service, ("/detokenize",), detokenize, wire_extras.SCHEMA_DETOKENIZE,
          "Turn tokens into text", tag)  # fmt: skip
    _get(app, service, "/health", health, "Is the server loading, ready or draining?", tag)
    _get(app, service, "/metrics", metrics, "Counters in Prometheus' format", tag)
