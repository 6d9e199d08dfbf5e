"""Grammars under which llama.cpp would have to follow ever more ways at once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmrun.chat.schema_grammar import schema_grammar
from llmrun.chat.tool_formats import HERMES, LFM2, QWEN_CODER, ToolSpec
from llmrun.chat.tool_grammar import tool_grammar
from llmrun.engine.gbnf import Grammar, UnusableGrammarError, read_gbnf
from llmrun.engine.grammar import MAX_STACKS, check_grammar
from llmrun.errors import UsageError

NODE = {"$ref": "#/$defs/node"}


def recursive(*ways: object) -> dict[str, Any]:
    return {**NODE, "$defs": {"node": {"anyOf": list(ways)}}}


def named(n: int, **more: object) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {f"key_{i}": {"type": "null"} for i in range(n)},
        **more,
    }


def members(required: str, **properties: object) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


# ---- llama.cpp's own way of following a grammar, to compare with


def n_stacks(grammar: Grammar, text: str) -> list[int]:
    """How many stacks llama.cpp has before each character of `text` and behind it, besides the
    empty one of a text that may end."""
    rules = grammar.rules

    def advance(stacks: set[tuple[tuple[int, ...], ...]]) -> set[tuple[tuple[int, ...], ...]]:
        # A stack is made of what is left of each alternative, the next one last.
        waiting, seen, found = list(stacks), set(stacks), set()
        while waiting:
            stack = waiting.pop()
            if not stack or stack[-1][0] >= 0:
                found.add(stack)
                continue
            left = stack[-1]
            below = stack[:-1] + ((left[1:],) if left[1:] else ())
            for symbols in rules[~left[0]]:
                each = below + ((tuple(symbols),) if symbols else ())
                if each not in seen:
                    seen.add(each)
                    waiting.append(each)
            assert len(seen) < 2000
        return found

    stacks = advance({((~0,),)})
    counts = [len(stacks - {()})]
    for char in text:
        after = set()
        for stack in stacks:
            if stack and any(a <= ord(char) <= b for a, b in grammar.classes[stack[-1][0]]):
                left = stack[-1][1:]
                after.add(stack[:-1] + ((left,) if left else ()))
        stacks = advance(after)
        counts.append(len(stacks - {()}))
    return counts


SYMBOLS = st.sampled_from(["a", '"x"', '"y"', "[xy]", "[^x]", '"xy"', "b", "c", ""])
BODIES = st.lists(
    st.builds(
        lambda parts, times: " ".join(f"({part}){times}" if part else '""' for part in parts),
        st.lists(SYMBOLS, min_size=1, max_size=3),
        st.sampled_from(["", "", "", "?", "{0,3}", "{2}"]),
    ),
    min_size=1, max_size=3,
).map(" | ".join)  # fmt: skip


@settings(deadline=None, max_examples=300)
@example(("(b)?", '("x")? ("x")? ("x")?', "(a) | (a) (a)", "(a)"), "")
@given(bodies=st.tuples(BODIES, BODIES, BODIES, BODIES), text=st.text("xyz", max_size=14))
def test_a_grammar_that_is_taken_never_has_more_stacks(bodies, text):
    root, a, b, c = bodies
    grammar = f"root ::= {root}\na ::= {a}\nb ::= {b}\nc ::= {c}\n"
    with pytest.MonkeyPatch.context() as patch:
        # Few, so that small grammars come to the bound.
        patch.setattr("llmrun.engine.grammar.MAX_STACKS", 5)
        patch.setattr("llmrun.engine.grammar._MANY", 2)
        try:
            check_grammar(grammar)
        except UnusableGrammarError:
            return
    assert max(n_stacks(read_gbnf(grammar), text)) <= 5


EXPLODING = {
    "brackets": 'root ::= "[" root "]" | "[" root "]" | "0"',
    "late difference": 'root ::= "[" root "]" | "[" root "}" | "0"',
    "through another rule": 'root ::= "(" a | "(" a "x" | "0"\na ::= root ")"',
    "three optional lots": "root ::= " + '("a"?){0,300} ' * 3,
    "beginnings": "root ::= r0\n"
    + "".join(f'r{i} ::= r{i + 1} "a" | r{i + 1} "b"\n' for i in range(40))
    + 'r40 ::= "c"',
    "itself": "root ::= a\na ::= b\nb ::= a | [x]",
    "itself behind nothing": 'root ::= b root "x" | "y"\nb ::= c c\nc ::= "x"?',
    "growing": 'root ::= "[" root "]" | "[" any "]" | "0"\nany ::= "[" any "]" | "0"',
}


@pytest.mark.parametrize("grammar", EXPLODING.values(), ids=EXPLODING.keys())
def test_a_grammar_of_ever_more_ways_is_refused(grammar):
    with pytest.raises(UnusableGrammarError) as caught:
        check_grammar(grammar)
    assert caught.value.why


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= ws ws "x" ws\nws ::= [ \\t\\n]*',
        "root ::= (a b?)*\na ::= \"x\" | \"xx\"\nb ::= \"x\"*",
        'root ::= "[" (root ("," root)*)? "]" | [0-9]+ | "\\"" ([^"\\\\] | "\\\\" ["\\\\n])* "\\""',
        "root ::= (line \"\\n\")+\nline ::= [^\\n]{1,2000} # a line",
        "root ::= <think> [^x]* !<[12]> . .",
        "not gbnf at all (", "root ::= missing", "",
    ],
)  # fmt: skip
def test_other_grammars_are_taken(grammar):
    check_grammar(grammar)


def test_what_is_written_out_is_bounded():
    for grammar in (
        'root ::= "' + "a" * 300 + '"{2000}',
        'root ::= (("a" "b"{0,900}){0,900} "c"){0,900}',
        "root ::= " + "(" * 500 + '"a"' + ")" * 500,
        'root ::= "a"{99999999999}',
        'root ::= "a"{2001}',
    ):
        with pytest.raises(UnusableGrammarError):
            check_grammar(grammar)


# ---- schemas

AMBIGUOUS = {
    "arrays of another length": recursive(
        {"type": "array", "items": NODE}, {"type": "array", "items": NODE, "minItems": 1},
        {"type": "null"},
    ),
    "told apart at the end": recursive(
        members("of kind", of=NODE, kind={"const": "a"}),
        members("of kind", of=NODE, kind={"const": "b"}),
        {"type": "null"},
    ),
    "three at a time": recursive(
        *(members("x", x={"type": "array", "items": NODE, "maxItems": n}) for n in range(3, 6)),
        {"type": "number"},
    ),
    "too many members": named(2000),
    "too many choices": {"anyOf": [members("k", k={"const": i}) for i in range(1000)]},
    "itself": recursive(NODE, {"anyOf": [{"anyOf": [NODE, {"type": "null"}]}, {"type": "string"}]}),
}  # fmt: skip


@pytest.mark.parametrize("schema", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_an_ambiguous_schema_is_refused(schema):
    with pytest.raises(UsageError) as caught:
        schema_grammar(json.dumps(schema))
    assert "grammar" in caught.value.message and caught.value.why


@pytest.mark.parametrize("fmt", [HERMES, QWEN_CODER, LFM2], ids=lambda fmt: fmt.name)
def test_an_ambiguous_tool_is_refused(fmt):
    node = AMBIGUOUS["arrays of another length"]["$defs"]
    tool = ToolSpec("t", "", {"properties": {"a": NODE}, "required": ["a"], "$defs": node})
    with pytest.raises(UsageError, match="ambiguous"):
        tool_grammar(fmt, [tool])


DEEP: dict[str, Any] = {"type": "string"}
for _ in range(14):
    DEEP = {"type": "array", "items": DEEP, "minItems": 1}
USUAL = {
    "expressions": recursive(
        *(members("op x y", op={"const": op}, x=NODE, y=NODE) for op in ("add", "sub", "mul")),
        members("op value", op={"const": "number"}, value={"type": "number"}),
    ),
    "trees": recursive(members("", left=NODE, right=NODE, v={"type": "integer"}), {"type": "null"}),
    "the same twice": recursive(
        {"type": "array", "items": NODE}, {"type": "array", "items": NODE}, {"type": "null"}
    ),
    "or any object": recursive(members("", child=NODE), {"type": "object"}),
    "with others": recursive(
        {**members("name", name={"type": "string"}, child=NODE), "additionalProperties": True}
    ),
    "many members": named(300),
    "many choices": {"anyOf": [members("k", k={"const": i}) for i in range(MAX_STACKS // 2)]},
    "a long list": {"enum": [f"a common beginning {i}" for i in range(3000)]},
    "long arrays": {"type": "array", "items": {"type": ["integer", "number"]}, "maxItems": 1000},
    "long strings": {"type": "string", "minLength": 9, "maxLength": 999},
    "numbers": recursive(
        {"type": "array", "items": NODE},
        *({"type": "number", "minimum": -9.5 - i, "maximum": 99.25} for i in range(9)),
    ),
    "deep": DEEP,
}  # fmt: skip


@pytest.mark.parametrize("schema", USUAL.values(), ids=USUAL.keys())
def test_usual_schemas_are_taken(schema):
    assert schema_grammar(json.dumps(schema))


def test_many_tools_are_taken():
    tools = [ToolSpec(f"tool_{i}", "", named(12)) for i in range(128)]
    for fmt in (HERMES, QWEN_CODER, LFM2):
        assert tool_grammar(fmt, tools)


def test_a_schema_that_unites_itself_over_and_over_is_refused():
    """Each level doubles what is written, in a schema that grows by a line."""
    levels: dict[str, Any] = {
        f"d{i}": {
            "type": "object",
            "anyOf": [{"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {}]} for _ in range(9)],
        }
        for i in range(30)
    }
    schema = {"$ref": "#/$defs/d0", "$defs": {**levels, "d30": {"type": "null"}}}
    with pytest.raises(UsageError, match="too large"):
        schema_grammar(json.dumps(schema))


def test_a_text_that_is_used_often_is_written_once():
    """By reference, or by being said again."""
    leaf = {"type": "string", "pattern": "^[a-z]{1,200}$"}
    listed = {"enum": ["x" * 5000, "y" * 5000]}
    properties: dict[str, Any] = {f"p{i}": {"$ref": f"#/$defs/{'ab'[i % 2]}"} for i in range(100)}
    properties |= {f"q{i}": dict(leaf) for i in range(100)}
    schema = {"properties": properties, "$defs": {"a": leaf, "b": listed}}
    assert len(schema_grammar(json.dumps(schema))) < 40_000
