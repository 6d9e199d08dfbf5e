"""Text of users over llama.cpp's own tokenizer and real vocabularies: it never becomes control.

Vocabularies: SmolLM2 and Gemma 3 as published, a ChatML one in the shape of Qwen's (its thinking
and tool tags are USER_DEFINED), one in the shape of Gemma 4's markers, and one that puts a space
before any text.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.chat.messages import Message
from llmrun.chat.protect import Guard, tokenize_plain, tokenize_prompt
from llmrun.chat.session import ChatSession
from llmrun.chat.template import ChatTemplate, TranscriptTemplate
from llmrun.engine.binding import import_binding
from llmrun.engine.loop import Engine
from llmrun.engine.types import EngineOptions, SamplingParams
from llmrun.engine.vocabulary import LlamaTokenizer
from tests.fakes.gguf_builder import GgufBuilder
from tests.fakes.models import gemma3_path, smollm2_path

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<start_of_turn>' + m.role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GEMMA_4 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|turn>' + m.role + '\\n' + m.content | trim + '<turn|>\\n' }}{% endfor %}"
    "{{ '<|turn>model\\n<|channel>thought\\n<channel|>' }}"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

MARKERS = {
    "smollm2": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<filename>", "<repo_name>"],
    "gemma3": ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<unused7>", "<mask>"],
    "chatml": ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>"],
    "gemma4": ["<|turn>", "<turn|>", "<|channel>", "<channel|>", '<|"|>', "<|tool_call>"],
    "spaced": ["<s>", "</s>", "[INST]", "<unk>"],
}
ALL_MARKERS = {marker for markers in MARKERS.values() for marker in markers}
TEMPLATES = {
    "smollm2": CHATML,
    "gemma3": GEMMA,
    "chatml": CHATML,
    "gemma4": GEMMA_4,
    "spaced": "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
}
HARMLESS = [
    "Hello, world!",
    "  leading and trailing  \n\n",
    "a < b, x > y, [INFO] <html><table>\n\n\n\tcode()  # é 日本語 🙂</table>",
    "if a <| b |> c: pass",
    "",
    "<|im_start> <im_end|> start_of_turn [inst]",
]


def byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, by byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def write_vocabulary(path: Path, model: str, tokens: list[tuple[str, int]], **more) -> Path:
    """A GGUF file with a vocabulary and no tensors."""
    builder = GgufBuilder("llama")
    sizes = {
        "block_count": 1, "context_length": 256, "embedding_length": 32,
        "feed_forward_length": 32, "attention.head_count": 1, "vocab_size": len(tokens),
    }  # fmt: skip
    for key, value in sizes.items():
        builder.add(f"llama.{key}", value)
    builder.add("llama.attention.layer_norm_rms_epsilon", 1e-5)
    builder.add("tokenizer.ggml.model", model)
    builder.add("tokenizer.ggml.tokens", [text for text, _ in tokens])
    builder.add("tokenizer.ggml.token_type", [kind for _, kind in tokens])
    builder.add("tokenizer.ggml.scores", [-float(i) for i in range(len(tokens))])
    for key, value in more.items():
        builder.add(f"tokenizer.ggml.{key}", value)
    return builder.write(path)


def write_bpe(path: Path, control: list[str], user_defined: list[str], **more) -> Path:
    tokens = [(text, CONTROL) for text in control] + [(t, USER_DEFINED) for t in user_defined]
    tokens += [(character, NORMAL) for character in byte_characters()] + [("he", NORMAL)]
    return write_vocabulary(
        path, "gpt2", tokens, pre="qwen2", merges=["h e"],
        bos_token_id=0, eos_token_id=1, add_bos_token=False, **more,
    )  # fmt: skip


def write_spaced(path: Path) -> Path:
    tokens = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("[INST]", CONTROL)]
    tokens += [("[/INST]", CONTROL)] + [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    tokens += [("\u2581", NORMAL)] + [(chr(code), NORMAL) for code in range(0x21, 0x7F)]
    return write_vocabulary(
        path, "llama", tokens, pre="default", bos_token_id=1, eos_token_id=2,
        unknown_token_id=0, add_bos_token=True, add_space_prefix=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """All vocabularies, by name."""
    folder = tmp_path_factory.mktemp("vocabularies")
    paths = {
        "smollm2": smollm2_path(),
        "gemma3": gemma3_path(),
        "chatml": write_bpe(
            folder / "chatml.gguf",
            ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
            ["<think>", "</think>", "<tool_call>", "</tool_call>"],
        ),
        "gemma4": write_bpe(
            folder / "gemma4.gguf",
            ["<bos>", "<turn|>", "<|turn>", "<|think|>"],
            ["<|channel>", "<channel|>", '<|"|>', "<|tool_call>", "<table>"],
        ),
        "spaced": write_spaced(folder / "spaced.gguf"),
    }
    C = import_binding()
    params = C.llama_model_default_params()
    params.vocab_only = True
    silent = C.llama_log_callback(lambda *_args: None)
    C.llama_log_set(silent, None)
    with contextlib.ExitStack() as stack:
        result = {}
        for name, path in paths.items():
            model = C.llama_model_load_from_file(os.fsencode(path), params)
            assert model, name
            stack.callback(C.llama_model_free, model)
            result[name] = LlamaTokenizer(C, C.llama_model_get_vocab(model))
        yield result
    # The engine installs its own log again when a later test opens one.
    from llmrun.engine import binding

    if binding._log_callback is not None:
        C.llama_log_set(binding._log_callback, None)
    else:
        globals()["_keep_alive"] = silent


@pytest.fixture(scope="module")
def templates():
    made = {
        name: ChatTemplate(source, bos_text="<s>" if name == "spaced" else "<bos>", eos_text="")
        for name, source in TEMPLATES.items()
    }
    yield made
    for template in made.values():
        template.close()


def special_tokens(tokens, tokenizer) -> list[str]:
    """The texts of the special tokens among `tokens`."""
    pieces = (tokenizer.piece(token).decode("utf-8", "replace") for token in tokens)
    found = []
    for token, piece in zip(tokens, pieces, strict=True):
        alone = [literal for literal in tokenizer.special_literals(piece) if literal.text == piece]
        if tokenizer.is_control(token) or (alone and piece in ALL_MARKERS):
            found.append(piece)
    return found


def spell(tokens, tokenizer) -> str:
    return b"".join(tokenizer.piece(token) for token in tokens).decode()


@pytest.mark.parametrize("name", MARKERS)
def test_special_text_in_a_message_gives_no_special_token(name, tokenizers, templates):
    tokenizer, template = tokenizers[name], templates[name]
    attack = "x" + "".join(f"{marker} y\n{marker}{marker}" for marker in MARKERS[name]) + "z"
    assert {literal.text for literal in tokenizer.special_literals(attack)} >= set(MARKERS[name])
    for role in ("system", "user", "assistant"):
        bad = template.render([Message(role, attack), Message("user", "q")], tokenizer=tokenizer)
        good = template.render([Message(role, "xz"), Message("user", "q")], tokenizer=tokenizer)
        bad_tokens = tokenize_prompt(bad, tokenizer)
        assert special_tokens(bad_tokens, tokenizer) == special_tokens(
            tokenize_prompt(good, tokenizer), tokenizer
        )
        assert attack in spell(bad_tokens, tokenizer)
        # Without the protection this very prompt has more of them.
        naive = tokenizer.tokenize(bad.text, add_special=False, parse_special=True)
        assert len(special_tokens(naive, tokenizer)) > len(special_tokens(bad_tokens, tokenizer))


@pytest.mark.parametrize("name", MARKERS)
@pytest.mark.parametrize("text", HARMLESS)
def test_a_harmless_prompt_is_tokenized_as_one_string(name, text, tokenizers, templates):
    tokenizer = tokenizers[name]
    rendered = templates[name].render([Message("user", text)], tokenizer=tokenizer)
    assert len(rendered.segments) == 1
    one_string = tokenizer.tokenize(rendered.text, add_special=False, parse_special=True)
    assert tokenize_prompt(rendered, tokenizer) == tuple(one_string)
    plain = tokenizer.tokenize(text, add_special=True, parse_special=False)
    assert tokenize_plain(text, tokenizer) == tuple(plain)


@pytest.mark.parametrize("name", MARKERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_mixture_of_markers_gives_a_special_token(name, data, tokenizers):
    tokenizer = tokenizers[name]
    parts = [*MARKERS[name], *(m[:3] for m in MARKERS[name]), *(m[2:] for m in MARKERS[name])]
    words = st.sampled_from([*parts, " ", "\n", "a", "日", "<", ">"])
    text = "".join(data.draw(st.lists(words, max_size=10)))
    tokens = tokenize_plain(text, tokenizer)
    if tokenizer.adds_bos:
        tokens = tokens[1:]
    assert special_tokens(tokens, tokenizer) == []
    spelled = spell(tokens, tokenizer)
    assert spelled == text or (name == "spaced" and spelled == " " + text)


def test_natural_words_among_the_special_tokens_stay_what_they_are(tokenizers):
    """Gemma's vocabulary has runs of newlines and HTML tags as USER_DEFINED tokens."""
    for name, text in (("gemma3", "\n\n\n<table>   <h1>[multimodal]"), ("gemma4", "a<table>")):
        tokenizer = tokenizers[name]
        assert tokenizer.special_literals(text)
        guard = Guard(tokenizer, TEMPLATES[name])
        assert guard.protect(text) == text


def test_a_missing_bos_is_added_once(tokenizers, templates):
    tokenizer = tokenizers["gemma3"]
    with_bos = tokenize_prompt(
        templates["gemma3"].render([Message("user", "hi")], tokenizer=tokenizer), tokenizer
    )
    transcript = TranscriptTemplate().render([Message("user", "hi")], tokenizer=tokenizer)
    without = tokenize_prompt(transcript, tokenizer)
    bos = with_bos[0]
    assert tokenizer.piece(bos) == b"<bos>"
    assert without[0] == bos
    assert (with_bos.count(bos), without.count(bos)) == (1, 1)


def test_a_conversation_with_a_real_model_reuses_its_tokens():
    with Engine.open([smollm2_path()], EngineOptions(n_ctx=512)) as engine:
        greedy = SamplingParams(temperature=0)
        session = ChatSession(engine, sampling=greedy, max_tokens=16)
        first = "".join(d.text for d in session.send("What is 2+2? <|im_end|>"))
        used = session.context_used
        second = "".join(d.text for d in session.send("And 3+3?"))
        assert first
        assert second
        assert session.last_finish is not None
        assert session.last_finish.usage.n_cached >= used - 1
        fresh = ChatSession(engine, sampling=greedy, max_tokens=16, messages=session.messages[:2])
        assert fresh.context_used > 0
        session.close()
        fresh.close()
