"""What each layer of a model keeps per token and per sequence, read from its header. Pure.

The rules are llama.cpp's own (its `src/llama-hparams.cpp`, `src/llama-kv-cache*.cpp` and
`src/llama-memory-*.cpp`), as metadata keys of the GGUF header.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmrun.gguf.types import ArrayValue, ModelInfo

MAX_LAYERS = 4096

# Layer i is dense when i % period == period - 1, or, for those in _DENSE_FIRST, when it is 0.
_SWA_PERIODS = {
    "gemma2": 2,
    "gpt-oss": 2,
    "llama4": 4,
    "cohere2": 4,
    "exaone4": 4,
    "exaone-moe": 4,
    "olmo2": 4,
    "afmoe": 4,
    "mellum": 4,
    "muse-glimmer": 4,
    "gemma3n": 5,
    "gemma3": 6,
    "plamo3": 8,
    "smallthinker": 4,
    "laguna": 4,
    "cohere2moe": 4,
}
_DENSE_FIRST = {"smallthinker", "laguna", "cohere2moe"}
_SWA_BY_ARRAY = {"gemma4", "mimo2", "step35"}
_LLAMA4_CHUNK = 8192

_ENCODERS = {
    "bert",
    "nomic-bert",
    "nomic-bert-moe",
    "jina-bert-v2",
    "jina-bert-v3",
    "neo-bert",
    "modern-bert",
    "eurobert",
    "gemma-embedding",
}
_MAMBA1 = {"mamba"}
_MAMBA = {"mamba2"}
_RWKV = {"rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}
_DELTA = {"qwen3next", "qwen35", "qwen35moe"}
# Hybrids whose recurrent layers are those with 0 KV heads.
_SHORT_CONV = {"lfm2", "lfm2moe"}
_MAMBA_HYBRID = {"granitehybrid", "nemotron_h", "nemotron_h_moe", "jamba"}
_PLAIN = {
    "apertus",
    "arcee",
    "arctic",
    "baichuan",
    "bailingmoe",
    "bailingmoe2",
    "bitnet",
    "bloom",
    "chatglm",
    "codeshell",
    "command-r",
    "dbrx",
    "deepseek",
    "deepseek2",
    "dots1",
    "ernie4_5",
    "ernie4_5-moe",
    "exaone",
    "falcon",
    "gemma",
    "glm4",
    "glm4moe",
    "gpt2",
    "gptneox",
    "granite",
    "granitemoe",
    "grok",
    "hunyuan-dense",
    "hunyuan-moe",
    "internlm2",
    "jais",
    "llama",
    "maincoder",
    "minicpm",
    "minicpm3",
    "minimax-m2",
    "mistral3",
    "mistral4",
    "mpt",
    "nemotron",
    "olmo",
    "olmoe",
    "openelm",
    "orion",
    "phi2",
    "phi3",
    "phimoe",
    "plm",
    "qwen",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "qwen3moe",
    "qwen3vl",
    "qwen3vlmoe",
    "refact",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder",
    "starcoder2",
    "xverse",
}
_KNOWN = (
    _PLAIN
    | set(_SWA_PERIODS)
    | _SWA_BY_ARRAY
    | _ENCODERS
    | _MAMBA1
    | _MAMBA
    | _RWKV
    | _DELTA
    | _SHORT_CONV
    | _MAMBA_HYBRID
)


@dataclass(frozen=True, slots=True)
class Layer:
    """`k_width` and `v_width` are values per cell of the KV cache; a cell holds one token.
    `state_values` are 32-bit values per sequence, whatever the context's length."""

    k_width: int = 0
    v_width: int = 0
    is_swa: bool = False
    state_values: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """All layers that llama.cpp keeps memory for, and the sizes that scratch memory depends on.

    `n_swa` is the attention window of the sliding layers, 0 without such. `head_sizes` are those in
    use, for the rule that they be whole blocks of a quantised KV type. `n_query` are the values of
    one token's query, all heads of the widest layer; `n_scan` those that a Mamba block adds to its
    inner widths; `n_residuals` is how many rows of n_embd values a block has alive beside its
    feed-forward part; `n_latent` are the values of a key that serve as value (MLA), 0 where values
    are stored. `is_encoder`: no cache, and a text has to be computed in one micro-batch.
    """

    layers: tuple[Layer, ...]
    n_swa: int
    n_embd: int
    n_head: int
    n_vocab: int
    n_ff: int
    n_expert_used: int
    n_ff_expert: int
    n_ff_shared: int
    n_embd_per_layer: int
    n_inner: int
    n_scan: int
    n_query: int
    n_latent: int
    n_residuals: int
    head_sizes: frozenset[int]
    is_encoder: bool


class _Keys:
    """Typed access to `<architecture>.<key>` of a header. Wrong types count as absent."""

    def __init__(self, info: ModelInfo) -> None:
        self.metadata = info.header.metadata
        self.architecture = info.architecture

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def integer(self, key: str, default: int = 0) -> int:
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, ArrayValue):
            return max((v for v in value.values or () if isinstance(v, int)), default=default)
        return int(value) if isinstance(value, int) and value >= 0 else default

    def array(self, key: str) -> tuple[int, ...] | None:
        """The values of an array of whole numbers or booleans; None when it is not one."""
        value = self.metadata.get(f"{self.architecture}.{key}")
        if not isinstance(value, ArrayValue) or value.values is None:
            return None
        numbers = tuple(int(v) for v in value.values if isinstance(v, int) and v >= 0)
        return numbers if len(numbers) == value.n_values else None

    def per_layer(self, key: str, n_layers: int, default: int) -> tuple[int, ...] | None:
        """One number per layer, from a number for all or an array; None for a short array."""
        if isinstance(self.metadata.get(f"{self.architecture}.{key}"), ArrayValue):
            values = self.array(key)
            return values[:n_layers] if values and len(values) >= n_layers else None
        return (self.integer(key, default),) * n_layers


def read_layout(info: ModelInfo) -> Layout | None:
    """The layout by the header of `info`; None when the architecture is not one whose rules are
    known here, or the header lacks what they need."""
    keys = _Keys(info)
    architecture = info.architecture
    n_layers = keys.integer("block_count") - keys.integer("nextn_predict_layers")
    n_embd = keys.integer("embedding_length")
    if architecture not in _KNOWN or not 0 < n_layers <= MAX_LAYERS or not n_embd:
        return None
    if "attention.indexer.head_count" in keys:
        return None
    n_head = keys.integer("attention.head_count")
    is_encoder = architecture in _ENCODERS
    needs_heads = architecture not in _RWKV | _MAMBA1 | _MAMBA
    if needs_heads and not n_head:
        return None
    n_swa = _read_window(keys)
    if is_encoder:
        layers: tuple[Layer, ...] | None = (Layer(),) * n_layers
    else:
        layers = _read_layers(keys, n_layers, n_embd, n_head, n_swa)
    if layers is None:
        return None
    d_head = n_embd // n_head if n_head else 0
    names = ("key_length", "value_length", "key_length_swa", "value_length_swa")
    sizes = {keys.integer(f"attention.{name}") for name in names} - {0}
    n_ff_expert = keys.integer("expert_feed_forward_length")
    return Layout(
        layers=layers,
        n_swa=n_swa if any(layer.is_swa for layer in layers) else 0,
        n_embd=n_embd,
        n_head=n_head,
        n_vocab=info.n_vocab or keys.integer("vocab_size"),
        n_ff=keys.integer("feed_forward_length"),
        n_expert_used=keys.integer("expert_used_count"),
        n_ff_expert=n_ff_expert or keys.integer("feed_forward_length"),
        n_ff_shared=keys.integer("expert_shared_feed_forward_length")
        or keys.integer("expert_shared_count") * n_ff_expert,
        n_embd_per_layer=keys.integer("embedding_length_per_layer_input"),
        n_inner=keys.integer("ssm.inner_size"),
        n_scan=_n_scan(keys),
        n_query=n_head * max(sizes or {d_head}),
        n_latent=keys.integer("attention.value_length") if _is_latent(keys) else 0,
        n_residuals=_n_residuals(architecture),
        head_sizes=frozenset(sizes or ({d_head} if d_head else set())),
        is_encoder=is_encoder,
    )


def _is_latent(keys: _Keys) -> bool:
    return "attention.key_length_mla" in keys


def _n_scan(keys: _Keys) -> int:
    n_state, n_group = keys.integer("ssm.state_size"), keys.integer("ssm.group_count")
    # What the heads share (B and C, or the queries and keys) lies in the same rows as the inner
    # values: in the input, before and after the convolution; a delta net drops the input sooner.
    n_rows = 4 if keys.architecture in _DELTA else 6
    return keys.integer("ssm.time_step_rank") + 2 * n_state + n_rows * n_group * n_state


def _n_residuals(architecture: str) -> int:
    """Fitted to llama.cpp's allocator: norms behind each part keep rows of n_embd alive, Gemma 3n
    keeps three more streams of them."""
    if architecture == "gemma3n":
        return 9
    return 6 if architecture.startswith("gemma") else 4


def _read_window(keys: _Keys) -> int:
    if keys.architecture == "llama4":
        return keys.integer("attention.chunk_size", _LLAMA4_CHUNK)
    return keys.integer("attention.sliding_window")


def _read_layers(
    keys: _Keys, n_layers: int, n_embd: int, n_head: int, n_swa: int
) -> tuple[Layer, ...] | None:
    n_head_kv = keys.per_layer("attention.head_count_kv", n_layers, n_head)
    is_swa = _read_swa(keys, n_layers, n_swa)
    is_recurrent = _read_recurrent(keys, n_layers, n_head_kv)
    if n_head_kv is None or is_swa is None or is_recurrent is None:
        return None
    d_head = n_embd // n_head if n_head else 0
    d_k = keys.integer("attention.key_length", d_head)
    d_v = keys.integer("attention.value_length", d_head)
    d_k_swa = keys.integer("attention.key_length_swa", d_k)
    d_v_swa = keys.integer("attention.value_length_swa", d_v)
    is_latent = _is_latent(keys)
    n_stored = n_layers - keys.integer("attention.shared_kv_layers")
    if keys.architecture == "gemma3n":
        n_stored = 20
    state = _state_values(keys, n_embd)
    layers = []
    for i in range(n_layers):
        if is_recurrent[i]:
            layers.append(Layer(state_values=state))
        elif i >= n_stored:
            layers.append(Layer(is_swa=is_swa[i]))
        elif is_latent:
            layers.append(Layer(k_width=n_head_kv[i] * d_k, is_swa=is_swa[i]))
        else:
            k, v = (d_k_swa, d_v_swa) if is_swa[i] else (d_k, d_v)
            layers.append(Layer(n_head_kv[i] * k, n_head_kv[i] * v, is_swa[i]))
    return tuple(layers)


def _read_swa(keys: _Keys, n_layers: int, n_swa: int) -> tuple[bool, ...] | None:
    """Which layers look back through a sliding window; None when the header cannot say."""
    architecture = keys.architecture
    has_rule = architecture in _SWA_PERIODS or architecture in _SWA_BY_ARRAY
    if not n_swa or not has_rule:
        return (False,) * n_layers
    key = "attention.sliding_window_pattern"
    if isinstance(keys.metadata.get(f"{architecture}.{key}"), ArrayValue):
        pattern = keys.array(key)
        if pattern is None or len(pattern) < n_layers:
            return None
        return tuple(bool(flag) for flag in pattern[:n_layers])
    period = keys.integer(key) or _SWA_PERIODS.get(architecture, 0)
    if not period:
        return None
    dense = 0 if architecture in _DENSE_FIRST else period - 1
    return tuple(i % period != dense for i in range(n_layers))


def _read_recurrent(
    keys: _Keys, n_layers: int, n_head_kv: tuple[int, ...] | None
) -> tuple[bool, ...] | None:
    architecture = keys.architecture
    if architecture in _MAMBA1 | _MAMBA | _RWKV:
        return (True,) * n_layers
    if "attention.recurrent_layers" in keys:
        flags = keys.per_layer("attention.recurrent_layers", n_layers, 0)
        return None if flags is None else tuple(bool(flag) for flag in flags)
    if architecture in _DELTA:
        interval = keys.integer("full_attention_interval", 4) or 4
        return tuple((i + 1) % interval != 0 for i in range(n_layers))
    if architecture in _SHORT_CONV | _MAMBA_HYBRID:
        if n_head_kv is None:
            return None
        # In nemotron_h a layer without KV heads but with a feed-forward part is only that.
        n_ff = keys.per_layer("feed_forward_length", n_layers, 0) or (0,) * n_layers
        only_ff = architecture.startswith("nemotron_h")
        return tuple(
            heads == 0 and not (only_ff and ff > 0)
            for heads, ff in zip(n_head_kv, n_ff, strict=True)
        )
    return (False,) * n_layers


def _state_values(keys: _Keys, n_embd: int) -> int:
    """Values of one recurrent layer's state for one sequence: the convolution's and the scan's."""
    architecture = keys.architecture
    if architecture in _RWKV:
        shifts = keys.integer("token_shift_count", 2)
        return shifts * n_embd + n_embd * keys.integer("wkv.head_size")
    if architecture in _SHORT_CONV:
        return n_embd * max(0, keys.integer("shortconv.l_cache") - 1)
    n_inner, n_state = keys.integer("ssm.inner_size"), keys.integer("ssm.state_size")
    n_group = keys.integer("ssm.group_count")
    conv = max(0, keys.integer("ssm.conv_kernel") - 1) * (n_inner + 2 * n_group * n_state)
    return conv + n_state * n_inner
