"""Reranking and tokens: what is taken, what is refused, and the order of results."""

from __future__ import annotations

import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.server.types import ApiError, RerankRequest
from llmrun.server.wire_extras import (
    MAX_DOCUMENTS,
    MAX_TOKENS,
    SCHEMA_DETOKENIZE,
    SCHEMA_RERANK,
    SCHEMA_TOKENIZE,
    DetokenizeRequest,
    TokenizeRequest,
    encode_detokenize,
    encode_rerank,
    encode_tokenize,
    parse_detokenize,
    parse_rerank,
    parse_tokenize,
)
from tests.fakes.any_json import ANY_JSON, bodies

# ---- rerank


def test_documents_are_texts_or_objects_with_a_text() -> None:
    body = {"model": "m", "query": "q", "documents": ["a", {"text": "b", "title": "t"}]}
    assert parse_rerank(body) == RerankRequest("m", "q", ("a", "b"))


@pytest.mark.parametrize(("top_n", "meaning"), [(None, None), (0, None), (2, 2), (99, 99)])
def test_top_n(top_n: int | None, meaning: int | None) -> None:
    request = parse_rerank({"query": "q", "documents": ["a"], "top_n": top_n})
    assert request.top_n == meaning


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (None, None),
        ({"documents": ["a"]}, "query"),
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": ["q"], "documents": ["a"]}, "query"),
        ({"query": "q"}, "documents"),
        ({"query": "q", "documents": []}, "documents"),
        ({"query": "q", "documents": "a"}, "documents"),
        ({"query": "q", "documents": ["a", 3]}, "documents[1]"),
        ({"query": "q", "documents": [{"body": "a"}]}, "documents[0].text"),
        ({"query": "q", "documents": ["a"] * (MAX_DOCUMENTS + 1)}, "documents"),
        ({"query": "q", "documents": ["a"], "top_n": -1}, "top_n"),
        ({"query": "q", "documents": ["a"], "top_n": "1"}, "top_n"),
        ({"query": "q", "documents": ["a"], "return_documents": "yes"}, "return_documents"),
    ],
)
def test_what_rerank_refuses(body: object, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        parse_rerank(body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_the_best_document_comes_first() -> None:
    request = RerankRequest("m", "q", ("a", "b", "c"), top_n=2, return_documents=True)
    assert encode_rerank(request, "shown", [-1.5, 3.0, 0.25], 12) == {
        "model": "shown",
        "object": "list",
        "usage": {"prompt_tokens": 12, "total_tokens": 12},
        "results": [
            {"index": 1, "relevance_score": 3.0, "document": {"text": "b"}},
            {"index": 2, "relevance_score": 0.25, "document": {"text": "c"}},
        ],
    }


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    st.none() | st.integers(1, 25),
)
def test_results_are_sorted_and_each_document_comes_once(
    scores: list[float], top_n: int | None
) -> None:
    request = RerankRequest("m", "q", tuple("d" * len(scores)), top_n=top_n)
    body = encode_rerank(request, "m", scores, 0)
    found = [(r["index"], r["relevance_score"]) for r in body["results"]]  # type: ignore
    assert len(found) == min(len(scores), top_n or len(scores))
    assert all(scores[index] == score for index, score in found)
    assert found == sorted(enumerate(scores), key=lambda pair: (-pair[1], pair[0]))[: len(found)]
    assert "document" not in body["results"][0]  # type: ignore


# ---- tokens


def test_tokenize_defaults_are_those_of_llama_server() -> None:
    assert parse_tokenize({"content": "hi"}) == TokenizeRequest("", "hi", False, True, False)
    assert parse_tokenize({"content": ""}).content == ""
    body = {
        "model": "m",
        "content": "hi",
        "add_special": True,
        "parse_special": False,
        "with_pieces": True,
    }
    assert parse_tokenize(body) == TokenizeRequest("m", "hi", True, False, True)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ("hi", None),
        ({}, "content"),
        ({"content": ["a"]}, "content"),
        ({"content": "a", "add_special": 1}, "add_special"),
        ({"content": "a", "with_pieces": "no"}, "with_pieces"),
    ],
)
def test_what_tokenize_refuses(body: object, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        parse_tokenize(body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_pieces_are_text_or_the_bytes_of_a_part_of_a_character() -> None:
    euro = "€".encode()
    plain, wanting = TokenizeRequest("", "x"), TokenizeRequest("", "x", with_pieces=True)
    assert b"".join(encode_tokenize(plain, [1, 2])) == b'{"tokens":[1,2]}'
    assert b"".join(encode_tokenize(plain, [])) == b'{"tokens":[]}'
    found = b"".join(encode_tokenize(wanting, [5, 6, 7], [b"a", euro[:2], euro[2:]]))
    assert json.loads(found) == {
        "tokens": [
            {"id": 5, "piece": "a"},
            {"id": 6, "piece": [0xE2, 0x82]},
            {"id": 7, "piece": [0xAC]},
        ]
    }


@pytest.mark.parametrize("with_pieces", [False, True])
def test_many_tokens_are_encoded_in_pieces(with_pieces: bool) -> None:
    request = TokenizeRequest("", "x", with_pieces=with_pieces)
    tokens = list(range(5001))
    pieces = list(encode_tokenize(request, tokens, [b"a"] * len(tokens)))
    assert len(pieces) > 3
    found = json.loads(b"".join(pieces))["tokens"]
    assert found == ([{"id": i, "piece": "a"} for i in tokens] if with_pieces else tokens)


def test_detokenize() -> None:
    assert parse_detokenize({"tokens": [0, 5]}) == DetokenizeRequest("", (0, 5))
    assert parse_detokenize({"tokens": [], "model": "m"}) == DetokenizeRequest("m", ())
    assert encode_detokenize("text") == {"content": "text"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "tokens"),
        ({"tokens": 3}, "tokens"),
        ({"tokens": [1, -1]}, "tokens[1]"),
        ({"tokens": [2**31]}, "tokens[0]"),
        ({"tokens": [True]}, "tokens[0]"),
        ({"tokens": [1.5]}, "tokens[0]"),
        ({"tokens": [1] * (MAX_TOKENS + 1)}, "tokens"),
    ],
)
def test_what_detokenize_refuses(body: object, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        parse_detokenize(body)
    assert (caught.value.status, caught.value.param) == (400, param)


# ---- all


@given(
    ANY_JSON
    | bodies(["model", "query", "documents", "text", "top_n", "tokens", "content", "with_pieces"])
)
def test_any_json_is_a_request_or_an_api_error(body: object) -> None:
    for parse in (parse_rerank, parse_tokenize, parse_detokenize):
        try:
            parse(body)
        except ApiError as error:
            assert error.kind == "invalid_request"


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (SCHEMA_RERANK, {"query": "q", "documents": ["a", {"text": "b"}], "top_n": 1}),
        (SCHEMA_TOKENIZE, {"content": "a", "with_pieces": True}),
        (SCHEMA_DETOKENIZE, {"tokens": [1, 2]}),
    ],
)
def test_the_schemas_are_true(schema: dict[str, object], body: object) -> None:
    check = jsonschema.Draft202012Validator(json.loads(json.dumps(schema)))
    check.check_schema(schema)
    check.validate(body)
    with pytest.raises(jsonschema.ValidationError):
        check.validate({})
