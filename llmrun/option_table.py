"""Every option once: a flag, an `LLMRUN_*` variable and a key of `config.toml` all come from one
row of `OPTIONS`, so that they cannot drift apart. How they are read: `config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["flag", "switch", "count", "text", "texts", "int", "float", "shares", "choice"]
"""`flag`: on when given. `switch`: `--x/--no-x`. `count`: may be repeated. `texts`: a list.
`shares`: positive numbers with commas between them, or a list of numbers."""

Group = Literal[
    "common", "hub", "load", "streams", "sampling", "prompt", "run", "chat", "prefix", "serve",
    "config",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Option:
    """One option. `key` is config key and field of Settings; the flag is `--key-with-dashes`.

    `words` are accepted beside a number (`auto`, `all`), or are all that is accepted (`choice`).
    The word in `none_word` is stored as None. `is_secret`: the value is never shown.
    """

    key: str
    kind: Kind
    group: Group
    help: str
    default: Any = None
    words: tuple[str, ...] = ()
    none_word: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    is_secret: bool = False

    @property
    def env_name(self) -> str:
        return f"LLMRUN_{self.key.upper()}"

    @property
    def flag_names(self) -> tuple[str, ...]:
        dashed = "--" + self.key.replace("_", "-")
        if self.flags:
            return self.flags
        return (f"{dashed}/--no-{dashed[2:]}",) if self.kind == "switch" else (dashed,)


MAX_SHARES = 16  # GGML_SCHED_MAX_BACKENDS
KV_TYPES = ("f16", "q8_0", "q4_0", "bf16", "f32")

OPTIONS: tuple[Option, ...] = (
    Option("json", "flag", "common", "Print one JSON envelope instead of text.", False),
    Option("quiet", "flag", "common", "Only results and errors.", False, flags=("-q", "--quiet")),
    Option(
        "verbose",
        "count",
        "common",
        "More about what happens; -vv with llama.cpp's log.",
        0,
        minimum=0,
        maximum=3,
        flags=("-v", "--verbose"),
    ),
    Option(
        "yes", "flag", "common", "Answer every question with yes.", False, flags=("-y", "--yes")
    ),
    Option("offline", "flag", "common", "Never use the network.", False),
    Option("force", "flag", "hub", "Go on although the model will not fit.", False),
    Option(
        "ctx",
        "int",
        "load",
        "Context in tokens, or auto.",
        words=("auto",),
        none_word="auto",
        minimum=16,
        maximum=1 << 27,
        metavar="N|auto",
    ),
    Option(
        "gpu_layers",
        "int",
        "load",
        "Layers on the GPU.",
        "auto",
        words=("auto", "all"),
        minimum=0,
        maximum=100_000,
        metavar="N|auto|all",
    ),
    Option(
        "cpu_moe",
        "int",
        "load",
        "Keep the experts of the first N layers in RAM.",
        "auto",
        words=("auto", "all"),
        minimum=0,
        maximum=100_000,
        metavar="N|auto|all",
    ),
    Option(
        "tensor_split",
        "shares",
        "load",
        "Each GPU's share of the layers, such as 3,1.",
        (),
        words=("auto",),
        minimum=0,
        maximum=1_000_000,
        metavar="A,B|auto",
    ),
    Option("kv_type", "choice", "load", "Type of the KV cache.", "auto", words=("auto", *KV_TYPES)),
    Option("flash_attn", "choice", "load", "FlashAttention.", "auto", words=("auto", "on", "off")),
    Option(
        "ubatch",
        "int",
        "load",
        "Tokens of a prompt that are read in one step, or auto.",
        words=("auto",),
        none_word="auto",
        minimum=16,
        maximum=1 << 16,
        metavar="N|auto",
    ),
    Option(
        "speculative",
        "choice",
        "load",
        "Guess tokens and check several in one step, where it pays.",
        "auto",
        words=("auto", "off", "ngram", "draft"),
    ),
    Option(
        "draft_model",
        "text",
        "load",
        "The smaller model that guesses with --speculative draft.",
        metavar="NAME|PATH",
    ),
    Option(
        "threads",
        "int",
        "load",
        "CPU threads, or auto.",
        words=("auto",),
        none_word="auto",
        minimum=1,
        maximum=4096,
        metavar="N|auto",
    ),
    Option(
        "kv_unified",
        "choice",
        "streams",
        "One KV cache for all requests at once, or off: one for each.",
        "auto",
        words=("auto", "on", "off"),
    ),
    Option("model", "text", "config", "The model that chat opens when none is named."),
    Option(
        "max_tokens", "int", "sampling", "Stop after this many tokens.", minimum=1, maximum=1 << 27
    ),
    Option("seed", "int", "sampling", "Seed of the sampler.", minimum=0, maximum=(1 << 32) - 1),
    Option("temperature", "float", "sampling", "0 is greedy.", minimum=0, maximum=100),
    Option(
        "top_k", "int", "sampling", "Keep the K best tokens; 0 is off.", minimum=0, maximum=1 << 30
    ),
    Option("top_p", "float", "sampling", "Nucleus; 1 is off.", minimum=0, maximum=1),
    Option(
        "min_p",
        "float",
        "sampling",
        "Least share of the best token's probability; 0 is off.",
        minimum=0,
        maximum=1,
    ),
    Option(
        "typical_p",
        "float",
        "sampling",
        "Locally typical sampling; 1 is off.",
        minimum=0,
        maximum=1,
    ),
    Option(
        "xtc_probability",
        "float",
        "sampling",
        "Chance of excluding top choices; 0 is off.",
        minimum=0,
        maximum=1,
    ),
    Option(
        "xtc_threshold",
        "float",
        "sampling",
        "Least probability of an excluded choice.",
        minimum=0,
        maximum=1,
    ),
    Option(
        "dry_multiplier",
        "float",
        "sampling",
        "Penalty on repeated sequences; 0 is off.",
        minimum=0,
        maximum=100,
    ),
    Option(
        "repeat_penalty",
        "float",
        "sampling",
        "Penalty on repeated tokens; 1 is off.",
        minimum=0,
        maximum=100,
    ),
    Option(
        "frequency_penalty",
        "float",
        "sampling",
        "Penalty by count; 0 is off.",
        minimum=-100,
        maximum=100,
    ),
    Option(
        "presence_penalty",
        "float",
        "sampling",
        "Penalty by presence; 0 is off.",
        minimum=-100,
        maximum=100,
    ),
    Option("stop", "texts", "sampling", "Stop before this text; may be repeated.", ()),
    Option(
        "logit_bias",
        "texts",
        "sampling",
        "Add BIAS to a token's logit; may be repeated.",
        (),
        metavar="TOKEN=BIAS",
    ),
    Option("system", "text", "prompt", "The system message."),
    Option("think", "switch", "prompt", "Let the model think first, or not."),
    Option("hide_thinking", "flag", "prompt", "Do not show the thinking.", False),
    Option("raw", "flag", "run", "No chat template, no escaping: plain completion.", False),
    Option(
        "json_schema",
        "text",
        "run",
        "The answer always fits this JSON schema.",
        metavar="FILE|TEXT",
    ),
    Option("grammar", "text", "run", "The answer always fits this GBNF grammar.", metavar="FILE"),
    Option(
        "prompt_cache", "flag", "run", "Keep what was read on disk, and use what was kept.", False
    ),
    Option("stats", "flag", "run", "Tokens and speed, on stderr.", False),
    Option("markdown", "switch", "chat", "Render answers as Markdown."),
    Option(
        "context_shift",
        "flag",
        "chat",
        "Drop the oldest exchanges when the context is full.",
        False,
    ),
    Option(
        "prefix_gb",
        "float",
        "prefix",
        "Disk space for what was read, in GB; 0 keeps nothing.",
        2.0,
        minimum=0,
        maximum=100_000,
    ),
    Option("host", "text", "serve", "The address to listen on.", "127.0.0.1", metavar="ADDRESS"),
    Option("port", "int", "serve", "0 takes a free one.", 8080, minimum=0, maximum=65535),
    Option(
        "parallel",
        "int",
        "serve",
        "Requests that one model works on at once.",
        words=("auto",),
        none_word="auto",
        minimum=1,
        maximum=256,
        metavar="N|auto",
    ),
    Option(
        "max_queue",
        "int",
        "serve",
        "Requests that may wait for one model; more are told to come again.",
        64,
        minimum=0,
        maximum=100_000,
    ),
    Option(
        "keep_alive",
        "text",
        "serve",
        "How long a model stays loaded when nobody asks: 300, 5m, 1h, or -1 for good.",
        "5m",
        metavar="TIME",
    ),
    Option("allow_pull", "flag", "serve", "Download a model that a request asks for.", False),
    Option(
        "allow_grammar",
        "flag",
        "serve",
        "Take grammars as they are from requests; one can keep a model busy for ever.",
        False,
    ),
    Option(
        "api_key",
        "text",
        "serve",
        "Answer only who shows this key.",
        metavar="KEY",
        is_secret=True,
    ),
    Option("api_key_file", "text", "serve", "Keys that are accepted, one a line.", metavar="FILE"),
    Option("insecure", "flag", "serve", "Listen on other addresses without any key.", False),
    Option(
        "allowed_host",
        "texts",
        "serve",
        "A further name that this server is called by; may be repeated.",
        (),
        metavar="NAME",
    ),
    Option(
        "cors_origin",
        "texts",
        "serve",
        "A web page's origin that may ask from a browser; may be repeated.",
        (),
        metavar="ORIGIN",
    ),
    Option(
        "drain",
        "float",
        "serve",
        "Seconds that running requests get when the server is told to end.",
        30.0,
        minimum=0,
        maximum=86_400,
        metavar="SECONDS",
    ),
    Option("ui", "switch", "serve", "The web chat at /.", True),
)

OPTION_BY_KEY: Mapping[str, Option] = {option.key: option for option in OPTIONS}
