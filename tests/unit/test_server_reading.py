"""Reading JSON of strangers: what is refused, and that no body takes long to refuse."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.server.reading import Fields, arguments_object, read_json
from llmrun.server.types import ApiError

_SCALARS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=20)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
)


@given(_VALUES)
def test_what_is_json_comes_out_as_it_went_in(value: object) -> None:
    assert read_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_depth_is_counted_outside_of_strings_only(opening: bytes) -> None:
    levels = opening.count(b"[") + opening.count(b"{")
    closing = bytes(reversed(opening)).replace(b"[", b"]").replace(b"{", b"}")
    closing = bytes(byte for byte in closing if byte in b"]}")
    n = 64 // levels
    read_json(opening * n + b"0" + closing * n)
    with pytest.raises(ApiError, match="levels deep"):
        read_json(opening * (n + 1) + b"0" + closing * (n + 1))
    assert read_json(b'"' + b"[" * 1000 + b'"') == "[" * 1000
    assert read_json(b'["\\"[[[[", "\\\\"]', max_depth=1) == ['"[[[[', "\\"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nan",
        b"NaN",
        b"[Infinity]",
        b"1e999",
        b"9" * 5000,
        b'"\xff"',
        b"{'a': 1}",
        b'{"a": 1} x',
        b"[" * 100_000,
        b"[}" * 100,
        b'"' * 3_000_000,
        b"[" + b"[]," * 500_000 + b"[]]",
        b"[" + b"1," * 2_100_000 + b"1]",
    ],
)
def test_what_is_none_or_too_much_is_an_error(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        read_json(body)
    assert caught.value.status == 400


def test_strings_that_never_end_are_looked_at_once() -> None:
    """Each of these would keep a pattern that tries again at every quote busy for hours."""
    for body in (b'"\\' * 900_000 + b"a" * 5_000_000, b'"' + b"\\\\" * 5_000_000, b'"\\' * 999_999):
        with pytest.raises(ApiError):
            read_json(body)


def test_halves_of_surrogate_pairs_become_a_replacement() -> None:
    assert read_json(rb'"\ud800"') == "\ufffd"
    assert read_json(rb'"\ud83d\ude00"') == "\U0001f600"
    assert read_json(rb'"\\ud800"') == "\\ud800"
    assert read_json(rb'{"\udc00\ud83d\ude00": 1}') == {"\ufffd\U0001f600": 1}


def test_fields_name_the_member_at_fault() -> None:
    fields = Fields(read_json(b'{"a": {"b": [1, {"c": true}]}}'))
    inner = fields.object("a")
    assert inner is not None
    with pytest.raises(ApiError, match=r"a\.b\[0\] must be an object") as caught:
        inner.objects("b", max_items=9)
    assert caught.value.param == "a.b[0]"
    with pytest.raises(ApiError, match="must be a number"):
        Fields({"x": True}).number("x", low=0, high=2)
    assert Fields({"x": 5.0}).integer("x", low=0, high=9) == 5
    assert Fields({"x": None}).integer("x", 7, low=0, high=9) == 7


def test_arguments_that_are_no_object_stay_whole() -> None:
    assert arguments_object('{"a": 1}') == {"a": 1}
    assert arguments_object("") == {}
    assert arguments_object("[1]") == {"raw": [1]}
    assert arguments_object('{"a": NaN}') == {"raw": '{"a": NaN}'}
