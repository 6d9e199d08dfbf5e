"""How families of models write calls of tools, and which family a chat template belongs to.

The shapes were read off the families' own chat templates. A format only says what the text looks
like: `tool_calls` reads it, `tool_grammar` forces it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llmrun.engine.types import Tokenizer


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A function that the model may call. `parameters` is a JSON schema of an object. `strict`:
    the caller wants arguments that follow the schema in any case."""

    name: str
    description: str = ""
    parameters: Mapping[str, object] = field(default_factory=dict)
    strict: bool = False


def as_template_tools(specs: Sequence[ToolSpec]) -> list[dict[str, object]]:
    """The tools as chat templates expect them: in the shape of OpenAI's API."""
    return [
        {
            "type": "function",
            "function": {
                "name": spec.name,
                "description": spec.description,
                # Templates read these two without asking whether they are there.
                "parameters": {"type": "object", "properties": {}, **spec.parameters},
            },
        }
        for spec in specs
    ]


Syntax = Literal["json", "named", "xml", "pythonic"]
"""`json`: objects that hold name and arguments. `named`: the name, then the arguments as one
object. `xml`: the name, then each argument between tags. `pythonic`: a list of function calls."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The text of calls:

        json      begin [ {"NAME_KEY": name, "ARGUMENTS_KEY": {…}} … ] end
        named     begin  call_start name name_end {…} call_end …  end
        xml       begin  call_start name name_end (argument_start key key_end value argument_end)…
                  call_end …  end
        pythonic  begin [name(key=value, …), …] end

    White space in these texts is what the family itself writes; readers take any.
    `wraps_each`: each call has its own `begin` and `end`; otherwise one pair is around all, and
    `between` stands between two calls. `is_list`: JSON objects stand in square brackets.
    `is_bare`: a call may come without any tag, as the whole answer. `is_fallback`: the template
    does not show tools to the model, so a system text must (see `tool_grammar.tool_prompt`).
    `takes_one`: the family makes one call in an answer at most. `values`: how argument objects are
    spelled. `says_type`: `key_end` tells whether the value is a string (DeepSeek's DSML).
    `thinking_ends`: what ends thinking that was left open.
    """

    name: str
    syntax: Syntax
    begin: str = ""
    end: str = ""
    call_start: str = ""
    name_end: str = ""
    call_end: str = ""
    argument_start: str = ""
    key_end: str = ""
    argument_end: str = ""
    between: str = ""
    name_key: str = "name"
    arguments_key: str = "arguments"
    values: Literal["json", "gemma"] = "json"
    wraps_each: bool = False
    is_list: bool = False
    is_bare: bool = False
    is_fallback: bool = False
    takes_one: bool = False
    says_type: bool = False
    more_openers: tuple[str, ...] = ()
    further_tags: tuple[str, ...] = ()
    thinking_ends: tuple[str, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        """Texts that may be control tokens of the vocabulary, which only show on request: see
        `parsing.needs_special_text`."""
        parts = (
            self.begin, self.end, self.call_start, self.name_end, self.call_end,
            self.argument_start, self.key_end, self.argument_end,
            *self.more_openers, *self.further_tags,
        )  # fmt: skip
        return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


HERMES = ToolFormat(
    "hermes",
    "json",
    begin="<tool_call>\n",
    end="\n</tool_call>",
    between="\n",
    wraps_each=True,
    thinking_ends=("<tool_call>\n{", "<tool_call>{"),
)
"""Qwen 2.5 and 3, Hermes, Granite 4, SmolLM3."""

FALLBACK = ToolFormat(
    "json",
    "json",
    begin="<tool_call>\n",
    end="\n</tool_call>",
    between="\n",
    wraps_each=True,
    is_bare=True,
    is_fallback=True,
    thinking_ends=("<tool_call>\n{", "<tool_call>{"),
)
"""For models that were not taught any syntax. They often leave the tags out."""

QWEN_CODER = ToolFormat(
    "qwen-coder",
    "xml",
    begin="<tool_call>\n",
    call_start="<function=",
    name_end=">\n",
    argument_start="<parameter=",
    key_end=">\n",
    argument_end="\n</parameter>\n",
    call_end="</function>",
    end="\n</tool_call>",
    between="\n",
    wraps_each=True,
    thinking_ends=("<tool_call>\n<function=", "<tool_call><function=", "<tool_call>\n{"),
)
"""Qwen3-Coder, Qwen 3.5 and later, Nemotron 3."""

SEED = ToolFormat(
    "seed",
    "xml",
    begin="<seed:tool_call>\n",
    call_start="<function=",
    name_end=">\n",
    argument_start="<parameter=",
    key_end=">",
    argument_end="</parameter>\n",
    call_end="</function>",
    end="\n</seed:tool_call>",
    between="\n",
    wraps_each=True,
    thinking_ends=("<seed:tool_call>",),
)

GLM = ToolFormat(
    "glm",
    "xml",
    call_start="<tool_call>",
    argument_start="<arg_key>",
    key_end="</arg_key><arg_value>",
    argument_end="</arg_value>",
    call_end="</tool_call>",
    thinking_ends=("<tool_call>",),
)
"""GLM 4.6 and later, Ling 3. (4.6 writes the parts on lines of their own.)"""

MINIMAX = ToolFormat(
    "minimax",
    "xml",
    begin="<minimax:tool_call>\n",
    call_start='<invoke name="',
    name_end='">\n',
    argument_start='<parameter name="',
    key_end='">',
    argument_end="</parameter>\n",
    call_end="</invoke>\n",
    end="</minimax:tool_call>",
    thinking_ends=("<minimax:tool_call>",),
)


def _dsml(block: str) -> ToolFormat:
    return ToolFormat(
        f"deepseek-dsml-{block}",
        "xml",
        begin=f"<｜DSML｜{block}>\n",
        call_start='<｜DSML｜invoke name="',
        name_end='">\n',
        argument_start='<｜DSML｜parameter name="',
        key_end='">',
        argument_end="</｜DSML｜parameter>\n",
        call_end="</｜DSML｜invoke>\n",
        end=f"</｜DSML｜{block}>",
        says_type=True,
        further_tags=("｜DSML｜",),
        thinking_ends=(f"<｜DSML｜{block}>",),
    )


DEEPSEEK_V3_2 = _dsml("function_calls")
DEEPSEEK_V4 = _dsml("tool_calls")

DEEPSEEK_R1 = ToolFormat(
    "deepseek-r1",
    "named",
    begin="<｜tool▁calls▁begin｜>",
    call_start="<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    name_end="\n```json\n",
    call_end="\n```<｜tool▁call▁end｜>",
    end="<｜tool▁calls▁end｜>",
    further_tags=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    thinking_ends=("<｜tool▁calls▁begin｜>",),
)
"""DeepSeek V3 and R1."""

DEEPSEEK_V3_1 = ToolFormat(
    "deepseek-v3.1",
    "named",
    begin="<｜tool▁calls▁begin｜>",
    call_start="<｜tool▁call▁begin｜>",
    name_end="<｜tool▁sep｜>",
    call_end="<｜tool▁call▁end｜>",
    end="<｜tool▁calls▁end｜>",
    thinking_ends=("<｜tool▁calls▁begin｜>",),
)

MISTRAL = ToolFormat(
    "mistral",
    "named",
    call_start="[TOOL_CALLS]",
    name_end="[ARGS]",
    further_tags=("[CALL_ID]",),
    thinking_ends=("[TOOL_CALLS]",),
)
"""Ministral 3, Mistral Small 3.2, Devstral."""

MISTRAL_LIST = ToolFormat(
    "mistral-list",
    "json",
    begin="[TOOL_CALLS]",
    is_list=True,
    between=", ",
    thinking_ends=("[TOOL_CALLS]",),
)
"""Mistral Nemo and before."""

GEMMA_4 = ToolFormat(
    "gemma-4",
    "named",
    call_start="<|tool_call>call:",
    call_end="<tool_call|>",
    values="gemma",
    further_tags=("<|tool_call>", '<|"|>'),
    thinking_ends=("<|tool_call>",),
)

HARMONY = ToolFormat(
    "gpt-oss",
    "named",
    call_start="<|channel|>commentary to=functions.",
    name_end="<|message|>",
    takes_one=True,
    further_tags=("<|channel|>", "<|constrain|>", "<|start|>", "<|end|>"),
)
"""gpt-oss. What is between name and message (`<|constrain|>json`) and the other places where the
recipient may stand are taken out by `parsing.HarmonySplitter`, made for this format."""

FUNCTIONARY = ToolFormat(
    "functionary",
    "named",
    call_start="<function=",
    name_end=">",
    call_end="</function>",
)

LFM2 = ToolFormat(
    "lfm2",
    "pythonic",
    begin="<|tool_call_start|>",
    end="<|tool_call_end|>",
    between=", ",
    thinking_ends=("<|tool_call_start|>",),
)

LLAMA_3 = ToolFormat(
    "llama-3",
    "json",
    arguments_key="parameters",
    is_bare=True,
    takes_one=True,
    more_openers=("<|python_tag|>",),
)

COMMAND = ToolFormat(
    "command",
    "json",
    begin="<|START_ACTION|>",
    end="<|END_ACTION|>",
    name_key="tool_name",
    arguments_key="parameters",
    is_list=True,
    between=", ",
    thinking_ends=("<|START_ACTION|>",),
)

GRANITE_3 = ToolFormat("granite-3", "json", begin="<|tool_call|>", is_list=True, between=", ")

NEMOTRON_2 = ToolFormat(
    "nemotron-2",
    "json",
    begin="<TOOLCALL>",
    end="</TOOLCALL>",
    is_list=True,
    between=", ",
    thinking_ends=("<TOOLCALL>[",),
)

APRIEL = ToolFormat(
    "apriel",
    "json",
    begin="<tool_calls>",
    end="</tool_calls>",
    is_list=True,
    between=", ",
    thinking_ends=("<tool_calls>[",),
)

FORMATS: tuple[ToolFormat, ...] = (
    HERMES, FALLBACK, QWEN_CODER, SEED, GLM, MINIMAX, DEEPSEEK_V3_2, DEEPSEEK_V4, DEEPSEEK_R1,
    DEEPSEEK_V3_1, MISTRAL, MISTRAL_LIST, GEMMA_4, HARMONY, FUNCTIONARY, LFM2, LLAMA_3, COMMAND,
    GRANITE_3, NEMOTRON_2, APRIEL,
)  # fmt: skip

# All of the marks must be in the template. In this order, since a template may show a second
# syntax in what it tells the model, or turn text of another family into its own.
_BY_MARKS: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL),
    (("<|channel|>", "functions."), HARMONY),
    (("<|tool_list_start|>",), LFM2),
    (("List of tools: [",), LFM2),
    (("DSML", "function_calls"), DEEPSEEK_V3_2),
    (("DSML",), DEEPSEEK_V4),
    (("<|tool_call>call:",), GEMMA_4),
    (("<seed:tool_call>",), SEED),
    (("<minimax:tool_call>",), MINIMAX),
    (("<tool_call>", "<function=", "<parameter="), QWEN_CODER),
    (("<tool_call>", "<arg_key>", "</arg_value>"), GLM),
    (("<｜tool▁calls▁begin｜>", "```json"), DEEPSEEK_R1),
    (("<｜tool▁calls▁begin｜>",), DEEPSEEK_V3_1),
    (("<|START_ACTION|>", "tool_name"), COMMAND),
    (("[TOOL_CALLS]",), MISTRAL_LIST),
    (("<TOOLCALL>",), NEMOTRON_2),
    (("<tool_calls>", "[{"), APRIEL),
    (("<|tool_call|>",), GRANITE_3),
    (("<tool_call>", '"arguments"'), HERMES),
    (("<tool_call>", "tojson"), HERMES),
    (("<function=", "</function>"), FUNCTIONARY),
    (('"parameters"', "ipython"), LLAMA_3),
)

# Templates of syntaxes that are not read here but hold marks of ones that are.
_OTHERS = ("<invoke", ">>>all", "<atem:function_calls>", "<|tool_calls_section_begin|>")


def detect_tool_format(template_source: str | None, tokenizer: Tokenizer) -> ToolFormat | None:
    """The syntax in which a model with this chat template calls tools; None without a template.

    `FALLBACK` for templates that show the model no tools, or use a syntax that is not read here.
    """
    del tokenizer  # the template says all there is to know so far
    if not template_source:
        return None
    if not re.search(r"\btools\b", template_source):
        return LFM2 if "<|tool_list_start|>" in template_source else FALLBACK
    for marks, fmt in _BY_MARKS:
        if all(mark in template_source for mark in marks):
            if fmt is not MINIMAX and any(mark in template_source for mark in _OTHERS):
                return FALLBACK
            return fmt
    return FALLBACK
