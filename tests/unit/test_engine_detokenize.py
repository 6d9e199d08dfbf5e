"""Bytes to text: any split of the bytes gives the same text, and nothing from a stop string on."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from llmrun.engine.detokenize import IncrementalText, StopMatcher


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def join(pieces: list[bytes]) -> str:
    text = IncrementalText()
    return "".join([*map(text.feed, pieces), text.flush()])


cuts = st.lists(st.integers(0, 200), max_size=12)


@given(st.text(), cuts)
def test_text_in_any_split_equals_the_whole(text: str, cuts: list[int]) -> None:
    assert (
        join(split(text.encode("utf-8", "replace"), cuts))
        == text.encode("utf-8", "replace").decode()
    )


@given(st.binary(max_size=60), cuts)
def test_bytes_that_are_no_text_in_any_split_equal_the_whole(data: bytes, cuts: list[int]) -> None:
    assert join(split(data, cuts)) == data.decode("utf-8", "replace")


def test_a_character_waits_until_it_is_whole() -> None:
    text = IncrementalText()
    assert [text.feed(bytes([byte])) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]


def test_a_half_character_at_the_end_is_shown_as_one_replacement() -> None:
    text = IncrementalText()
    assert text.feed("€".encode()[:2]) == ""
    assert text.flush() == "�"


def match(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    """What is emitted, and the stop that was met."""
    matcher = StopMatcher(stops)
    emitted = ""
    for piece in pieces:
        text, stop = matcher.feed(piece)
        emitted += text
        if stop is not None:
            return emitted, stop
    return emitted + matcher.flush(), None


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By the definition, for stops of one length: the earliest one."""
    found = [(text.find(stop), stop) for stop in stops if stop and stop in text]
    if not found:
        return text, None
    index = min(index for index, _ in found)
    return text[:index], min(stop for at, stop in found if at == index)


letters = st.text(alphabet="ab", max_size=24)


@given(letters, st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3), cuts)
def test_what_is_emitted_is_the_text_before_a_stop(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    pieces = [piece.decode() for piece in split(text.encode(), cuts)]
    emitted, stop = match(stops, pieces)
    assert text.startswith(emitted)
    if stop is None:
        assert emitted == text
        assert not any(s in text for s in stops)
    else:
        assert text.startswith(emitted + stop)
        assert not any(s in emitted for s in stops)


@st.composite
def stops_of_one_length(draw: st.DrawFn) -> list[str]:
    n = draw(st.integers(1, 5))
    return draw(st.lists(st.text(alphabet="ab", min_size=n, max_size=n), min_size=1, max_size=3))


@given(letters, stops_of_one_length(), cuts)
def test_the_first_stop_is_found_wherever_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    pieces = [piece.decode() for piece in split(text.encode(), cuts)]
    assert match(stops, pieces) == first_stop(text, stops)


@given(letters, st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_no_more_is_held_back_than_could_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    emitted = ""
    for end in range(1, len(text) + 1):
        piece, stop = matcher.feed(text[end - 1])
        emitted += piece
        if stop is not None:
            return
        held = text[len(emitted) : end]
        assert not held or any(s.startswith(held) for s in stops)


def test_a_stop_across_pieces_and_a_false_start() -> None:
    matcher = StopMatcher(["</answer>"])
    assert matcher.feed("x</ans") == ("x", None)
    assert matcher.feed("a</answ") == ("</ansa", None)
    assert matcher.feed("er>rest") == ("", "</answer>")


def test_the_longer_of_two_stops_at_one_place_is_reported() -> None:
    assert match(["ab", "abc"], ["xabcy"]) == ("x", "abc")


def test_empty_stops_are_none() -> None:
    assert match(["", ""], ["abc"]) == ("abc", None)
