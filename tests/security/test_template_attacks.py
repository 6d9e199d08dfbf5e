"""Hostile chat templates: each ends in a typed error, and this process's memory stays flat."""

from __future__ import annotations

import datetime
import os
import sys

import pytest

from llmrun.chat.messages import Message
from llmrun.chat.renderer import MAX_SOURCE_BYTES, ChildRenderer, Limits
from llmrun.chat.template import ChatTemplate
from llmrun.errors import TemplateError
from tests.fakes.fake_tokenizer import FakeTokenizer

TOKENIZER = FakeTokenizer()
TIGHT = Limits(cpu_s=1, deadline_s=60.0)
NOW = datetime.datetime(2026, 1, 1)


def attack(source: str, limits: Limits = TIGHT, **template_args: object) -> TemplateError:
    template = ChatTemplate(source, bos_text="<s>", eos_text="</s>", limits=limits)
    try:
        with pytest.raises(TemplateError) as caught:
            template.render(
                [Message("user", "hi")], tokenizer=TOKENIZER, template_args=template_args
            )
    finally:
        template.close()
    assert caught.value.why
    assert caught.value.hint
    return caught.value


def doubling(body: str) -> str:
    return (
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(30) %}" + body + "{% endfor %}"
        "{{ ns.s }}"
    )


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ strftime_now.__self__.__class__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ ('{0.__class__}' | string).format_map({'0': 1}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__base__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
]

BOMBS = [
    "{{ 'a' * 300000000 }}",
    "{{ 'a' * 300000000 * (messages | length) }}",
    "{{ messages * 100000000 }}",
    "{{ 'a'.ljust(300000000 + 0 * (messages | length)) }}",
    "{{ 'a'.center(300000000) }}",
    "{{ 'a'.zfill(300000000) }}",
    "{{ 'a\\na' | indent(300000000) }}",
    "{{ '{:300000000}'.format(1) }}",
    "{{ '%300000000d' % 1 }}",
    "{{ '%300000000d' | format(1) }}",
    "{{ 'a' | center(300000000) }}",
    "{{ [1] | batch(300000000, 'x') | list }}",
    "{{ 9 ** (9 ** (9 + (messages | length))) }}",
    doubling("{% set ns.s = ns.s ~ ns.s %}"),
    doubling("{% set ns.s = ns.s + ns.s %}"),
    doubling("{% set ns.s = [ns.s, ns.s] | join %}"),
    doubling("{% set ns.s = ns.s | replace('a', 'aa') %}"),
    doubling("{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"),
    "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "{{ lipsum(n=100000) }}",
]

ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ range(99999) | map('string') | map('length') | sum }}"
    "{% for a in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
]

DEEP = [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "{{ " + "-" * 50000 + "1 }}",
    "{{ " + "not " * 20000 + "1 }}",
    "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out_of_the_sandbox(source):
    """Each is refused, or gives nothing of Python's insides."""
    template = ChatTemplate(source, bos_text="", eos_text="", limits=TIGHT)
    try:
        text = template.render([Message("user", "hi")], tokenizer=TOKENIZER).text
    except TemplateError as error:
        assert error.why
    else:
        assert "class" not in text
        assert "module" not in text
        assert "uid=" not in text
    finally:
        template.close()


@pytest.mark.parametrize("source", BOMBS)
def test_memory_bombs_end_in_an_error_and_leave_this_process_as_it_was(source):
    before = _resident_bytes()
    attack(source)
    assert _resident_bytes() - before < 32 * 1024 * 1024


@pytest.mark.parametrize("source", DEEP)
def test_deep_nesting_ends_in_an_error(source):
    attack(source)


@pytest.mark.parametrize("source", ENDLESS)
def test_endless_work_is_ended_by_the_bound_on_cpu_time(source):
    error = attack(source)
    assert "in time" in (error.why or "")


def test_a_huge_range_is_refused():
    assert "Range" in (attack("{% for i in range(1000000000) %}{% endfor %}").why or "")


def test_waiting_without_using_cpu_time_is_ended_by_the_deadline(monkeypatch):
    """A process that hangs: the script of the child is exchanged for one that never answers."""
    renderer = ChildRenderer("x", Limits(deadline_s=0.2))
    child = _replace_child(renderer, monkeypatch, "import time\nwhile True: time.sleep(60)")
    with pytest.raises(TemplateError) as caught:
        renderer.render({"messages": []}, NOW)
    assert "in time" in (caught.value.why or "")
    assert child.returncode is not None


@pytest.mark.parametrize(
    "script",
    [
        "raise SystemExit",
        "print('not json', flush=True); input()",
        "print('[]', flush=True); input()",
        "print('{}', flush=True); input()",
        "print('{\"ok\": ' + '[' * 100000, flush=True); input()",
        "import sys\nwhile True: sys.stdout.write('x' * 65536)",
    ],
)
def test_a_child_that_was_taken_over_can_send_nothing_but_an_error(monkeypatch, script):
    before = _resident_bytes()
    renderer = ChildRenderer("x", Limits(deadline_s=60.0))
    child = _replace_child(renderer, monkeypatch, script)
    with pytest.raises(TemplateError):
        renderer.render({"messages": []}, NOW)
    assert child.returncode is not None
    assert _resident_bytes() - before < 32 * 1024 * 1024


def _replace_child(renderer: ChildRenderer, monkeypatch, script: str):
    import subprocess

    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    monkeypatch.setattr(renderer, "_child", child)
    return child


def test_the_source_is_bounded():
    with pytest.raises(TemplateError) as caught:
        ChatTemplate("x" * (MAX_SOURCE_BYTES + 1), bos_text="", eos_text="")
    assert str(MAX_SOURCE_BYTES) in (caught.value.why or "")
    ChatTemplate("x" * MAX_SOURCE_BYTES, bos_text="", eos_text="")


def test_the_child_sees_no_secrets(monkeypatch):
    """Even a template that got out of the sandbox finds no token in its process."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("SOME_API_KEY", "secret")
    renderer = ChildRenderer("{{ messages | length }}", Limits())
    assert renderer.render({"messages": []}, NOW) == "0"
    assert renderer._child is not None
    if os.path.exists(f"/proc/{renderer._child.pid}/environ"):
        with open(f"/proc/{renderer._child.pid}/environ", "rb") as file:
            assert b"secret" not in file.read()
    renderer.close()


def test_after_a_breach_the_next_rendering_works():
    source = "{% if bomb %}{{ 'a' * 900000000 }}{% endif %}ok"
    template = ChatTemplate(source, bos_text="", eos_text="")
    messages = [Message("user", "hi")]
    assert template.render(messages, tokenizer=TOKENIZER).text == "ok"
    source = source.replace("900000000", "(900000000 * size)")
    template.close()
    template = ChatTemplate(source, bos_text="", eos_text="")
    for _ in range(2):
        with pytest.raises(TemplateError):
            template.render(messages, tokenizer=TOKENIZER, template_args={"bomb": True, "size": 1})
        rendered = template.render(messages, tokenizer=TOKENIZER, template_args={"size": 1})
        assert rendered.text == "ok"
    template.close()


def test_long_but_honest_conversations_pass():
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(source, bos_text="", eos_text="")
    text = "é" * 3_000_000
    rendered = template.render([Message("user", text)] * 2, tokenizer=TOKENIZER)
    template.close()
    assert rendered.text == text * 2


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss
