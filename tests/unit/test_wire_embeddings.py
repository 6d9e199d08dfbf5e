"""OpenAI's embeddings: what is taken, what is refused, and what the real client reads."""

from __future__ import annotations

import base64
import json
import struct

import httpx2
import jsonschema
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.server.types import ApiError, EmbeddingRequest
from llmrun.server.wire_embeddings import (
    MAX_INPUT_TOKENS,
    MAX_INPUTS,
    SCHEMA_EMBEDDINGS,
    encode_embeddings,
    parse_embeddings,
)
from tests.fakes.any_json import ANY_JSON, bodies

VECTORS = [[0.5, -0.25, 0.0], [1.0, 0.125, -1.5]]


def refused(body: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_embeddings(body)
    assert caught.value.kind == "invalid_request"
    return caught.value


@pytest.mark.parametrize(
    ("given_input", "inputs"),
    [
        ("hello", ("hello",)),
        (["a", "b"], ("a", "b")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["a", [3]], ("a", (3,))),
        ([0], ((0,),)),
    ],
)
def test_every_form_of_input(given_input: object, inputs: object) -> None:
    request = parse_embeddings({"model": "m", "input": given_input, "user": "who"})
    assert request == EmbeddingRequest("m", inputs)  # type: ignore[arg-type]


def test_dimensions_and_encoding() -> None:
    body = {"model": "m", "input": "a", "dimensions": 256, "encoding_format": "base64"}
    assert parse_embeddings(body) == EmbeddingRequest("m", ("a",), dimensions=256, base64=True)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], None),
        ({"model": "m"}, "input"),
        ({"model": 3, "input": "a"}, "model"),
        ({"model": "m", "input": ""}, "input"),
        ({"model": "m", "input": []}, "input"),
        ({"model": "m", "input": 7}, "input"),
        ({"model": "m", "input": {"text": "a"}}, "input"),
        ({"model": "m", "input": ["a", ""]}, "input[1]"),
        ({"model": "m", "input": [[1], []]}, "input[1]"),
        ({"model": "m", "input": ["a", 3]}, "input[1]"),
        ({"model": "m", "input": [1, "a"]}, "input[1]"),
        ({"model": "m", "input": [1, -2]}, "input[1]"),
        ({"model": "m", "input": [1, 2**31]}, "input[1]"),
        ({"model": "m", "input": [[1, 2.5]]}, "input[0][1]"),
        ({"model": "m", "input": [[True]]}, "input[0][0]"),
        ({"model": "m", "input": [True]}, "input[0]"),
        ({"model": "m", "input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ({"model": "m", "input": [1] * (MAX_INPUT_TOKENS + 1)}, "input"),
        ({"model": "m", "input": [[1] * (MAX_INPUT_TOKENS // 2 + 1)] * 2}, "input"),
        ({"model": "m", "input": "a", "dimensions": 0}, "dimensions"),
        ({"model": "m", "input": "a", "dimensions": 2**40}, "dimensions"),
        ({"model": "m", "input": "a", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_what_is_refused(body: object, param: str | None) -> None:
    assert refused(body).param == param


@given(ANY_JSON | bodies(["model", "input", "dimensions", "encoding_format"]))
def test_any_json_is_a_request_or_an_api_error(body: object) -> None:
    try:
        assert isinstance(parse_embeddings(body), EmbeddingRequest)
    except ApiError as error:
        assert error.kind == "invalid_request"


def test_the_schema_takes_what_the_parser_takes() -> None:
    check = jsonschema.Draft202012Validator(SCHEMA_EMBEDDINGS)
    check.check_schema(SCHEMA_EMBEDDINGS)
    for value in ("a", ["a"], [1, 2], [[1], [2]]):
        check.validate({"model": "m", "input": value, "encoding_format": "float"})
    with pytest.raises(jsonschema.ValidationError):
        check.validate({"model": "m"})


def client_of(sent: list[dict[str, object]]) -> openai.OpenAI:
    def answer(request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.content)
        sent.append(body)
        parsed = parse_embeddings(body)
        pieces = list(encode_embeddings(parsed, "shown", VECTORS, 9))
        # A vector a piece: what is encoded at once keeps all others waiting.
        assert len(pieces) == 2 + len(VECTORS)
        return httpx2.Response(
            200, content=b"".join(pieces), headers={"content-type": "application/json"}
        )

    transport = httpx2.MockTransport(answer)
    return openai.OpenAI(
        api_key="none", base_url="http://test", http_client=httpx2.Client(transport=transport)
    )


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}])
def test_the_real_client_reads_the_vectors(options: dict[str, str]) -> None:
    sent: list[dict[str, object]] = []
    with client_of(sent) as client:
        answer = client.embeddings.create(model="m", input=["a", "b"], **options)  # type: ignore
    # Without being told otherwise it asks for base64 and turns that into numbers itself.
    assert sent[0]["encoding_format"] == options.get("encoding_format", "base64")
    assert [item.embedding for item in answer.data] == VECTORS
    assert [item.index for item in answer.data] == [0, 1]
    assert (answer.model, answer.object) == ("shown", "list")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (9, 9)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=8))
def test_base64_is_little_endian_floats(vector: list[float]) -> None:
    request = EmbeddingRequest("m", ("a",), base64=True)
    [item] = json.loads(b"".join(encode_embeddings(request, "m", [vector], 1)))["data"]
    raw = base64.b64decode(item["embedding"])
    assert list(struct.unpack(f"<{len(vector)}f", raw)) == vector
