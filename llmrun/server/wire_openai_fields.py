"""What chat and legacy completions of the OpenAI dialect ask for alike: sampling, length, stop
strings, the form of the answer, streaming. Pure; every function raises only ApiError.

Beside the dialect's own names there are those that local servers added and clients use:
`top_k`, `min_p`, `typical_p`, `repeat_penalty` or `repetition_penalty`, `repeat_last_n`,
`n_predict`, `json_schema`, `grammar`, `ignore_eos`, `keep_alive`.
"""

from __future__ import annotations

import re

from llmrun.server.reading import Fields
from llmrun.server.types import Generation, SamplingWishes

MAX_N = 16
MAX_TOP_LOGPROBS = 20
MAX_TOKEN = (1 << 31) - 1
_MAX_STOPS, _MAX_STOP_CHARS = 16, 1024
_MAX_BIASES = 4096
_MAX_GRAMMAR_CHARS = 256 * 1024
_MAX_MODEL_CHARS = 512
_MAX_TOKENS = 1 << 27
_BAN = -100.0
_ANY_OBJECT = '{"type": "object"}'

_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([+-]?)((?:\d{1,9}(?:\.\d{1,9})?(?:ns|us|µs|ms|s|m|h))+)", re.ASCII)
_DURATION_PART = re.compile(r"([\d.]+)(ns|us|µs|ms|s|m|h)", re.ASCII)
_PLAIN_SECONDS = re.compile(r"[+-]?\d{1,9}(?:\.\d{1,9})?", re.ASCII)
_MAX_KEEP_ALIVE_S = 1e9


def read_generation(
    fields: Fields, *, n_logprobs: int | None, default_max_tokens: int | None = None
) -> Generation:
    """All that a request says about the text to be made. `n_logprobs` is the endpoint's own to
    read."""
    json_schema, grammar = _read_form(fields)
    stream = fields.flag("stream")
    return Generation(
        model=fields.text("model", max_chars=_MAX_MODEL_CHARS),
        sampling=_read_sampling(fields),
        max_tokens=_read_max_tokens(fields, default_max_tokens),
        stop=_read_stop(fields),
        n=fields.integer("n", 1, low=1, high=MAX_N) or 1,
        n_logprobs=n_logprobs,
        json_schema=json_schema,
        grammar=grammar,
        stream=stream,
        include_usage=_wants_usage(fields) and stream,
        keep_alive_s=read_keep_alive(fields),
        ignore_eog=fields.flag("ignore_eos"),
    )


def _read_sampling(fields: Fields) -> SamplingWishes:
    top_k = fields.integer("top_k", low=-1, high=1 << 30)
    seed = fields.integer("seed", low=-(1 << 63), high=(1 << 64) - 1)
    name = "repeat_penalty" if fields.has("repeat_penalty") else "repetition_penalty"
    return SamplingWishes(
        temperature=fields.number("temperature", low=0, high=5),
        # -1 is another word for "off".
        top_k=None if top_k is None else max(top_k, 0),
        top_p=fields.number("top_p", low=0, high=1),
        min_p=fields.number("min_p", low=0, high=1),
        typical_p=fields.number("typical_p", low=0, high=1),
        repeat_penalty=fields.number(name, low=0.01, high=10),
        repeat_last_n=fields.integer("repeat_last_n", low=-1, high=1 << 20),
        frequency_penalty=fields.number("frequency_penalty", low=-2, high=2),
        presence_penalty=fields.number("presence_penalty", low=-2, high=2),
        seed=None if seed == -1 else seed,
        logit_bias=_read_biases(fields),
    )


def _read_biases(fields: Fields) -> tuple[tuple[int, float], ...]:
    biases = fields.object("logit_bias")
    if biases is None:
        return ()
    names = list(biases.names())
    if len(names) > _MAX_BIASES:
        raise fields.error("logit_bias", f"must not have more than {_MAX_BIASES} members")
    found: dict[int, float] = {}
    for name in names:
        if not re.fullmatch(r"[0-9]{1,10}", name) or int(name) > MAX_TOKEN:
            raise fields.error("logit_bias", "must have the numbers of tokens as names")
        bias = biases.number(name, low=-100, high=100)
        if bias is not None:
            found[int(name)] = float("-inf") if bias == _BAN else bias
    return tuple(found.items())


def _read_max_tokens(fields: Fields, default: int | None) -> int | None:
    """None: no limit, which is also what -1 means."""
    value = default
    for name in ("n_predict", "max_tokens", "max_completion_tokens"):
        value = fields.integer(name, value, low=-1, high=_MAX_TOKENS)
    return None if value == -1 else value


def _read_stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.texts("stop", max_items=_MAX_STOPS, max_chars=_MAX_STOP_CHARS)
    if "" in stop:
        raise fields.error("stop", "must not have empty strings")
    return stop


def _wants_usage(fields: Fields) -> bool:
    options = fields.object("stream_options")
    return options is not None and options.flag("include_usage")


def _read_form(fields: Fields) -> tuple[str | None, str | None]:
    """The schema and the grammar of the answer, at most one of them."""
    wanted = fields.object("response_format")
    from_format = None if wanted is None else _read_format(wanted)
    schema = fields.json_text("json_schema")
    grammar = fields.text("grammar", max_chars=_MAX_GRAMMAR_CHARS)
    given = {"response_format": from_format, "json_schema": schema, "grammar": grammar or None}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise fields.error(names[1], f"cannot be given beside {names[0]}")
    schema = from_format or schema
    if schema is not None and len(schema) > _MAX_GRAMMAR_CHARS:
        raise fields.error(names[0], f"must not have more than {_MAX_GRAMMAR_CHARS} characters")
    return schema, grammar or None


def _read_format(wanted: Fields) -> str | None:
    """The text of the schema that `response_format` asks for; None for any text."""
    wanted.require("type")
    kind = wanted.choice("type", ("text", "json_object", "json_schema"))
    if kind == "text":
        return None
    if kind == "json_object":
        # llama.cpp's server takes a schema here too.
        return wanted.json_text("schema") or _ANY_OBJECT
    wanted.require("json_schema")
    inner = wanted.object("json_schema")
    assert inner is not None
    return inner.json_text("schema") or _ANY_OBJECT


def read_keep_alive(fields: Fields, name: str = "keep_alive") -> float | None:
    """Seconds as a number, or a duration such as `5m` or `1h30m`; negative: for good."""
    value = fields.value(name)
    if not isinstance(value, str):
        return fields.number(name, low=-_MAX_KEEP_ALIVE_S, high=_MAX_KEEP_ALIVE_S)
    text = value.strip()
    if _PLAIN_SECONDS.fullmatch(text):
        return float(text)
    match = _DURATION.fullmatch(text)
    if match is None:
        raise fields.error(name, "must be a number of seconds or a duration such as 5m or 1h30m")
    sign, parts = match.groups()
    seconds = sum(float(n) * _SECONDS[unit] for n, unit in _DURATION_PART.findall(parts))
    if seconds > _MAX_KEEP_ALIVE_S:
        raise fields.error(name, "is too long")
    return -seconds if sign == "-" else seconds
