"""Which tokens go into the next batch. Pure.

Every running sequence first gets its next token, so that reading one user's long prompt never
stops another's answer; what is left of the batch is filled with prompt chunks in order of arrival.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmrun.engine.backend import Chunk
from llmrun.engine.sequence import Phase, Sequence


def choose_batch(
    sequences: Iterable[Sequence],
    *,
    n_batch: int,
    n_outputs_max: int,
    n_beside: int | None = None,
) -> list[tuple[Sequence, Chunk]]:
    """The rows of the next step: at most `n_batch` of them, `n_outputs_max` with logits.

    `n_beside`: most rows of a step that has both answers and prompts, so that who reads along does
    not wait for a whole batch. Drafts must leave a row to every other running answer.
    """
    chosen: list[tuple[Sequence, Chunk]] = []
    n_rows = n_outputs = 0
    reading: list[Sequence] = []
    for sequence in sequences:
        if sequence.phase is Phase.PREFILL:
            reading.append(sequence)
        elif sequence.phase is Phase.DECODE and n_rows < n_batch and n_outputs < n_outputs_max:
            chosen.append((sequence, _next_token(sequence)))
            n_rows += 1 + len(sequence.draft)
            n_outputs += 1 + len(sequence.draft)
    if chosen and n_beside is not None:
        n_batch = min(n_batch, n_rows + n_beside)
    for sequence in reading:
        n_tokens = min(_n_to_boundary(sequence), n_batch - n_rows)
        if n_tokens == sequence.n_pending and n_outputs == n_outputs_max:
            n_tokens -= 1  # its last token needs a row of logits, and none is left in this batch
        if n_tokens <= 0:
            continue
        chunk = _chunk(sequence, n_tokens)
        chosen.append((sequence, chunk))
        n_rows += n_tokens
        n_outputs += chunk.n_outputs
    return chosen


def _n_to_boundary(sequence: Sequence) -> int:
    ends = [end for end in sequence.boundaries if end > sequence.n_past]
    return min(ends, default=len(sequence.tokens)) - sequence.n_past


def _chunk(sequence: Sequence, n_tokens: int) -> Chunk:
    first = sequence.n_past
    last = first + n_tokens
    n_outputs = 1 if last == len(sequence.tokens) else 0
    return Chunk(sequence.seq_id, sequence.tokens[first:last], first, n_outputs)


def _next_token(sequence: Sequence) -> Chunk:
    """The last token, and the guesses after it: with logits on all, to check each guess."""
    first = sequence.n_past
    tokens = [*sequence.tokens[first:], *sequence.draft]
    return Chunk(sequence.seq_id, tokens, first, len(tokens))
