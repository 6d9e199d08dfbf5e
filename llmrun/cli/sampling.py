"""The sampling of a model: the user's values over what its makers advise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmrun.config import Settings, Source, parse_value
from llmrun.engine.types import SamplingParams, Tokenizer
from llmrun.errors import UsageError
from llmrun.option_table import OPTION_BY_KEY

if TYPE_CHECKING:
    from llmrun.catalog.entries import CatalogEntry
    from llmrun.gguf.types import ModelInfo

# Keys of Settings that are fields of SamplingParams under the same name.
SAMPLING_KEYS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "xtc_probability",
    "xtc_threshold",
    "dry_multiplier",
    "repeat_penalty",
    "frequency_penalty",
    "presence_penalty",
)
# general.sampling.* in a header, where the word is not ours.
_HEADER_WORDS = {"temp": "temperature", "penalty_repeat": "repeat_penalty"}


def sampling_of(
    settings: Settings,
    info: ModelInfo | None,
    entry: CatalogEntry | None,
    tokenizer: Tokenizer | None = None,
    *,
    grammar: str | None = None,
) -> SamplingParams:
    """The user's values, else the header's `general.sampling.*`, else the catalog's, else the
    engine's own. Values of a header that are out of range count as not given."""
    values = recommended_sampling(info, entry, thinking=settings.think is not False)
    for key in SAMPLING_KEYS:
        given = getattr(settings, key)
        if given is not None:
            values[key] = given
    bias = tuple(_parse_bias(text, tokenizer) for text in settings.logit_bias) if tokenizer else ()
    return SamplingParams(**values, seed=settings.seed, logit_bias=bias, grammar=grammar)


def recommended_sampling(
    info: ModelInfo | None, entry: CatalogEntry | None, *, thinking: bool = True
) -> dict[str, Any]:
    """What the model's makers advise, by the names of SAMPLING_KEYS."""
    values = _catalog_sampling(entry, thinking=thinking)
    if info is not None:
        values.update(_header_sampling(info.sampling))
    return values


def _catalog_sampling(entry: CatalogEntry | None, *, thinking: bool) -> dict[str, Any]:
    advice = entry.sampling_for(thinking=thinking) if entry is not None else None
    if advice is None:
        return {}
    found = {key: getattr(advice, key, None) for key in SAMPLING_KEYS}
    return {key: value for key, value in found.items() if value is not None}


def _header_sampling(advice: Mapping[str, float | int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word, value in advice.items():
        key = _HEADER_WORDS.get(word, word)
        if key not in SAMPLING_KEYS:
            continue
        try:
            found[key] = parse_value(OPTION_BY_KEY[key], value, Source("default"))
        except UsageError:
            continue
    return found


def _parse_bias(text: str, tokenizer: Tokenizer) -> tuple[int, float]:
    """`TOKEN=BIAS`: a token's number, or a text that is one token; a number, or `ban`."""
    hint = '--logit-bias "15043=-5", or a text that is one token: --logit-bias " the=ban"'
    token_text, equals, bias_text = text.rpartition("=")
    try:
        bias = float("-inf") if bias_text == "ban" else float(bias_text)
    except ValueError:
        bias = float("nan")
    if not equals or not token_text or bias != bias or bias == float("inf"):
        raise UsageError(f"option --logit-bias: {text!r} is not TOKEN=BIAS", hint=hint)
    if token_text.isascii() and token_text.isdigit():
        token = int(token_text)
        if token >= tokenizer.n_vocab:
            raise UsageError(
                f"option --logit-bias: there is no token {token}",
                why=f"the vocabulary has {tokenizer.n_vocab} tokens",
            )
        return token, bias
    tokens = tokenizer.tokenize(token_text, add_special=False, parse_special=False)
    if len(tokens) != 1:
        raise UsageError(
            f"option --logit-bias: {token_text!r} is {len(tokens)} tokens, not one", hint=hint
        )
    return tokens[0], bias
