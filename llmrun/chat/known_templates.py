"""Chat templates that people have read: they only walk over the messages they are given.

Rendering them needs no child process, which saves its start. Keyed by the sha256 of the source as
it stands in the file's `tokenizer.chat_template`. An entry is added only by reading the template:
no loop but over messages, tools and their parts, no repetition of strings, no recursion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

NativeRenderer = Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True, slots=True)
class KnownTemplate:
    """`render` does in Python exactly what the template does, where that saves importing jinja2."""

    name: str
    render: NativeRenderer | None = None


def _render_smollm2(variables: Mapping[str, Any]) -> str:
    messages = variables["messages"]
    parts = []
    if messages and messages[0]["role"] != "system":
        parts.append(
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
            "Hugging Face<|im_end|>\n"
        )
    parts += [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    if variables["add_generation_prompt"]:
        parts.append("<|im_start|>assistant\n")
    return "".join(parts)


KNOWN_GOOD: dict[str, KnownTemplate] = {
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788": KnownTemplate(
        "SmolLM2 Instruct", _render_smollm2
    ),
    "153280e3ff55d19da1398bdb3914ee2a51b80429bfaedde11d7d216c39db80f3": KnownTemplate("ChatML"),
    "ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122": KnownTemplate(
        "Llama 3 Instruct"
    ),
    "7e995b379ec01747807246483647cd99030abf331653f1119e16d7ac041a3495": KnownTemplate(
        "Mistral 7B Instruct v0.1"
    ),
    "26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7": KnownTemplate(
        "Mixtral 8x7B Instruct"
    ),
}
