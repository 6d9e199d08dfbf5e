"""The `openai`, `anthropic` and `ollama` clients, as they are, against the whole server with a real
small model: all that they can ask of the endpoints there are."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import ollama
import openai
import pytest
from pydantic import BaseModel

from llmrun.server.app import build_app
from tests.fakes.cli import Cli
from tests.fakes.models import smollm2_path
from tests.fakes.running_server import RunningServer, real_server
from tests.fakes.tiny_bert import TinyBert

MODEL = "SmolLM2-135M-Instruct.Q4_1"
EMBED, RANK = "bert", "rank"
HI = [{"role": "user", "content": "Hi"}]
GREEDY: dict[str, Any] = {"model": MODEL, "messages": HI, "temperature": 0, "max_tokens": 5}
# Greedy, up to where one word is about as likely as the next: what was computed together with what
# decides about the last digits of numbers.
HELLO = "Hello! How can I"
FRANCE = "The capital of France is"
CATS = "the cat, the cat, the cat, the cat, the cat,"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
}
TIME = {"type": "object", "properties": {"zone": {"enum": ["UTC"]}}, "required": ["zone"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("serve")
    bert = TinyBert().write(folder / "bert.gguf")
    rank = TinyBert(classifier=True, pooling_type=4).write(folder / "rank.gguf")
    with real_server(folder, smollm2_path(), bert, rank) as server:
        yield server


@pytest.fixture(scope="module")
def oai(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llama(server: RunningServer) -> Iterator[ollama.Client]:
    client = ollama.Client(host=server.url)
    yield client
    client.close()


# ---- openai: chat


def test_openai_chat(oai: openai.OpenAI) -> None:
    reply = oai.chat.completions.create(**{**GREEDY, "max_tokens": 40})
    choice = reply.choices[0]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert choice.message.content.startswith(HELLO)
    assert choice.message.tool_calls is None and choice.logprobs is None
    assert (reply.object, reply.model) == ("chat.completion", MODEL)
    assert reply.id.startswith("chatcmpl-")
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert reply.timings["predicted_n"] == usage.completion_tokens  # type: ignore[attr-defined]
    again = oai.chat.completions.create(**GREEDY)
    assert again.usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
    assert (again.choices[0].finish_reason, again.usage.completion_tokens) == ("length", 5)


def test_openai_chat_streamed(oai: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(oai.chat.completions.create(**GREEDY, stream=True, stream_options=options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == oai.chat.completions.create(**GREEDY).choices[0].message.content == HELLO
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 5
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1
    without = list(oai.chat.completions.create(**GREEDY, stream=True))
    assert all(c.usage is None for c in without)


def test_openai_several_answers_and_seeds(oai: openai.OpenAI) -> None:
    story = [{"role": "user", "content": "Tell me a story."}]
    wild = {
        **{"model": MODEL, "messages": story, "temperature": 1.5, "max_completion_tokens": 12},
        "extra_body": {"top_k": 0, "min_p": 0},
    }
    two = oai.chat.completions.create(**wild, seed=7, n=2)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].message.content != two.choices[1].message.content
    assert 12 < two.usage.completion_tokens <= 24
    streamed = ["", ""]
    for chunk in oai.chat.completions.create(**wild, seed=7, n=2, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert all(streamed)
    # From the same cache, so that not one number differs.
    texts = [
        oai.chat.completions.create(**wild, seed=seed).choices[0].message.content
        for seed in (7, 7, 8)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_openai_stop_strings(oai: openai.OpenAI) -> None:
    for stop in (" can", ["zzz", " can"]):
        reply = oai.chat.completions.create(**{**GREEDY, "max_tokens": 30}, stop=stop)
        assert reply.choices[0].message.content == "Hello! How"
        assert reply.choices[0].finish_reason == "stop"
    stream = oai.chat.completions.create(**{**GREEDY, "max_tokens": 30}, stop=" can", stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in stream) == "Hello! How"


def test_openai_logprobs(oai: openai.OpenAI) -> None:
    reply = oai.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3)
    found = reply.choices[0].logprobs.content
    assert len(found) == 5
    assert "".join(each.token for each in found) == reply.choices[0].message.content
    for each in found:
        assert bytes(each.bytes).decode() == each.token
        assert each.logprob <= 0 and len(each.top_logprobs) == 3
        assert each.top_logprobs[0].token == each.token  # greedy takes the likeliest
        assert math.isclose(each.top_logprobs[0].logprob, each.logprob, abs_tol=1e-4)
        assert sum(math.exp(top.logprob) for top in each.top_logprobs) <= 1.0001
    stream = oai.chat.completions.create(**GREEDY, logprobs=True, stream=True)
    streamed = [e for c in stream if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in found]
    assert all(e.top_logprobs == [] for e in streamed)


def test_openai_biases_and_penalties(oai: openai.OpenAI, server: RunningServer) -> None:
    tokens = server.ask("POST /tokenize", {"model": MODEL, "content": "Hello"}).json()["tokens"]
    assert len(tokens) == 1
    banned = oai.chat.completions.create(**GREEDY, logit_bias={str(tokens[0]): -100})
    assert not banned.choices[0].message.content.startswith("Hello")
    forced = oai.chat.completions.create(**GREEDY, logit_bias={str(tokens[0]): 100})
    assert forced.choices[0].message.content == "Hello" * 5
    prompt = {"model": MODEL, "prompt": CATS, "temperature": 0, "max_tokens": 6}
    plain = oai.completions.create(**prompt).choices[0].text
    assert plain == " the cat, the cat,"
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert oai.completions.create(**prompt, **penalty).choices[0].text != plain


class Verdict(BaseModel):
    ok: bool


def test_openai_structured_output(oai: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    body = {**GREEDY, "max_tokens": 40}
    reply = oai.chat.completions.create(**body, response_format=form)
    jsonschema.validate(json.loads(reply.choices[0].message.content), SCHEMA)
    streamed = oai.chat.completions.create(**body, response_format=form, stream=True)
    text = "".join(c.choices[0].delta.content or "" for c in streamed)
    assert text == reply.choices[0].message.content
    parsed = oai.chat.completions.parse(**body, response_format=Verdict)
    assert isinstance(parsed.choices[0].message.parsed, Verdict)
    free = oai.chat.completions.create(**{**body, "max_tokens": 60}, response_format=JSON)
    content = free.choices[0].message.content
    assert content.lstrip().startswith("{")
    if free.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(content), dict)
    with oai.chat.completions.stream(**body, response_format=Verdict) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Verdict)


JSON = {"type": "json_object"}


# ---- openai: tools


def function(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "description": f"Tells the {name}.", "parameters": parameters},
    }


TOOLS = [function("weather", WEATHER), function("time", TIME)]
TOOL_BODY = {**GREEDY, "tools": TOOLS, "max_tokens": 60}


def test_openai_forced_tool_calls(oai: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, names in (("required", {"weather", "time"}), (named, {"weather"})):
        body = {**TOOL_BODY, "tool_choice": choice, "parallel_tool_calls": False}
        reply = oai.chat.completions.create(**body).choices[0]
        (call,) = reply.message.tool_calls
        assert reply.finish_reason == "tool_calls"
        assert call.type == "function" and call.function.name in names
        schema = WEATHER if call.function.name == "weather" else TIME
        jsonschema.validate(json.loads(call.function.arguments), schema)
        assert not reply.message.content
        chunks = list(oai.chat.completions.create(**body, stream=True))
        deltas = [d for c in chunks if c.choices for d in c.choices[0].delta.tool_calls or []]
        assert deltas[0].function.name == call.function.name and deltas[0].id
        assert {d.index for d in deltas} == {0}
        arguments = "".join(d.function.arguments or "" for d in deltas)
        assert json.loads(arguments) == json.loads(call.function.arguments)
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
    with oai.chat.completions.stream(**body) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.name == "weather"


def test_openai_tools_that_need_not_be_called(oai: openai.OpenAI) -> None:
    never = oai.chat.completions.create(**{**TOOL_BODY, "max_tokens": 6}, tool_choice="none")
    plain = oai.chat.completions.create(**GREEDY)
    # Without a choice the model does not hear of the tools at all.
    assert never.choices[0].message.content.startswith(plain.choices[0].message.content)
    assert never.usage.prompt_tokens == plain.usage.prompt_tokens
    maybe = oai.chat.completions.create(**{**TOOL_BODY, "max_tokens": 6}, tool_choice="auto")
    message = maybe.choices[0].message
    assert message.content or message.tool_calls
    assert maybe.usage.prompt_tokens > plain.usage.prompt_tokens


def test_openai_a_tools_result_goes_back(oai: openai.OpenAI) -> None:
    body = {**TOOL_BODY, "tool_choice": "required", "parallel_tool_calls": False}
    first = oai.chat.completions.create(**body).choices[0].message
    call = first.tool_calls[0]
    messages = [
        *HI,
        first.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "It is sunny."},
    ]
    reply = oai.chat.completions.create(**{**GREEDY, "messages": messages, "tools": TOOLS})
    assert reply.choices[0].message.content or reply.choices[0].message.tool_calls
    # The result has reached the model.
    other = [*messages[:-1], {**messages[-1], "content": "It is very sunny indeed."}]
    longer = oai.chat.completions.create(**{**GREEDY, "messages": other, "tools": TOOLS})
    assert longer.usage.prompt_tokens > reply.usage.prompt_tokens


# ---- openai: the rest


def test_openai_completions(oai: openai.OpenAI, server: RunningServer) -> None:
    body = {"model": MODEL, "temperature": 0, "max_tokens": 4}
    reply = oai.completions.create(prompt=FRANCE, **body)
    assert "Paris" in reply.choices[0].text
    assert (reply.object, reply.choices[0].finish_reason) == ("text_completion", "length")
    content = {"model": MODEL, "content": FRANCE, "add_special": True}
    tokens = server.ask("POST /tokenize", content).json()["tokens"]
    by_tokens = oai.completions.create(prompt=tokens, **body)
    assert by_tokens.choices[0].text == reply.choices[0].text
    two = oai.completions.create(prompt=[CATS, FRANCE], n=2, **body)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[1].text != two.choices[2].text
    echoed = oai.completions.create(prompt=FRANCE, echo=True, **body)
    assert echoed.choices[0].text == FRANCE + two.choices[2].text
    streamed = oai.completions.create(prompt=FRANCE, stream=True, **body)
    assert "".join(c.choices[0].text for c in streamed if c.choices) == two.choices[2].text
    likely = oai.completions.create(prompt=FRANCE, logprobs=2, **body).choices[0].logprobs
    assert "".join(likely.tokens) == two.choices[2].text
    assert all(len(top) == 2 and max(top.values()) <= 0 for top in likely.top_logprobs)
    assert len(likely.token_logprobs) == len(likely.text_offset) == 4
    with pytest.raises(openai.BadRequestError) as caught:
        oai.completions.create(prompt="a", suffix="b", **body)
    assert caught.value.param == "suffix"


def test_openai_responses(oai: openai.OpenAI) -> None:
    body = {"model": MODEL, "temperature": 0, "max_output_tokens": 40}
    reply = oai.responses.create(input="Hi", **body)
    assert reply.output_text.startswith(HELLO)
    assert (reply.status, reply.object) == ("completed", "response")
    assert 9 <= reply.usage.output_tokens < 40
    told = oai.responses.create(input=[{"role": "user", "content": "Hi"}], **body)
    assert told.output_text.startswith(HELLO)
    events = list(oai.responses.create(input="Hi", stream=True, **body))
    assert [e.type for e in events][:2] == ["response.created", "response.in_progress"]
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "".join(deltas)
    assert "".join(deltas).startswith(HELLO)
    assert [e.sequence_number for e in events] == list(range(len(events)))
    cut = oai.responses.create(instructions="Be brief.", **{**body, **SHORT})
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    with oai.responses.stream(input="Hi", **body) as stream:
        assert stream.get_final_response().output_text.startswith(HELLO)
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    formed = oai.responses.create(input="Hi", text=form, **body)
    jsonschema.validate(json.loads(formed.output_text), SCHEMA)
    parsed = oai.responses.parse(input="Hi", text_format=Verdict, **body)
    assert isinstance(parsed.output_parsed, Verdict)


SHORT = {"max_output_tokens": 16, "input": "Tell me a long story."}


def test_openai_responses_call_tools(oai: openai.OpenAI) -> None:
    tool = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": False}
    body: dict[str, Any] = {"model": MODEL, "temperature": 0, "tools": [tool]}
    reply = oai.responses.create(input="Hi", tool_choice="required", max_output_tokens=60, **body)
    call = next(item for item in reply.output if item.type == "function_call")
    jsonschema.validate(json.loads(call.arguments), WEATHER)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    whole = [{"role": "user", "content": "Hi"}, call.model_dump(exclude_none=True), result]
    last = oai.responses.create(input=whole, max_output_tokens=16, **body)
    assert last.usage.input_tokens > reply.usage.input_tokens


def test_openai_embeddings(oai: openai.OpenAI) -> None:
    texts = ["the cat sat", "the dog ran on"]
    reply = oai.embeddings.create(model=EMBED, input=texts)  # the client asks for base64
    rows = [each.embedding for each in reply.data]
    assert [each.index for each in reply.data] == [0, 1]
    assert all(math.isclose(math.hypot(*row), 1, abs_tol=1e-5) for row in rows)
    assert reply.usage.prompt_tokens == 5 + 6
    floats = oai.embeddings.create(model=EMBED, input=texts, encoding_format="float")
    assert [each.embedding for each in floats.data] == [
        pytest.approx(row, abs=1e-6) for row in rows
    ]
    coded = oai.embeddings.create(model=EMBED, input=texts[0], encoding_format="base64")
    data = base64.b64decode(coded.data[0].embedding)  # type: ignore[arg-type]
    assert struct.unpack(f"<{len(data) // 4}f", data) == pytest.approx(rows[0], abs=1e-6)
    short = oai.embeddings.create(model=EMBED, input=texts[0], dimensions=4).data[0].embedding
    length = math.hypot(*rows[0][:4])
    assert short == pytest.approx([value / length for value in rows[0][:4]], abs=1e-5)
    tokens = oai.embeddings.create(model=EMBED, input=[[2, 5, 6, 8, 3]])
    assert len(tokens.data[0].embedding) == len(rows[0])
    # A model that chats gives vectors too.
    assert len(oai.embeddings.create(model=MODEL, input="Hi").data[0].embedding) == 576
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        oai.embeddings.create(model=EMBED, input="a", dimensions=9999)
    with pytest.raises(openai.BadRequestError):
        oai.embeddings.create(model=EMBED, input="a " * 500)


def test_openai_models(oai: openai.OpenAI) -> None:
    assert [model.id for model in oai.models.list()] == [MODEL, EMBED, RANK]
    assert oai.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        oai.models.retrieve("org/none:Q4")


def test_openai_errors(oai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        oai.chat.completions.create(**{**GREEDY, "model": "none"})
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert MODEL in missing.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        oai.chat.completions.create(**{**GREEDY, "temperature": -1})
    assert bad.value.param == "temperature" and bad.value.type == "invalid_request_error"
    long = [{"role": "user", "content": "word " * 5000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as overflow:
            oai.chat.completions.create(**{**GREEDY, "messages": long}, stream=stream)
        assert overflow.value.code == "context_length_exceeded"
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strange"}}}
    with pytest.raises(openai.BadRequestError):
        oai.chat.completions.create(**GREEDY, response_format=form)
    with pytest.raises(openai.BadRequestError, match="bert"):
        oai.chat.completions.create(**{**GREEDY, "model": EMBED})


def test_openai_async(server: RunningServer) -> None:
    async def main() -> None:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            replies = await asyncio.gather(
                *[client.chat.completions.create(**GREEDY) for _ in range(6)]
            )
            texts = [reply.choices[0].message.content for reply in replies]
            assert set(texts) == {HELLO}
            stream = await client.chat.completions.create(**GREEDY, stream=True)
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
            assert text == HELLO
            assert len((await client.embeddings.create(model=EMBED, input="a")).data) == 1
            assert [model.id async for model in client.models.list()] == [MODEL, EMBED, RANK]
            stream = await client.chat.completions.create(
                **{**GREEDY, "max_tokens": 1500}, stream=True
            )
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(main())
    server.until_idle()


# ---- anthropic

# The client's newest versions have no arguments for sampling any more.
CLAUDE: dict[str, Any] = {
    **{"model": MODEL, "messages": HI, "max_tokens": 40},
    "extra_body": {"temperature": 0},
}


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    reply = claude.messages.create(**CLAUDE)
    assert (reply.type, reply.role, reply.model) == ("message", "assistant", MODEL)
    assert reply.content[0].text.startswith(HELLO)
    assert reply.stop_reason == "end_turn" and 9 <= reply.usage.output_tokens < 40
    cut = claude.messages.create(**{**CLAUDE, "max_tokens": 2})
    assert cut.stop_reason == "max_tokens"
    stopped = claude.messages.create(**CLAUDE, stop_sequences=[" can"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " can")
    assert stopped.content[0].text == "Hello! How"
    told = claude.messages.create(**{**CLAUDE, "max_tokens": 3}, system="Be brief.")
    blocks = [{"type": "text", "text": "Be brief."}]
    again = claude.messages.create(**{**CLAUDE, "max_tokens": 3}, system=blocks)
    assert again.content[0].text == told.content[0].text
    with_cache = again.usage.input_tokens + (again.usage.cache_read_input_tokens or 0)
    assert with_cache == told.usage.input_tokens + (told.usage.cache_read_input_tokens or 0)


def test_anthropic_messages_streamed(claude: anthropic.Anthropic) -> None:
    events = list(claude.messages.create(**CLAUDE, stream=True))
    names = [event.type for event in events]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    with claude.messages.stream(**{**CLAUDE, "max_tokens": 5}) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == HELLO
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 5)


def test_anthropic_goes_on_from_the_assistants_words(claude: anthropic.Anthropic) -> None:
    messages = [*HI, {"role": "assistant", "content": "Hello! How can"}]
    reply = claude.messages.create(**{**CLAUDE, "messages": messages})
    assert reply.content[0].text.startswith(" I ")


def test_anthropic_counts_tokens(claude: anthropic.Anthropic) -> None:
    n = claude.messages.count_tokens(model=MODEL, messages=HI).input_tokens
    usage = claude.messages.create(**{**CLAUDE, "max_tokens": 1}).usage
    assert n == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    tool = {"name": "weather", "input_schema": WEATHER}
    with_tools = claude.messages.count_tokens(model=MODEL, messages=HI, tools=[tool])
    assert with_tools.input_tokens > n


def test_anthropic_tools(claude: anthropic.Anthropic) -> None:
    tools = [{"name": "weather", "description": "Tells it.", "input_schema": WEATHER}]
    tools.append({"name": "time", "description": "Tells it.", "input_schema": TIME})
    body = {**CLAUDE, "tools": tools, "max_tokens": 60}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        choice["disable_parallel_tool_use"] = True
        reply = claude.messages.create(**body, tool_choice=choice)
        (block,) = [block for block in reply.content if block.type == "tool_use"]
        assert reply.stop_reason == "tool_use"
        jsonschema.validate(block.input, WEATHER if block.name == "weather" else TIME)
        with claude.messages.stream(**body, tool_choice=choice) as stream:
            streamed = stream.get_final_message()
        same = next(block for block in streamed.content if block.type == "tool_use")
        assert (same.name, same.input) == (block.name, block.input)
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "Sunny."}
    messages = [
        *HI,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True)]},
        {"role": "user", "content": [result]},
    ]
    last = claude.messages.create(**{**body, "messages": messages, "max_tokens": 4})
    assert last.content
    none = claude.messages.create(**{**body, "max_tokens": 4}, tool_choice={"type": "none"})
    assert none.content[0].text.startswith("Hello")


def test_anthropic_models_and_errors(claude: anthropic.Anthropic) -> None:
    assert [model.id for model in claude.models.list()] == [MODEL, EMBED, RANK]
    assert claude.models.retrieve(MODEL).type == "model"
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(**{**CLAUDE, "model": "none"})
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError, match="top_p"):
        claude.messages.create(**{**CLAUDE, "extra_body": {"top_p": 7}})
    long = [{"role": "user", "content": "word " * 5000}]
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long|context"):
        claude.messages.create(**{**CLAUDE, "messages": long})
    with (
        pytest.raises(anthropic.BadRequestError),
        claude.messages.stream(**{**CLAUDE, "messages": long}),
    ):
        pass


def test_anthropic_async(server: RunningServer) -> None:
    async def main() -> None:
        async with anthropic.AsyncAnthropic(
            base_url=server.url, api_key="none", max_retries=0
        ) as client:
            reply = await client.messages.create(**CLAUDE)
            assert reply.content[0].text.startswith(HELLO)
            async with client.messages.stream(**{**CLAUDE, "max_tokens": 5}) as stream:
                text = "".join([piece async for piece in stream.text_stream])
            assert text == HELLO

    asyncio.run(main())


# ---- ollama

OPTIONS = {"temperature": 0, "num_predict": 40}


def test_ollama_chat(llama: ollama.Client) -> None:
    reply = llama.chat(MODEL, messages=HI, options=OPTIONS)
    assert reply.message.content.startswith(HELLO)
    assert (reply.message.role, reply.done, reply.done_reason) == ("assistant", True, "stop")
    assert 9 <= reply.eval_count < 40 and reply.total_duration >= reply.eval_duration > 0
    few = {**OPTIONS, "num_predict": 5}
    parts = list(llama.chat(MODEL, messages=HI, options=few, stream=True))
    assert "".join(part.message.content or "" for part in parts) == HELLO
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    short = llama.chat(MODEL, messages=HI, options={**OPTIONS, "stop": [" can"]})
    assert short.message.content == "Hello! How"


def test_ollama_generate(llama: ollama.Client) -> None:
    reply = llama.generate(MODEL, prompt="Hi", options=OPTIONS)
    assert reply.response.startswith(HELLO)
    few = {**OPTIONS, "num_predict": 5}
    parts = list(llama.generate(MODEL, prompt="Hi", options=few, stream=True))
    assert "".join(part.response for part in parts) == HELLO
    raw = llama.generate(MODEL, prompt=FRANCE, raw=True, options={**OPTIONS, "num_predict": 4})
    assert "Paris" in raw.response and raw.done_reason == "length"
    told = llama.generate(MODEL, prompt="Hi", system="Be brief.", options=OPTIONS)
    assert told.prompt_eval_count != reply.prompt_eval_count


def test_ollama_formats_and_tools(llama: ollama.Client) -> None:
    reply = llama.chat(MODEL, messages=HI, format=SCHEMA, options=OPTIONS)
    jsonschema.validate(json.loads(reply.message.content or ""), SCHEMA)
    text = llama.generate(MODEL, prompt="Hi", format="json", options=OPTIONS).response
    assert text.lstrip()[0] == "{"
    maybe = llama.chat(MODEL, messages=HI, tools=TOOLS, options={**OPTIONS, "num_predict": 6})
    assert maybe.message.content or maybe.message.tool_calls
    back = [
        *HI,
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
        },
        {"role": "tool", "tool_name": "weather", "content": "Sunny."},
    ]
    options = {**OPTIONS, "num_predict": 4}
    last = llama.chat(MODEL, messages=back, tools=TOOLS, options=options)
    assert last.prompt_eval_count > (maybe.prompt_eval_count or 0)


def test_ollama_a_model_that_does_not_think_answers_all_the_same(llama: ollama.Client) -> None:
    for think in (True, False, None):
        reply = llama.chat(MODEL, messages=HI, think=think, options=OPTIONS)
        assert reply.message.content.startswith(HELLO)
        assert reply.message.thinking is None


def test_ollama_loads_and_unloads(tmp_path: Path) -> None:
    TinyBert().write(tmp_path / "bert.gguf")
    name = "tiny-Q8_0"
    path = Path(Cli(tmp_path).model(f"{name}.gguf"))
    with real_server(tmp_path, path, pinned=False) as server:
        client = ollama.Client(host=server.url)
        assert client.ps().models == []
        loaded = client.generate(name)
        assert (loaded.done, loaded.done_reason, loaded.response) == (True, "load", "")
        (running,) = client.ps().models
        assert running.model == name and running.expires_at is not None
        gone = client.generate(name, keep_alive=0)
        assert (gone.done, gone.done_reason) == (True, "unload")
        server.until(lambda: not server.host.loaded(), "the unloading")
        assert client.chat(name, keep_alive=-1).done_reason == "load"
        assert len(client.ps().models) == 1
        assert client.generate(name, "Hi", keep_alive=0, options={"num_predict": 2}).done
        server.until(lambda: not server.host.loaded(), "the unloading")
        client.close()


def test_ollama_embed(llama: ollama.Client) -> None:
    one = llama.embed(EMBED, input="the cat sat")
    two = llama.embed(EMBED, input=["the cat sat", "the dog ran"])
    assert len(two.embeddings) == 2
    assert two.embeddings[0] == pytest.approx(one.embeddings[0], abs=1e-5)
    assert math.isclose(math.hypot(*one.embeddings[0]), 1, abs_tol=1e-5)
    assert len(llama.embed(EMBED, input="a", dimensions=4).embeddings[0]) == 4
    assert one.prompt_eval_count == 5
    assert len(llama.embed(EMBED, input="a " * 500).embeddings) == 1  # cut, as it is asked to be
    with pytest.raises(ollama.ResponseError):
        llama.embed(EMBED, input="a " * 500, truncate=False)
    old = llama.embeddings(EMBED, prompt="the cat sat").embedding
    assert len(old) == len(one.embeddings[0])


def test_ollama_models(llama: ollama.Client) -> None:
    assert [model.model for model in llama.list().models] == [MODEL, EMBED, RANK]
    shown = llama.show(MODEL)
    assert shown.details.quantization_level == "Q4_1" and shown.details.family == "llama"
    assert "completion" in shown.capabilities and "<|im_start|>" in shown.template
    assert {model.model for model in llama.ps().models} >= {MODEL, EMBED}
    with pytest.raises(ollama.ResponseError) as missing:
        llama.show("none")
    assert missing.value.status_code == 404
    with pytest.raises(ollama.ResponseError) as absent:
        list(llama.chat("qwen3-0.6b", messages=HI, stream=True))
    assert absent.value.status_code == 404 and "llmrun pull qwen3-0.6b" in absent.value.error


def test_ollama_async(server: RunningServer) -> None:
    async def main() -> None:
        client = ollama.AsyncClient(host=server.url)
        try:
            reply = await client.chat(MODEL, messages=HI, options=OPTIONS)
            assert reply.message.content.startswith(HELLO)
            options = {**OPTIONS, "num_predict": 5}
            parts = await client.generate(MODEL, "Hi", stream=True, options=options)
            assert [part async for part in parts][-1].done
        finally:
            await client.close()

    asyncio.run(main())


# ---- the rest


def test_documents_are_ordered(server: RunningServer) -> None:
    body = {"model": RANK, "query": "what is a cat", "documents": ["a dog", "a cat sat", "moon"]}
    found = server.ask("POST /v1/rerank", body).json()["results"]
    scores = [each["relevance_score"] for each in found]
    assert scores == sorted(scores, reverse=True)
    assert sorted(each["index"] for each in found) == [0, 1, 2]


def test_tokens_there_and_back(server: RunningServer) -> None:
    text = "Grüße, 世界! <|im_end|>"
    tokens = server.ask("POST /tokenize", {"model": MODEL, "content": text}).json()["tokens"]
    back = server.ask("POST /detokenize", {"model": MODEL, "tokens": tokens}).json()
    assert back["content"] == text
    assert server.ask("POST /detokenize", {"model": MODEL, "tokens": [10**6]}).status == 400


def test_health_metrics_and_the_description(server: RunningServer) -> None:
    health = server.ask("GET /health").json()
    assert health["status"] == "ready" and health["loading"] == []
    assert {"name": MODEL, "running": 0, "parallel": 4} in health["models"]
    metrics = server.ask("GET /metrics").body.decode()
    for name in ("llmrun_requests_total{", "llmrun_generated_tokens_total{", "llmrun_running{"):
        assert name in metrics
    assert f'llmrun_kv_cells{{model="{MODEL}"}}' in metrics
    paths = server.ask("GET /openapi.json").json()["paths"]
    routes = {
        (route.path, method.lower())
        for route in build_app(server.service).routes
        for method in getattr(route, "methods", None) or ()
        if getattr(route, "include_in_schema", False)
    }
    assert {(path.replace(":path", ""), method) for path, method in routes} == {
        (path, method) for path, methods in paths.items() for method in methods
    }
    for path, methods in paths.items():
        if "post" in methods:
            schema = methods["post"]["requestBody"]["content"]["application/json"]["schema"]
            jsonschema.Draft202012Validator.check_schema(schema)
            assert schema["properties"], path
