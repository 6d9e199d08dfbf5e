"""A native renderer gives, character for character, what its template gives."""

from __future__ import annotations

import datetime
import hashlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.chat.known_templates import KNOWN_GOOD
from llmrun.chat.renderer import LocalRenderer, make_renderer
from llmrun.chat.template_child import compile_template
from llmrun.gguf.info import read_info
from tests.fakes.models import smollm2_path

NOW = datetime.datetime(2026, 1, 1)


@pytest.fixture(scope="module")
def smollm2_source():
    source = read_info([smollm2_path()]).chat_template
    assert source
    return source


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
            "content": st.text(max_size=20),
        }
    ),
    max_size=4,
)


@settings(deadline=None)
@given(messages=MESSAGES, add_generation_prompt=st.booleans())
def test_smollm2_is_rendered_as_its_template_says(smollm2_source, messages, add_generation_prompt):
    variables = {"messages": messages, "add_generation_prompt": add_generation_prompt}
    native = KNOWN_GOOD[hashlib.sha256(smollm2_source.encode()).hexdigest()].render
    assert native is not None
    compiled = _compiled(smollm2_source)
    assert native(variables) == compiled(variables, NOW, 10**9)


_cache = {}


def _compiled(source):
    return _cache.setdefault(source, compile_template(source))


def test_smollm2_needs_neither_a_child_nor_jinja2(smollm2_source):
    assert isinstance(make_renderer(smollm2_source), LocalRenderer)
    script = (
        "import sys\n"
        "from llmrun.chat.messages import Message\n"
        "from llmrun.chat.session import ChatSession\n"
        "from tests.fakes.fake_engine import FakeEngine, fake_facts\n"
        "engine = FakeEngine(facts=fake_facts(chat_template=sys.stdin.read()))\n"
        "list(ChatSession(engine).send('Hi'))\n"
        "assert 'SmolLM' in engine.prompt_text()\n"
        "assert 'jinja2' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], input=smollm2_source.encode(), check=True)
