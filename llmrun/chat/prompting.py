"""From messages to a prompt with the model's own way of thinking taken into account."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmrun.chat.messages import Message
from llmrun.chat.parsing import ThinkingFormat, starts_inside
from llmrun.chat.protect import RenderedPrompt
from llmrun.chat.template import PromptTemplate
from llmrun.engine.types import Tokenizer

_NO_ARGS: Mapping[str, object] = {}


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A rendered prompt and how to read what comes behind it: `fmt` None is plain text;
    `starts_inside`: the first token is thinking already."""

    prompt: RenderedPrompt
    fmt: ThinkingFormat | None
    starts_inside: bool


def render_chat(
    template: PromptTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    fmt: ThinkingFormat | None,
    thinks: bool | None = None,
    has_grammar: bool = False,
    tools: Sequence[Mapping[str, object]] | None = None,
    template_args: Mapping[str, object] = _NO_ARGS,
) -> ChatPrompt:
    """The prompt for these messages. `thinks` None leaves thinking to the template.

    With a grammar there is no thinking: the grammar holds from the first token, so that the output
    always obeys it. Raises TemplateError.
    """
    if has_grammar:
        thinks = False
    prompt = template.render(
        messages,
        tokenizer=tokenizer,
        tools=tools,
        template_args=_arguments(template_args, thinks),
    )
    if fmt is None:
        return ChatPrompt(prompt, None, False)
    inside = starts_inside(prompt.text, fmt)
    if fmt.is_harmony and has_grammar:
        # The model would write a channel's name first, which no user's grammar allows.
        return ChatPrompt(prompt.append(fmt.closing), None, False)
    if inside and thinks is False:
        # The template knows no switch.
        prompt, inside = prompt.append(fmt.closing), False
    return ChatPrompt(prompt, None if has_grammar else fmt, inside)


def _arguments(template_args: Mapping[str, object], thinks: bool | None) -> dict[str, object]:
    arguments = dict(template_args)
    if thinks is not None:
        # DeepSeek and Granite call the switch `thinking`.
        arguments |= {"enable_thinking": thinks, "thinking": thinks}
        if not thinks:
            arguments.setdefault("reasoning_effort", "low")
    return arguments
