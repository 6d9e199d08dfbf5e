"""llama.cpp sampler chains, one for each request. Logits stay in C except under a grammar, and
where the best token is all that is asked for."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

from llmrun.engine.logits import LogitRows
from llmrun.engine.types import SamplingParams
from llmrun.errors import EngineError, UsageError

# Sorting 262,144 candidates costs 17 ms a token. When top-k is off but a sampler that sorts is on,
# this cut keeps the order of all candidates that can matter.
_WIDE_TOP_K = 4096

# llama.cpp's grammar parser recurses; these bounds keep it far from the end of the stack.
_MAX_GRAMMAR_CHARS = 512 * 1024
_MAX_GRAMMAR_RULES = 10_000
_MAX_GRAMMAR_DEPTH = 1000
_GBNF_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)

_stderr_lock = threading.Lock()


class LlamaSampler:
    """See `engine.backend.Sampler`: plain sampling is one C call. The best token of unchanged
    logits is found without the chain, which would give the same one, as soon as that is faster.

    With a grammar, the token is chosen without it and checked (4 µs); only a refused one is
    chosen again among what the grammar allows (up to 40 ms over a large vocabulary).
    """

    def __init__(
        self, C: Any, ctx: Any, vocab: Any, rows: LogitRows, params: SamplingParams, seed: int
    ) -> None:
        """Raises UsageError for numbers that are none, or a grammar that does not parse."""
        self._C = C
        self._rows = rows
        self._n_vocab: int = C.llama_vocab_n_tokens(vocab)
        _check_params(params, self._n_vocab)
        n_ctx: int = C.llama_n_ctx(ctx)
        self._chain = _build_chain(C, vocab, self._n_vocab, params, seed, n_ctx)
        try:
            self._grammar = (
                _build_grammar(C, vocab, params.grammar) if params.grammar is not None else None
            )
        except BaseException:
            C.llama_sampler_free(self._chain)
            raise
        self._candidates: _Candidates | None = None
        self._takes_best = _takes_best(params)
        # Bound here, because a frame less on every token is a frame less.
        self._sample_in_c: Callable[[int], int] = functools.partial(
            C.llama_sampler_sample, self._chain, ctx
        )
        self.sample: Callable[[int], int] = self._sample_in_c
        if self._grammar is not None:
            self.sample = self._sample_under_grammar
        elif self._takes_best:
            self.sample = self._sample_best_soon

    def accept(self, token: int) -> None:
        self._C.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        if self._chain is not None:
            self._C.llama_sampler_free(self._chain)
            self._chain = None
        if self._grammar is not None:
            self._C.llama_sampler_free(self._grammar)
            self._grammar = None

    def _sample_best_soon(self, row: int) -> int:
        if self._rows.pays():
            self.sample = self._rows.find_best
            return self._rows.find_best(row)
        return self._sample_in_c(row)

    def _sample_under_grammar(self, row: int) -> int:
        C = self._C
        logits = self._rows.read(row)
        token = self._rows.find_best(row) if self._takes_best else self._choose(logits)
        if not self._allows(token):
            token = self._choose(logits, self._grammar)
            # The chain keeps at least one candidate, but a grammar can refuse all of them.
            if not self._allows(token):
                raise EngineError("the grammar allows no token of this model's vocabulary here")
        C.llama_sampler_accept(self._grammar, token)
        C.llama_sampler_accept(self._chain, token)
        return token

    def _choose(self, logits: Any, grammar: Any = None) -> int:
        """The chain's choice, among what `grammar` allows."""
        C = self._C
        if self._candidates is None:
            self._candidates = _Candidates(C, self._n_vocab)
        array = self._candidates.fill(logits)
        if grammar is not None:
            C.llama_sampler_apply(grammar, ctypes.byref(array))
        C.llama_sampler_apply(self._chain, ctypes.byref(array))
        return _selected(array)

    def _allows(self, token: int) -> bool:
        C = self._C
        one = (C.llama_token_data * 1)()
        one[0].id, one[0].logit, one[0].p = token, 1.0, 0.0
        array = C.llama_token_data_array(one, 1, -1, False)
        C.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(one[0].logit != float("-inf"))


class _Candidates:
    """The candidate array that samplers work on, filled from a row of logits."""

    def __init__(self, C: Any, n_vocab: int) -> None:
        import numpy as np

        self._C = C
        self._n_vocab = n_vocab
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._records = np.zeros(
            n_vocab, dtype=np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        )

    def fill(self, logits: Any) -> Any:
        """A fresh array over the buffer. Samplers reorder it, so the ids are written each time."""
        self._records["id"] = self._ids
        self._records["logit"] = logits
        self._records["p"] = 0.0
        data = self._records.ctypes.data_as(ctypes.POINTER(self._C.llama_token_data))
        return self._C.llama_token_data_array(data, self._n_vocab, -1, False)


def _selected(array: Any) -> int:
    if not 0 <= array.selected < array.size:
        raise EngineError("the sampler chain chose no token")
    return int(array.data[array.selected].id)


def _check_params(params: SamplingParams, n_vocab: int) -> None:
    """UsageError for what llama.cpp would turn into nonsense (NaN) or a dead process."""
    numbers = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "typical_p": params.typical_p,
        "xtc_probability": params.xtc_probability,
        "xtc_threshold": params.xtc_threshold,
        "dry_multiplier": params.dry_multiplier,
        "dry_base": params.dry_base,
        "repeat_penalty": params.repeat_penalty,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
    }
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise UsageError(f"{name} must be a finite number, not {value}")
    if params.repeat_penalty <= 0:
        raise UsageError("repeat_penalty must be above 0", hint="1 turns it off")
    for token, bias in params.logit_bias:
        if not 0 <= token < n_vocab:
            raise UsageError(
                f"logit bias names token {token}, but the vocabulary has {n_vocab} tokens"
            )
        if math.isnan(bias):
            raise UsageError(f"the logit bias of token {token} is not a number")


def _takes_best(params: SamplingParams) -> bool:
    """Whether the chain takes the largest logit as the model gives it, whatever came before."""
    return (
        params.temperature <= 0
        and not params.logit_bias
        and not _penalises(params)
        and params.dry_multiplier <= 0
    )


def _penalises(params: SamplingParams) -> bool:
    return (params.repeat_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0)


def _build_chain(
    C: Any, vocab: Any, n_vocab: int, params: SamplingParams, seed: int, n_ctx: int
) -> Any:
    """The chain in llama.cpp's default order; it owns its samplers."""

    def window(last_n: int) -> int:
        # -1: the whole context. The library allocates this many entries at once.
        return n_ctx if last_n < 0 else min(last_n, n_ctx)

    chain = C.llama_sampler_chain_init(C.llama_sampler_chain_default_params())

    def add(sampler: Any) -> None:
        if not sampler:
            raise EngineError("llama.cpp could not build a sampler")
        C.llama_sampler_chain_add(chain, sampler)

    if params.logit_bias:
        biases = (C.llama_logit_bias * len(params.logit_bias))(*params.logit_bias)
        add(C.llama_sampler_init_logit_bias(n_vocab, len(biases), biases))
    if _penalises(params):
        add(
            C.llama_sampler_init_penalties(
                n_vocab,
                window(params.repeat_last_n),
                params.repeat_penalty,
                params.frequency_penalty,
                params.presence_penalty,
            )
        )
    if params.dry_multiplier > 0:
        breakers = [breaker.encode("utf-8", "replace") for breaker in params.dry_breakers]
        add(
            C.llama_sampler_init_dry(
                vocab,
                params.dry_multiplier,
                params.dry_base,
                params.dry_allowed_length,
                window(params.dry_last_n),
                (ctypes.c_char_p * len(breakers))(*breakers),
                len(breakers),
            )
        )
    if params.temperature <= 0:
        add(C.llama_sampler_init_greedy())
        return chain
    sorts = params.top_p < 1 or params.typical_p < 1 or params.xtc_probability > 0
    if params.top_k > 0:
        add(C.llama_sampler_init_top_k(min(params.top_k, n_vocab)))
    elif sorts and n_vocab > _WIDE_TOP_K:
        add(C.llama_sampler_init_top_k(_WIDE_TOP_K))
    if params.typical_p < 1:
        add(C.llama_sampler_init_typical(params.typical_p, 1))
    if params.top_p < 1:
        add(C.llama_sampler_init_top_p(params.top_p, 1))
    if params.min_p > 0:
        add(C.llama_sampler_init_min_p(params.min_p, 1))
    if params.xtc_probability > 0:
        add(C.llama_sampler_init_xtc(params.xtc_probability, params.xtc_threshold, 1, seed))
    add(C.llama_sampler_init_temp(params.temperature))
    add(C.llama_sampler_init_dist(seed))
    return chain


def _build_grammar(C: Any, vocab: Any, grammar: str) -> Any:
    """A grammar sampler; UsageError with the parser's words when `grammar` is no GBNF."""
    if not grammar.strip():
        raise UsageError("the grammar is empty", hint="give GBNF with a rule named root")
    if len(grammar) > _MAX_GRAMMAR_CHARS or _is_too_deep(grammar):
        raise UsageError(
            "the grammar is too large",
            why=f"bounds: {_MAX_GRAMMAR_CHARS} characters, {_MAX_GRAMMAR_RULES} rules, "
            f"{_MAX_GRAMMAR_DEPTH} brackets inside one another",
        )
    with _captured_stderr() as said:
        sampler = C.llama_sampler_init_grammar(
            vocab, grammar.encode("utf-8", "replace").replace(b"\0", b" "), b"root"
        )
    if not sampler:
        words = " ".join(said()[-300:].split())
        raise UsageError(
            "the grammar cannot be used",
            why=words or "llama.cpp did not accept it",
            hint="give GBNF with a rule named root and no left recursion",
        )
    return sampler


def _is_too_deep(grammar: str) -> bool:
    """Whether reading `grammar` could recurse too far: through brackets, or from rule to rule."""
    bare = _GBNF_LITERAL.sub("", grammar)
    if bare.count("::=") > _MAX_GRAMMAR_RULES:
        return True
    depth = 0
    for bracket in re.findall(r"[()]", bare):
        depth += 1 if bracket == "(" else -1
        if depth > _MAX_GRAMMAR_DEPTH:
            return True
    return False


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Any]:
    """Catch what C code prints to file descriptor 2: the grammar parser uses fprintf.

    The descriptor belongs to the whole process, so only one thread at a time may exchange it. A
    process without one (closed by its parent) has nothing to protect.
    """
    text: list[str] = []
    with _stderr_lock, tempfile.TemporaryFile() as file:
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
        try:
            saved = os.dup(2)
        except OSError:
            yield lambda: ""
            return
        try:
            os.dup2(file.fileno(), 2)
            yield lambda: text[0] if text else ""
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            text.append(file.read(4096).decode("utf-8", "replace"))
