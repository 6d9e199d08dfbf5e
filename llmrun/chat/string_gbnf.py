"""Strings of JSON schemas as GBNF: patterns, formats and lengths together, and texts to choose
from, all by automata, so that llama.cpp has one way through each."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Literal

from llmrun.chat.automaton import Automaton, Work, automaton, trie
from llmrun.chat.grammar_writer import GrammarWriter, json_chars, literal, plain_chars
from llmrun.chat.regex_syntax import (
    ALL,
    Anchor,
    Chars,
    Node,
    PatternError,
    PatternTooLargeError,
    Repeat,
    Sequence,
    UnreadablePatternError,
    any_text,
    parse_regex,
    text_node,
)

Style = Literal["json", "gemma"]

_END = r'"\""'
_START, _STOP = Anchor(is_start=True), Anchor(is_start=False)
_DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{3})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_UUID = "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"
_FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    **dict.fromkeys(["uuid", *(f"uuid{version}" for version in range(1, 6))], _UUID),
}
_GEMMA_KEY = "^[a-zA-Z_][a-zA-Z0-9_]*$"
_MAX_KEY_CHARS = 20_000
# Fewer are read more easily one by one.
_N_LISTED = 16


def string_body(
    writer: GrammarWriter, pattern: object, form: object, low: int, high: int | None
) -> str | None:
    """A JSON string that matches the schema's pattern and its format, of `low` to `high`
    characters; None where neither can be told: a pattern that is not regular, a format of no known
    shape.

    Where the pattern takes too many states together with the lengths, these are left out. Raises
    PatternError for one that takes too many by itself, and where no string fits.
    """
    pattern = pattern if isinstance(pattern, str) else None
    shape = _FORMATS.get(form) if isinstance(form, str) else None
    if pattern is None and shape is None:
        return None
    return writer.once(
        ("string", pattern, shape, low, high),
        lambda: _matching(writer, pattern, shape, low, high),
    )


def _matching(
    writer: GrammarWriter, pattern: str | None, shape: str | None, low: int, high: int | None
) -> str | None:
    trees = [] if shape is None else [parse_regex(shape)]
    if pattern is not None:
        with suppress(UnreadablePatternError):
            trees.append(parse_regex(pattern))
    if not trees:
        return None
    found = _of_length(trees, low, high, writer.work)
    if found is None:
        raise PatternError(
            f"no string matches {str(pattern or shape)[:80]!r} and what is beside it"
        )
    return f'"\\"" {writer.add_automaton(found, json_chars, _END)}'


def texts_body(writer: GrammarWriter, texts: Iterable[str]) -> str:
    """One of these texts, as they are spelled."""
    listed = list(dict.fromkeys(texts))
    if len(listed) > _N_LISTED and all(listed):
        return writer.add_automaton(trie(listed), plain_chars, "")
    bodies = list(map(literal, listed))
    return bodies[0] if len(bodies) == 1 else f"({' | '.join(bodies)})"


def other_key_body(writer: GrammarWriter, style: Style, names: Collection[str]) -> str | None:
    """The name of a member that is none of `names`; None where these are too many."""
    if sum(map(len, names)) > _MAX_KEY_CHARS:
        return None
    return writer.once(("key", style, tuple(names)), lambda: _other_key(writer, style, names))


def _other_key(writer: GrammarWriter, style: Style, names: Collection[str]) -> str | None:
    known = [Sequence((_START, text_node(name), _STOP)) for name in names]
    try:
        if style == "gemma":
            found = automaton([parse_regex(_GEMMA_KEY)], known, writer.work)
        else:
            found = automaton([any_text()], known, writer.work)
    except PatternTooLargeError:
        return None
    if found is None:
        return None
    if style == "gemma":
        return writer.add_automaton(found, plain_chars, "")
    return f'"\\"" {writer.add_automaton(found, json_chars, _END)}'


def _of_length(trees: list[Node], low: int, high: int | None, work: Work) -> Automaton | None:
    if low or high is not None:
        length = Sequence((_START, Repeat(Chars(ALL), low, high), _STOP))
        with suppress(PatternTooLargeError):
            return automaton([*trees, length], work=work)
    return automaton(trees, work=work)
