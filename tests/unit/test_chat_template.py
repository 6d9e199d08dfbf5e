"""Rendering: the environment that templates expect, and the traps of the model families.

The templates are written in the shape of each family's, not copies of them.
"""

from __future__ import annotations

import datetime
import hashlib
import json

import pytest

from llmrun.chat.known_templates import KNOWN_GOOD, KnownTemplate
from llmrun.chat.messages import Message, ToolCall, to_template_dicts
from llmrun.chat.renderer import ChildRenderer, LocalRenderer, make_renderer
from llmrun.chat.template import ChatTemplate, TranscriptTemplate, template_for
from llmrun.errors import TemplateError
from tests.fakes.fake_engine import CHATML, fake_facts
from tests.fakes.fake_tokenizer import FakeTokenizer

TOKENIZER = FakeTokenizer()
HI = [Message("user", "Hi")]
LONG_AGO = datetime.datetime(2024, 7, 26, 12, 0)


def render(source: str, messages=HI, **options) -> str:
    template = ChatTemplate(source, bos_text="<s>", eos_text="</s>", today=LONG_AGO)
    try:
        return template.render(messages, tokenizer=TOKENIZER, **options).text
    finally:
        template.close()


def test_chatml_is_rendered_with_and_without_a_generation_prompt():
    messages = [Message("system", "S"), *HI]
    body = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render(CHATML, messages) == body + "<|im_start|>assistant\n"
    assert render(CHATML, messages, add_generation_prompt=False) == body


def test_blocks_are_trimmed_and_lstripped_as_hugging_face_does():
    source = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n"
        "    {% endif %}\n{% endfor %}\n"
    )
    assert render(source) == "Hi\n"


def test_loop_controls_generation_blocks_and_special_texts():
    source = (
        "{{ bos_token }}{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}"
        "{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{% generation %}x{{ eos_token }}{% endgeneration %}"
    )
    assert render(source) == "<s>02x</s>"


def test_tojson_does_not_escape_html_or_unicode():
    source = "{{ tools | tojson }}|{{ tools[0] | tojson(indent=2) }}"
    tool = {"name": "f", "description": "a < b & 'c' é"}
    plain, _, indented = render(source, tools=[tool]).partition("|")
    assert plain == json.dumps([tool], ensure_ascii=False)
    assert indented == json.dumps(tool, ensure_ascii=False, indent=2)


def test_strftime_now_is_fixed_for_the_whole_conversation():
    assert render("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"


def test_template_arguments_reach_the_template():
    source = (
        "{% if enable_thinking is defined and enable_thinking is false %}off{% else %}on{% endif %}"
    )
    assert render(source) == "on"
    assert render(source, template_args={"enable_thinking": False}) == "off"


def test_arguments_cannot_take_the_place_of_the_messages():
    assert render("{{ messages[0].content }}", template_args={"messages": []}) == "Hi"


def test_raise_exception_becomes_a_template_error_with_its_words():
    with pytest.raises(TemplateError) as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert "roles must alternate" in (caught.value.why or "")
    assert caught.value.hint


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ nothing.at.all }}", "{{ 1 / 0 }}", "{% include 'x' %}", "{{ 1 | no }}"],
)
def test_a_broken_template_is_a_template_error(source):
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert caught.value.why
    assert caught.value.hint


REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def test_a_refused_system_message_goes_into_the_first_user_turn():
    text = render(REFUSING, [Message("system", "Be brief."), *HI])
    assert text == ("<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n")


def test_a_system_message_that_the_template_drops_goes_into_the_user_turn():
    source = "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}"
    assert render(source, [Message("system", "Be brief."), *HI]) == "[Be brief.\n\nHi]"


def test_a_system_message_that_the_template_rewrites_is_not_given_twice():
    source = "{% for m in messages %}[{{ m.content | tojson | replace(' ', '\\n') }}]{% endfor %}"
    assert render(source, [Message("system", 'Say "a b".'), *HI]).count("Say") == 1


def test_a_template_that_refuses_even_the_folded_messages_says_why():
    with pytest.raises(TemplateError) as caught:
        render("{{ raise_exception('never') }}", [Message("system", "S"), *HI])
    assert "never" in (caught.value.why or "")


def test_gemma_4_gets_its_model_turn_where_the_template_leaves_it_out():
    source = (
        "{% for m in messages %}<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}"
        "{% if false %}<|turn>model\n{% endif %}"
    )
    assert render(source) == "<|turn>user\nHi<turn|>\n<|turn>model\n"
    assert render(source, add_generation_prompt=False) == "<|turn>user\nHi<turn|>\n"


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_past_thinking_is_given_under_the_field_that_the_template_reads(field):
    source = f"{{% for m in messages %}}{{{{ m.{field} }}}}>{{{{ m.content }}}}{{% endfor %}}"
    assert render(source, [Message("assistant", "4", thinking="2+2")]) == "2+2>4"


def test_ministral_gets_past_thinking_as_a_block_of_the_content():
    source = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for b in m.content %}{% if b.type == 'thinking' %}[THINK]{{ b.thinking }}[/THINK]"
        "{% else %}{{ b.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    messages = [Message("user", "q"), Message("assistant", "4", thinking="2+2")]
    assert render(source, messages) == "q[THINK]2+2[/THINK]4"


def test_tool_arguments_are_an_object():
    source = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.name }}:"
        "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}"
        "{% endfor %}{% endfor %}"
    )
    assert (
        render(source, [Message("assistant", "", tool_calls=(ToolCall("f", {"a": 1}),))]) == "f:a=1"
    )


def test_tool_calls_that_the_template_does_not_render_are_put_in_the_text():
    message = Message("assistant", "Look:", tool_calls=(ToolCall("f", {"a": "é"}),))
    text = render("{{ messages[0].content }}", [message])
    assert text == 'Look:\n<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'


def test_tool_results_carry_their_tools_name():
    dicts = to_template_dicts([Message("tool", "42", tool_name="f", tool_call_id="c1")], "")
    assert dicts == [{"role": "tool", "content": "42", "name": "f", "tool_call_id": "c1"}]


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="role"):
        Message("root", "x")  # type: ignore[arg-type]


def test_only_known_templates_render_in_this_process(monkeypatch):
    assert isinstance(make_renderer(CHATML), ChildRenderer)
    digest = hashlib.sha256(CHATML.encode()).hexdigest()
    monkeypatch.setitem(KNOWN_GOOD, digest, KnownTemplate("ChatML"))
    assert isinstance(make_renderer(CHATML), LocalRenderer)
    assert render(CHATML).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert isinstance(make_renderer(CHATML + " "), ChildRenderer)


def test_a_known_template_reports_failures_in_the_same_way(monkeypatch):
    source = "{{ raise_exception('no') }}"
    monkeypatch.setitem(KNOWN_GOOD, hashlib.sha256(source.encode()).hexdigest(), KnownTemplate("x"))
    with pytest.raises(TemplateError) as caught:
        render(source)
    assert "no" in (caught.value.why or "")


def test_one_child_serves_all_turns():
    template = ChatTemplate(CHATML, bos_text="", eos_text="")
    template.start()
    renderer = template._renderer
    assert isinstance(renderer, ChildRenderer)
    child = renderer._child
    for _ in range(3):
        template.render(HI, tokenizer=TOKENIZER)
    assert child is not None
    assert renderer._child is child
    assert child.poll() is None
    template.close()
    assert child.returncode is not None
    # It comes back when it is needed again.
    assert template.render(HI, tokenizer=TOKENIZER).text
    template.close()


def test_a_model_without_a_template_gets_a_plain_transcript():
    template = template_for(fake_facts(chat_template=None))
    assert isinstance(template, TranscriptTemplate)
    assert template.is_fallback
    messages = [Message("system", "A talk."), *HI, Message("assistant", " Hello "), *HI]
    assert template.render(messages, tokenizer=TOKENIZER).text == (
        "A talk.\n\nUser: Hi\nAssistant: Hello\nUser: Hi\nAssistant:"
    )
    assert not template_for(fake_facts()).is_fallback
