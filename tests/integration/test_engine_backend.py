"""LlamaBackend: what would end the process is an error, saved states fit or are refused, and many
sequences in one batch compute what each would alone."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from llmrun.engine.backend import Chunk, DecodeResult
from llmrun.engine.llama import LlamaBackend, open_backend
from llmrun.engine.types import EngineOptions, SamplingParams
from llmrun.errors import EngineError
from tests.fakes.models import gemma3_path, smollm2_path

N_BATCH = 256


@pytest.fixture(scope="module")
def backend() -> Iterator[LlamaBackend]:
    options = EngineOptions(
        n_ctx=512, n_seq_max=4, n_ubatch=N_BATCH, n_threads=2, speculative="off"
    )
    opened = open_backend(smollm2_path(), options)
    yield opened
    opened.close()
    opened.close()


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames:
        opened: LlamaBackend = request.getfixturevalue("backend")
        opened.clear_abort()
        for seq_id in range(opened.n_seq_max):
            assert opened.seq_rm(seq_id, -1, -1)


def tokens_of(backend: LlamaBackend, text: str) -> list[int]:
    return backend.tokenizer.tokenize(text, add_special=True, parse_special=False)


def read(backend: LlamaBackend, tokens: list[int], seq_id: int = 0, first: int = 0) -> None:
    for pos in range(0, len(tokens), backend.n_batch):
        chunk = Chunk(seq_id, tokens[pos : pos + backend.n_batch], first + pos, 1)
        assert backend.decode([chunk]) is DecodeResult.DONE


def logits(backend: LlamaBackend, row: int = -1) -> list[float]:
    n_vocab = backend.tokenizer.n_vocab
    return list(backend._C.llama_get_logits_ith(backend._ctx, row)[:n_vocab])


def test_limits_are_those_of_the_context(backend: LlamaBackend) -> None:
    assert (backend.n_ctx, backend.n_seq_max, backend.n_batch) == (512, 4, N_BATCH)
    assert backend.n_outputs_max == 4


CALLS = {
    "too many rows": lambda b: b.decode([Chunk(0, [1] * (N_BATCH + 1), 0, 1)]),
    "too many rows in two chunks": lambda b: b.decode(
        [Chunk(0, [1] * N_BATCH, 0, 1), Chunk(1, [1], 0, 1)]
    ),
    "too many outputs": lambda b: b.decode([Chunk(0, [1] * 8, 0, 5)]),
    "more outputs than tokens": lambda b: b.decode([Chunk(0, [1], 0, 2)]),
    "negative outputs": lambda b: b.decode([Chunk(0, [1, 2], 0, -1)]),
    "no rows": lambda b: b.decode([]),
    "no tokens": lambda b: b.decode([Chunk(0, [], 0, 0)]),
    "sequence too high": lambda b: b.decode([Chunk(4, [1], 0, 1)]),
    "sequence below 0": lambda b: b.decode([Chunk(-1, [1], 0, 1)]),
    "token too high": lambda b: b.decode([Chunk(0, [10**6], 0, 1)]),
    "token below 0": lambda b: b.decode([Chunk(0, [-5], 0, 1)]),
    "rm": lambda b: b.seq_rm(300, -1, -1),
    "rm of all": lambda b: b.seq_rm(-1, -1, -1),
    "cp from": lambda b: b.seq_cp(9, 0, 1),
    "cp to": lambda b: b.seq_cp(0, 9, 1),
    "pos_min": lambda b: b.seq_pos_min(300),
    "pos_max": lambda b: b.seq_pos_max(-1),
    "save": lambda b: b.save_state(300, partial=False),
    "load": lambda b: b.load_state(300, b"x", partial=False),
    "piece": lambda b: b.tokenizer.piece(10**6),
    "piece below 0": lambda b: b.tokenizer.piece(-1),
    "is_eog": lambda b: b.tokenizer.is_eog(10**6),
    "is_control": lambda b: b.tokenizer.is_control(10**6),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_would_abort_is_an_error(backend: LlamaBackend, name: str) -> None:
    with pytest.raises(EngineError):
        CALLS[name](backend)
    assert backend.decode([Chunk(0, [1, 2, 3], 0, 1)]) is DecodeResult.DONE


def test_a_gap_in_the_positions_is_an_error(backend: LlamaBackend) -> None:
    read(backend, [1, 2, 3])
    with pytest.raises(EngineError):
        backend.decode([Chunk(0, [1], 5, 1)])
    assert backend.seq_pos_max(0) == 2


def test_one_token_by_either_way(backend: LlamaBackend) -> None:
    tokens = tokens_of(backend, "The quick brown fox")
    read(backend, tokens)
    backend.decode([Chunk(0, [5], len(tokens), 1)])
    expected = logits(backend)
    backend.seq_rm(0, len(tokens), -1)
    assert backend.decode_one(0, 5, len(tokens)) is DecodeResult.DONE
    assert logits(backend) == expected


def test_a_full_cache_changes_nothing(backend: LlamaBackend) -> None:
    tokens = [random.Random(1).randrange(1000) for _ in range(488)]
    read(backend, tokens)
    assert backend.decode([Chunk(1, [1] * 25, 0, 1)]) is DecodeResult.FULL
    assert (backend.seq_pos_max(0), backend.seq_pos_max(1)) == (487, -1)
    assert backend.decode([Chunk(1, [1] * 24, 0, 1)]) is DecodeResult.DONE
    assert backend.decode_one(0, 1, 488) is DecodeResult.FULL


def test_an_abort_and_how_to_go_on(backend: LlamaBackend) -> None:
    tokens = tokens_of(backend, "One two three four five six seven eight nine")
    read(backend, tokens)
    expected = logits(backend)
    backend.seq_rm(0, -1, -1)
    backend.request_abort()
    assert backend.decode([Chunk(0, tokens, 0, 1)]) is DecodeResult.ABORTED
    assert backend.decode([Chunk(0, tokens, 0, 1)]) is DecodeResult.ABORTED
    backend.clear_abort()
    held = backend.seq_pos_max(0) + 1
    assert held == 0
    read(backend, tokens)
    assert logits(backend) == expected


def test_a_shared_prefix_gives_the_same_logits(backend: LlamaBackend) -> None:
    prefix = tokens_of(backend, "Once upon a time there was a little fox")
    rest = tokens_of(backend, " and it was hungry")
    read(backend, prefix)
    read(backend, rest, first=len(prefix))
    expected = logits(backend)
    assert backend.seq_cp(0, 1, len(prefix))
    backend.seq_rm(0, -1, -1)
    assert backend.seq_pos_max(1) == len(prefix) - 1
    read(backend, rest, seq_id=1, first=len(prefix))
    assert logits(backend) == expected


def kl(p_logits: list[float], q_logits: list[float]) -> float:
    import numpy as np

    p, q = (np.array(row, dtype=np.float64) for row in (p_logits, q_logits))
    log_p, log_q = (row - row.max() for row in (p, q))
    log_p -= np.log(np.exp(log_p).sum())
    log_q -= np.log(np.exp(log_q).sum())
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def test_rows_of_many_sequences_compute_what_each_would_alone(backend: LlamaBackend) -> None:
    texts = ["The sky is", "Two plus two is", "A long time ago in a galaxy", "def main():"]
    prompts = [tokens_of(backend, text) for text in texts]
    alone = []
    for tokens in prompts:
        read(backend, tokens)
        alone.append(logits(backend))
        backend.seq_rm(0, -1, -1)
    chunks = [Chunk(seq_id, tokens, 0, 1) for seq_id, tokens in enumerate(prompts)]
    assert backend.decode(chunks) is DecodeResult.DONE
    row = -1
    for tokens, expected in zip(prompts, alone, strict=True):
        row += len(tokens)
        assert kl(expected, logits(backend, row)) < 0.02
    # The rows differ enough for a mix-up to show.
    assert min(kl(alone[0], other) for other in alone[1:]) > 0.5


# ---- saved states


def test_a_state_goes_on_where_it_was_saved(backend: LlamaBackend) -> None:
    tokens = tokens_of(backend, "The capital of France is a city called")
    read(backend, tokens)
    state = backend.save_state(0, partial=False)
    read(backend, [5], first=len(tokens))
    expected = logits(backend)
    backend.seq_rm(0, -1, -1)
    assert backend.load_state(2, state, partial=False)
    assert backend.seq_pos_max(2) == len(tokens) - 1
    read(backend, [5], seq_id=2, first=len(tokens))
    assert logits(backend) == expected


def test_a_damaged_state_is_refused_and_leaves_nothing(backend: LlamaBackend) -> None:
    read(backend, tokens_of(backend, "A fox"))
    state = bytes(backend.save_state(0, partial=False))
    n = len(state)
    rnd = random.Random(1)
    damaged = [state[:cut] for cut in {0, 1, 8, 19, 20, 21, 40, n // 2, n - 1}]
    damaged += [state[: rnd.randrange(n)] for _ in range(50)]
    damaged += [state + b"\0", bytes(n), rnd.randbytes(n), rnd.randbytes(300)]
    for _ in range(300):
        flipped = bytearray(state)
        flipped[rnd.randrange(min(n, 400) if rnd.random() < 0.8 else n)] ^= 1 << rnd.randrange(8)
        damaged.append(bytes(flipped))
    for bad in damaged:
        assert not backend.load_state(1, bad, partial=False)
        assert backend.seq_pos_max(1) == -1
    assert backend.load_state(1, state, partial=False)


def test_an_empty_sequence_has_a_state_too(backend: LlamaBackend) -> None:
    state = backend.save_state(3, partial=False)
    backend.load_state(2, state, partial=False)
    assert backend.seq_pos_max(2) == -1


def test_a_state_of_another_cache_type_is_refused(backend: LlamaBackend) -> None:
    read(backend, tokens_of(backend, "A fox"))
    state = backend.save_state(0, partial=False)
    options = EngineOptions(n_ctx=256, type_k="q8_0", type_v="q8_0", n_threads=2)
    other = open_backend(smollm2_path(), options)
    try:
        assert not other.load_state(0, state, partial=False)
        assert other.seq_pos_max(0) == -1
    finally:
        other.close()


def test_a_window_comes_back_from_a_checkpoint() -> None:
    """Gemma: at 560 tokens a checkpoint of the window; at 1100 it is gone; put back, the answer is
    what it was."""
    options = EngineOptions(n_ctx=1280, n_ubatch=512, n_threads=2)
    backend = open_backend(gemma3_path(), options)
    try:
        rnd = random.Random(3)
        tokens = [rnd.randrange(2000, 9000) for _ in range(1100)]
        tail = tokens_of(backend, "hello there")
        read(backend, tokens[:560])
        checkpoint = backend.save_state(0, partial=True)
        whole = backend.save_state(0, partial=False)
        read(backend, tail, first=560)
        expected = logits(backend)
        backend.seq_rm(0, 560, -1)
        read(backend, tokens[560:], first=560)
        assert backend.seq_pos_min(0) > 560 - 512
        backend.seq_rm(0, 560, -1)
        assert backend.load_state(0, checkpoint, partial=True)
        assert backend.seq_pos_min(0) <= 560 - 512
        read(backend, tail, first=560)
        assert kl(expected, logits(backend)) < 0.02
        assert len(checkpoint) < len(whole)
        assert not backend.load_state(0, checkpoint[:-1], partial=True)
    finally:
        backend.close()


# ---- samplers


def test_samplers_are_of_one_row(backend: LlamaBackend) -> None:
    prompts = [tokens_of(backend, text) for text in ("1 2 3 4 5 6", "a b c d e f")]
    assert backend.decode([Chunk(i, tokens, 0, 1) for i, tokens in enumerate(prompts)])
    rows = [len(prompts[0]) - 1, len(prompts[0]) + len(prompts[1]) - 1]
    for grammar in (None, "root ::= [0-9a-z ]*"):
        params = SamplingParams(temperature=0, grammar=grammar)
        pieces = []
        for row in rows:
            sampler = backend.new_sampler(params, 1)
            pieces.append(backend.tokenizer.piece(sampler.sample(row)))
            sampler.close()
            sampler.close()
        assert pieces == [b" ", b" g"] or pieces == [b" 7", b" g"]


def test_threads_can_be_changed(backend: LlamaBackend) -> None:
    backend.set_threads(1, 1)
    read(backend, [1, 2, 3])
    backend.set_threads(2, 2)
