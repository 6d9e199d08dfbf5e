"""Which rows a step takes: limits hold, answers never wait for prompts, prompts come in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmrun.engine.scheduler import choose_batch
from llmrun.engine.sequence import Phase, Sequence
from llmrun.engine.types import Request


def sequence(phase: Phase, n_tokens: int, n_past: int, seq_id: int) -> Sequence:
    made = Sequence(Request(tuple(range(n_tokens))), seed=0, submitted_s=0.0, n_ctx=10_000)
    made.phase, made.n_past, made.seq_id = phase, n_past, seq_id
    return made


def decoding(seq_id: int, n_tokens: int = 5) -> Sequence:
    return sequence(Phase.DECODE, n_tokens, n_tokens - 1, seq_id)


def reading(seq_id: int, n_pending: int, n_past: int = 0) -> Sequence:
    return sequence(Phase.PREFILL, n_past + n_pending, n_past, seq_id)


@st.composite
def many(draw: st.DrawFn) -> list[Sequence]:
    made = []
    for seq_id in range(draw(st.integers(0, 8))):
        phase = draw(st.sampled_from(list(Phase)))
        n_tokens = draw(st.integers(1, 40))
        most = n_tokens - 1
        n_past = most if phase is Phase.DECODE else draw(st.integers(0, most))
        made.append(sequence(phase, n_tokens, n_past, seq_id))
    return made


@given(many(), st.integers(1, 32), st.integers(1, 8))
def test_limits_hold_and_logits_are_for_last_tokens_only(
    sequences: list[Sequence], n_batch: int, n_outputs_max: int
) -> None:
    batch = choose_batch(sequences, n_batch=n_batch, n_outputs_max=n_outputs_max)
    assert sum(len(chunk.tokens) for _, chunk in batch) <= n_batch
    assert sum(chunk.n_outputs for _, chunk in batch) <= n_outputs_max
    owners = [owner for owner, _ in batch]
    assert len(set(map(id, owners))) == len(owners)
    for owner, chunk in batch:
        assert owner.phase in (Phase.PREFILL, Phase.DECODE)
        assert chunk.seq_id == owner.seq_id
        assert chunk.pos == owner.n_past
        assert chunk.tokens == owner.tokens[chunk.pos : chunk.pos + len(chunk.tokens)]
        assert len(chunk.tokens) > 0
        reaches_end = chunk.pos + len(chunk.tokens) == len(owner.tokens)
        assert chunk.n_outputs == (1 if reaches_end else 0)


@given(many(), st.integers(8, 32))
def test_every_running_answer_is_in_every_step(sequences: list[Sequence], n_batch: int) -> None:
    batch = choose_batch(sequences, n_batch=n_batch, n_outputs_max=8)
    answering = [s for s in sequences if s.phase is Phase.DECODE]
    assert [owner for owner, _ in batch][: len(answering)] == answering


@given(many(), st.integers(1, 32), st.integers(1, 8))
def test_a_step_is_never_empty_while_something_runs(
    sequences: list[Sequence], n_batch: int, n_outputs_max: int
) -> None:
    running = [s for s in sequences if s.phase in (Phase.PREFILL, Phase.DECODE)]
    batch = choose_batch(sequences, n_batch=n_batch, n_outputs_max=n_outputs_max)
    assert bool(batch) == bool(running)


def test_a_long_prompt_is_read_in_chunks_beside_answers() -> None:
    answer, prompt = decoding(0), reading(1, 20)
    sizes = []
    while prompt.n_pending:
        batch = choose_batch([answer, prompt], n_batch=8, n_outputs_max=2)
        assert batch[0][0] is answer
        sizes.append(len(batch[1][1].tokens))
        prompt.n_past += sizes[-1]
    assert sizes == [7, 7, 6]


def test_prompts_are_read_in_the_order_they_came() -> None:
    batch = choose_batch([reading(0, 5), reading(1, 5)], n_batch=8, n_outputs_max=2)
    assert [(owner.seq_id, len(chunk.tokens)) for owner, chunk in batch] == [(0, 5), (1, 3)]


def test_without_a_row_of_logits_left_the_last_token_waits() -> None:
    batch = choose_batch([decoding(0), reading(1, 4)], n_batch=8, n_outputs_max=1)
    assert [(chunk.n_outputs, len(chunk.tokens)) for _, chunk in batch] == [(1, 1), (0, 3)]
