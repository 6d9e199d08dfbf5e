"""What goes into the engine and what comes out of it.

Tokens are ints of the model's vocabulary; a position counts from 0; times are seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "cancelled"]
"""`stop`: an end token or stop string. `length`: max_tokens or the end of the context."""

KvType = Literal["f16", "q8_0", "q4_0", "bf16", "f32"]
FlashAttn = Literal["auto", "on", "off"]
Speculative = Literal["auto", "off", "ngram", "draft"]
"""`ngram`: guess what repeats earlier text. `draft`: a second, small model guesses. `auto`: what
needs no second model, so `ngram`. A guess is only made and checked where the measured costs say
that it pays."""

N_DRAFT_MAX = 31
"""Guesses in one step, of all sequences together. With the row that is there without them they are
the 32 rows up to which small batches are cheap."""

N_LOGPROBS_MAX = 20
"""Likely tokens that a request can ask for at each place."""

NO_LOGPROB = -9999.0
"""The log probability of a token that cannot come at all. There is no infinity and no NaN, which
JSON has no words for."""

StateBytes = bytes | bytearray | memoryview


CHECKPOINT_BYTES = 256 << 20


def count_outputs(
    *,
    n_seq_max: int,
    n_ubatch: int,
    speculative: Speculative,
    has_state: bool,
    n_draft_max: int = N_DRAFT_MAX,
) -> int:
    """Rows of logits that one step can need: one for each sequence, and one for each guess.

    `has_state`: the model keeps a recurrent state, which cannot take a wrong guess back.
    """
    n_drafts = 0 if speculative == "off" or has_state else max(0, n_draft_max)
    return min(n_seq_max + n_drafts, n_ubatch)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is loaded. Names are llama.cpp's. None means: let the engine choose.

    n_ctx is the size of the KV cache in tokens, for all sequences (llama.cpp pads it to 256).
    n_seq_max is the number of sequences that can be in the cache at once.
    kv_unified: each sequence may have all of those tokens, as long as others leave them, and
    sequences that start alike share them; what a row attends to is looked for among all. False:
    each has n_ctx / n_seq_max of its own (llama.cpp pads them to 256), where nothing but its own is
    looked at: faster from a few sequences on.
    n_gpu_layers: -1 is all. use_mmap: leave the weights in the page cache (llama.cpp may still read
    them where the device needs that). use_repack: let the CPU copy weights into its own layout.
    n_cpu_moe: the experts of the first so many layers stay in RAM, whatever n_gpu_layers says.
    steady_threads: fewer threads while other programs are busy, up to the numbers given here again
    when they are not. With FlashAttention a step's rounding depends on the number of threads, so
    that a greedy answer may then take another of two tokens that are as probable.
    n_draft_max: most guessed tokens in one step, of all sequences together. Each costs room for a
    row of logits; models with a recurrent state get none.
    tensor_split: each GPU's share of the layers, in the engine's order; empty: by free memory.
    draft_model: the files, in order, of the model that guesses when `speculative` is "draft";
    draft_gpu_layers are its own.
    checkpoint_bytes: most memory for states to which models that forget can go back.
    """

    n_ctx: int = 4096
    n_seq_max: int = 1
    kv_unified: bool = True
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
    steady_threads: bool = True
    speculative: Speculative = "auto"
    n_draft_max: int = N_DRAFT_MAX
    draft_model: tuple[Path, ...] = ()
    draft_gpu_layers: int = -1
    checkpoint_bytes: int = CHECKPOINT_BYTES


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
class TokenLogprob:
    """A token that was taken, its bytes, and the natural logarithm of its probability by the
    model's own logits (before temperature and all other sampling); at least NO_LOGPROB. `top` are
    the likeliest tokens at its place, best first, in the same form."""

    token: int
    piece: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One generation.

    `prompt` is the whole token sequence, also when its start is in the cache already: the engine
    finds and reuses the longest valid prefix by itself. `max_tokens` None: until an end token or
    the end of the context. `show_special`: control tokens appear in the text (for parsers that need
    them); end tokens never do. Text from a stop string on is not emitted. `come_back_to`: numbers
    of prompt tokens to which later prompts may go back; a model that forgets keeps its state there.
    `with_times`: the FinishEvent tells when each token came. `n_logprobs`: TextEvents carry the
    log probability of each token, and of so many likely others; None: they do not.
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    show_special: bool = False
    ignore_eog: bool = False
    come_back_to: tuple[int, ...] = ()
    with_times: bool = False
    n_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class SavedPrefix:
    """What the cache held of one sequence, to be put back later or in another process.

    `state` belongs to all of `tokens`. What a model forgets (windows, recurrent states) it holds
    from position `pos_min` on; `checkpoints` hold it as it was after so many tokens.
    """

    tokens: tuple[int, ...]
    state: StateBytes
    pos_min: int = 0
    checkpoints: tuple[tuple[int, StateBytes], ...] = ()

    @property
    def n_bytes(self) -> int:
        states = (self.state, *(state for _, state in self.checkpoints))
        return sum(len(state) for state in states)


@dataclass(frozen=True, slots=True)
class Usage:
    """`n_cached` of the `n_prompt` tokens were not computed again. Of `n_drafted` guessed tokens
    that were checked, `n_accepted` became part of the answer."""

    n_prompt: int
    n_completion: int
    n_cached: int
    n_drafted: int = 0
    n_accepted: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """`ttft_s` runs from submit to the first sampled token. Rates are tokens a second, or 0."""

    ttft_s: float
    prompt_tok_s: float
    decode_tok_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class TextEvent:
    """Newly finished text, whole characters only, and the tokens sampled since the last event;
    `logprobs`, where asked for, belong to `tokens` one by one."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """Progress of reading a long prompt: `n_done` of `n_total` tokens are in the cache."""

    n_done: int
    n_total: int


@dataclass(frozen=True, slots=True)
class FinishEvent:
    """The last event of a stream. `seed` is the one that was used. `token_times` are seconds from
    submit to each sampled token, for requests `with_times`."""

    reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    stop: str | None = None
    token_times: tuple[float, ...] = ()


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

    def listen(self, listener: Callable[[], None]) -> None:
        """Have `listener` called whenever something is there to be taken: from the engine's thread,
        so it must be quick and not raise; at once, from the caller's, if some is there already. It
        may be called once too often. For readers that do not iterate but `take`."""

    def take(self) -> list[Event]:
        """The events that are there now, without waiting; after the FinishEvent none come. Raises
        a failure's LlmrunError once the events before it were taken; when some were, the listener
        is called once more for it."""


@dataclass(frozen=True, slots=True)
class EngineCounters:
    """What an engine is doing, and what it has done since it was opened. Totals never go down.

    Now: `n_running` requests have a sequence of the cache, `n_waiting` do not; `n_cells` of the
    cache's `n_ctx` cells hold tokens, of running requests or kept for later ones.
    In all: `n_requests` began to be read, their prompts had `n_prompt` tokens, of which `n_cached`
    were in the cache; `n_completion` tokens were sampled; of `n_drafted` guesses `n_accepted` were
    right; `n_steps` batches took `decode_s` seconds.
    """

    n_ctx: int
    n_seq_max: int
    n_running: int = 0
    n_waiting: int = 0
    n_cells: int = 0
    n_requests: int = 0
    n_prompt: int = 0
    n_cached: int = 0
    n_completion: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    n_steps: int = 0
    decode_s: float = 0.0


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

    @property
    def counters(self) -> EngineCounters:
        """A snapshot. Costs microseconds, waits for nothing, may be asked of a closed engine."""

    def submit(self, request: Request) -> StreamLike:
        """Start a generation. Raises ContextOverflowError when the prompt has more than n_ctx
        tokens, UsageError when it is empty."""

    @property
    def state_key(self) -> str:
        """Names what a saved state depends on beside the model's file: an engine with another key
        must not be given it."""

    def save_prefix(self, tokens: Sequence[int], max_bytes: int) -> SavedPrefix | None:
        """What the cache holds that starts most like `tokens`. None when that is nothing, or more
        than `max_bytes`. Waits for the step that runs. Raises EngineError on a closed engine."""

    def restore_prefix(self, saved: SavedPrefix) -> int:
        """Put a prefix into the cache for the requests to come; how many of its tokens are there
        then. 0: it does not fit or does not belong here, and nothing has changed but that idle
        prefixes may be gone. Raises like `save_prefix`."""

    def close(self) -> None: ...


LoadProgress = Callable[[float], bool]
"""Called with 0.0 … 1.0 while a model loads; returning False cancels."""
