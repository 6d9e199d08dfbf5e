"""What goes into the engine and what comes out of it.

Tokens are ints of the model's vocabulary; a position counts from 0; times are seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled"]
"""`stop`: an end token or stop string. `length`: max_tokens or the end of the context."""

KvType = Literal["f16", "q8_0", "q4_0", "bf16", "f32"]
FlashAttn = Literal["auto", "on", "off"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is loaded. Names are llama.cpp's. None means: let the engine choose.

    n_ctx is the size of the KV cache in tokens, shared by all sequences (llama.cpp pads it to 256).
    n_seq_max is the number of sequences that can be in the cache at once.
    n_gpu_layers: -1 is all. use_mmap: leave the weights in the page cache (llama.cpp may still read
    them where the device needs that). use_repack: let the CPU copy weights into its own layout.
    n_cpu_moe: the experts of the first so many layers stay in RAM, whatever n_gpu_layers says.
    tensor_split: each GPU's share of the layers, in the engine's order; empty: by free memory.
    """

    n_ctx: int = 4096
    n_seq_max: int = 1
    n_ubatch: int = 512
    n_gpu_layers: int = -1
    n_threads: int | None = None
    n_threads_batch: int | None = None
    type_k: KvType = "f16"
    type_v: KvType = "f16"
    flash_attn: FlashAttn = "auto"
    use_mmap: bool = True
    use_repack: bool = True
    check_tensors: bool = False
    n_cpu_moe: int = 0
    tensor_split: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one request, applied in llama.cpp's order. The defaults are llama.cpp's own.

    temperature 0 is greedy. Off values: top_k 0, top_p 1, min_p 0, typical_p 1, penalties 1/0/0,
    xtc_probability 0, dry_multiplier 0. seed None draws one at random. `grammar` is GBNF with a
    rule named `root`.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = -1
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One generation.

    `prompt` is the whole token sequence, also when its start is in the cache already: the engine
    finds and reuses the longest valid prefix by itself. `max_tokens` None: until an end token or
    the end of the context. `show_special`: control tokens appear in the text (for parsers that need
    them); end tokens never do. Text from a stop string on is not emitted.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    show_special: bool = False
    ignore_eog: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """`n_cached` of the `n_prompt` tokens were not computed again."""

    n_prompt: int
    n_completion: int
    n_cached: int


@dataclass(frozen=True, slots=True)
class Timings:
    """`ttft_s` runs from submit to the first sampled token. Rates are tokens a second, or 0."""

    ttft_s: float
    prompt_tok_s: float
    decode_tok_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class TextEvent:
    """Newly finished text, whole characters only, and the tokens sampled since the last event."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """Progress of reading a long prompt: `n_done` of `n_total` tokens are in the cache."""

    n_done: int
    n_total: int


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The last event of a stream. `seed` is the one that was used."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    stop: str | None = None


Event = TextEvent | PromptEvent | FinishEvent


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the loaded model says about itself. `chat_template` is its Jinja source."""

    description: str
    n_params: int
    n_bytes: int
    n_ctx_train: int
    n_embd: int
    n_layers: int
    n_vocab: int
    n_swa: int
    is_recurrent: bool
    is_hybrid: bool
    chat_template: str | None
    bos_text: str
    eos_text: str


@dataclass(frozen=True, slots=True)
class SpecialLiteral:
    """A special token's text as it occurs in some plain text. `is_control`: CONTROL or UNKNOWN;
    otherwise USER_DEFINED, which llama.cpp matches even in text tokenized without specials."""

    text: str
    is_control: bool


class Tokenizer(Protocol):
    """The model's vocabulary. All methods may be called from any thread."""

    @property
    def n_vocab(self) -> int: ...

    @property
    def adds_bos(self) -> bool:
        """Whether plain text gets a BOS token in front (`add_special=True` does it)."""

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Tokens of `text`. `add_special` adds BOS/EOS as the model wants; rendered chat templates
        hold them already. `parse_special` turns the text of control tokens into these tokens."""

    def piece(self, token: int) -> bytes:
        """The token's bytes, special tokens as their text; may be a part of a UTF-8 character."""

    def is_eog(self, token: int) -> bool: ...

    def is_control(self, token: int) -> bool: ...

    def special_literals(self, text: str) -> tuple[SpecialLiteral, ...]:
        """The special tokens' texts that occur in `text`, each once. Empty for harmless text."""


class StreamLike(Protocol):
    """A running generation, as chat, server and bench see it (see `engine.loop.Stream`)."""

    def __iter__(self) -> StreamLike: ...

    def __next__(self) -> Event:
        """The next event; StopIteration after the FinishEvent. Raises a failure's LlmrunError."""

    def cancel(self) -> None:
        """Ask for an end within one micro-batch; a FinishEvent("cancelled") still follows."""


class EngineLike(Protocol):
    """The engine as chat, repl, server and bench see it (see `engine.loop.Engine`)."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def n_ctx(self) -> int: ...

    @property
    def load_s(self) -> float: ...

    def submit(self, request: Request) -> StreamLike:
        """Start a generation. Raises ContextOverflowError when the prompt has more than n_ctx
        tokens, UsageError when it is empty."""

    def close(self) -> None: ...


LoadProgress = Callable[[float], bool]
"""Called with 0.0 … 1.0 while a model loads; returning False cancels."""
