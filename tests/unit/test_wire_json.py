"""JSON on the wire: valid, compact, on one line for every kind of client."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.server.wire_json import quote, to_json, to_json_pieces

ANY_TEXT = st.text(st.characters(exclude_categories=()))


@settings(deadline=None)
@given(ANY_TEXT)
def test_text_comes_back_and_fits_on_one_line(text: str) -> None:
    encoded = to_json(text)
    whole = "".join("\ufffd" if 0xD800 <= ord(c) <= 0xDFFF else c for c in text)
    assert json.loads(encoded) == whole
    assert len(encoded.decode().splitlines()) == 1


@pytest.mark.parametrize("end", ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_nothing_in_a_string_ends_a_line(end: str) -> None:
    assert quote(f"é{end}\\{end}").splitlines() == [quote(f"é{end}\\{end}")]
    assert json.loads(quote({f"é{end}": [f"\\{end}"]})) == {f"é{end}": [f"\\{end}"]}


def test_lone_surrogates_are_replaced() -> None:
    assert to_json(["a\ud800b", "😀"]) == '["a\ufffdb","😀"]'.encode()


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError):
        quote({"logprob": float("nan")})


@pytest.mark.parametrize("body", [{}, {"a": 1, "b": "é"}])
@pytest.mark.parametrize("items", [[], ["x"], [1, [2], None]])
def test_an_array_in_pieces_is_the_array(body: dict[str, object], items: list[object]) -> None:
    pieces = list(to_json_pieces(body, "c", map(to_json, items)))
    assert len(pieces) == 2 + len(items)
    assert b"".join(pieces) == to_json({**body, "c": items})
