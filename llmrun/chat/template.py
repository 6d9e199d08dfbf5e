"""From messages to a prompt: the model's own chat template, or a plain transcript without one."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llmrun.chat.messages import Message, to_template_dicts
from llmrun.chat.protect import Guard, RenderedPrompt, tokenize_prompt
from llmrun.chat.renderer import Limits, RefusedByTemplateError, make_renderer
from llmrun.engine.types import ModelFacts, Tokenizer

__all__ = [
    "ChatTemplate",
    "PromptTemplate",
    "TranscriptTemplate",
    "template_for",
    "tokenize_prompt",
]

_NO_ARGS: Mapping[str, object] = {}


class PromptTemplate(Protocol):
    """What a conversation needs of a template."""

    @property
    def source(self) -> str:
        """The Jinja source; empty for a transcript."""

    @property
    def is_fallback(self) -> bool:
        """Whether this stands in for a chat template that the model does not have."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings at which an answer ends, beside the model's own end tokens."""

    def render(
        self,
        messages: Sequence[Message],
        *,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        template_args: Mapping[str, object] = _NO_ARGS,
    ) -> RenderedPrompt:
        """The prompt for these messages. Raises TemplateError."""

    def start(self) -> None:
        """Begin what takes time, without waiting for it."""

    def close(self) -> None: ...


def template_for(facts: ModelFacts) -> PromptTemplate:
    """The model's own template, or a transcript for a model without one."""
    if not facts.chat_template:
        return TranscriptTemplate()
    return ChatTemplate(facts.chat_template, bos_text=facts.bos_text, eos_text=facts.eos_text)


class ChatTemplate:
    """A model's Jinja chat template.

    `today` is what `strftime_now` tells the template. It is fixed at construction: a prompt whose
    date changes at midnight could not reuse the cache of the conversation before it.
    Raises TemplateError when the source is too long; other faults show at the first rendering.
    """

    is_fallback = False
    stop: tuple[str, ...] = ()

    def __init__(
        self,
        source: str,
        *,
        bos_text: str,
        eos_text: str,
        today: datetime.datetime | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.source = source
        self._bos_text = bos_text
        self._eos_text = eos_text
        self._today = today or datetime.datetime.now()
        self._renderer = make_renderer(source, limits)

    def start(self) -> None:
        self._renderer.start()

    def close(self) -> None:
        self._renderer.close()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        template_args: Mapping[str, object] = _NO_ARGS,
    ) -> RenderedPrompt:
        """See `PromptTemplate.render`.

        Literals of special tokens in messages, tools and arguments are protected (see `protect`).
        A template that refuses or leaves out the system message gets it in the first user turn.
        """
        guard = Guard(tokenizer, self.source)
        variables = guard.protect(
            {
                **template_args,
                "messages": to_template_dicts(messages, self.source),
                "tools": list(tools) if tools else None,
                "documents": None,
            }
        )
        variables |= {
            "bos_token": self._bos_text,
            "eos_token": self._eos_text,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._render_with_system(variables)
        if add_generation_prompt and text.endswith("<turn|>\n") and "<|turn>model" in self.source:
            # Some Gemma 4 templates end behind the last turn.
            text += "<|turn>model\n"
        return guard.restore(text)

    def _render_with_system(self, variables: Mapping[str, Any]) -> str:
        system = _leading_system(variables["messages"])
        if system is None:
            return self._renderer.render(variables, self._today)
        refusal: RefusedByTemplateError | None = None
        text = ""
        try:
            text = self._renderer.render(variables, self._today)
        except RefusedByTemplateError as error:
            refusal = error
        if refusal is None and _holds(text, system):
            return text
        folded = {**variables, "messages": _fold_system(variables["messages"])}
        try:
            folded_text = self._renderer.render(folded, self._today)
        except RefusedByTemplateError:
            if refusal is not None:
                raise refusal from None
            return text
        # A template may write the system message in a form of its own; then the first was right.
        return folded_text if refusal is not None or _holds(folded_text, system) else text


class TranscriptTemplate:
    """The stand-in for a model without a chat template: a plain transcript that it continues."""

    source = ""
    is_fallback = True
    stop: tuple[str, ...] = ("\nUser:",)

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def render(
        self,
        messages: Sequence[Message],
        *,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        template_args: Mapping[str, object] = _NO_ARGS,
    ) -> RenderedPrompt:
        """See `PromptTemplate.render`; tools and arguments have no place in a transcript."""
        guard = Guard(tokenizer, "")
        parts = []
        for message in guard.protect([[m.role, m.content] for m in messages]):
            role, content = message[0], message[1].strip()
            if role in ("system", "developer"):
                parts.append(f"{content}\n\n")
            else:
                parts.append(f"{'Assistant' if role == 'assistant' else 'User'}: {content}\n")
        if add_generation_prompt:
            parts.append("Assistant:")
        return guard.restore("".join(parts))


def _fold_system(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    system, rest = messages[0], [dict(message) for message in messages[1:]]
    if rest and rest[0]["role"] == "user":
        rest[0]["content"] = _joined(system["content"], rest[0]["content"])
        return rest
    return [{"role": "user", "content": system["content"]}, *rest]


def _joined(system: str, user: str) -> str:
    return f"{system}\n\n{user}" if system.strip() else user


def _leading_system(messages: Sequence[Mapping[str, Any]]) -> str | None:
    if messages and messages[0]["role"] in ("system", "developer"):
        return str(messages[0]["content"])
    return None


def _holds(text: str, part: str) -> bool:
    """Whether `part` is in `text`, white space and JSON escapes aside."""
    return _WHITE.sub("", part) in _WHITE.sub("", text)


_WHITE = re.compile(r"[\s\\]+")
