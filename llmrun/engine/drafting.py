"""Guesses the next tokens of the running answers, where that pays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from llmrun.engine.ngram import CopyModel
from llmrun.engine.sequence import Phase, Sequence
from llmrun.engine.speculate import StepCosts, choose_lengths

if TYPE_CHECKING:
    from llmrun.engine.drafter import DraftModel

# Room in the cache was too short for guesses: so many steps without any.
_PAUSE_STEPS = 8


class Drafter:
    """Fills `Sequence.draft` before a step. Lives in the engine's thread."""

    def __init__(
        self,
        costs: StepCosts,
        *,
        n_rows_max: int,
        model: DraftModel | None = None,
        kv_unified: bool = True,
        n_swa: int = 0,
    ) -> None:
        """`n_rows_max`: most rows with logits in a batch. `model` guesses in the place of what
        repeats earlier text. `kv_unified`: a batch is computed in one pass. `n_swa`: the model's
        window."""
        self._costs = costs
        # A second pass takes the guesses of the first for what is there, and may write over the
        # window's end, which is needed again when they were wrong.
        self._needs_one_pass = n_swa > 0 and not kv_unified
        self._kv_unified = kv_unified
        self._model = model
        self._n_rows_max = n_rows_max
        self._pause = 0

    def plan(self, active: Iterable[Sequence]) -> bool:
        """Choose the guesses for the next step. False: there are none.

        While a prompt is being read there are none: its rows fill the batch.
        """
        running = []
        for sequence in active:
            sequence.draft = []
            if sequence.phase in (Phase.PREFILL, Phase.DECODE):
                running.append(sequence)
        answering = [s for s in running if s.phase is Phase.DECODE]
        n_more_max = self._n_rows_max - len(answering)
        if self._pause:
            self._pause -= 1
        elif answering and len(answering) == len(running) and n_more_max > 0:
            has_any = self._plan(answering, n_more_max)
            return has_any and (not self._needs_one_pass or _level(answering))
        return False

    def pause(self, active: Iterable[Sequence]) -> bool:
        """Take the guesses back: the cache has no room for them. False: there were none."""
        had_any = False
        for sequence in active:
            had_any = had_any or bool(sequence.draft)
            sequence.draft = []
        if had_any:
            self._pause = _PAUSE_STEPS
        return had_any

    def _plan(self, answering: list[Sequence], n_more_max: int) -> bool:
        if self._model is not None:
            return self._model.plan(answering, self._costs, n_more_max)
        if not self._costs.knows(len(answering)):
            return False
        all_guesses, offers = [], []
        for sequence in answering:
            if sequence.copying is None:
                sequence.copying = CopyModel(sequence.n_prompt)
            sequence.copying.update(sequence.tokens)
            # The last token of an answer is never decoded, so there is nothing to guess after it.
            n_left = sequence.n_tokens_max - len(sequence.tokens) - 1
            guesses, chances = sequence.copying.offer(sequence.tokens, min(n_left, n_more_max))
            all_guesses.append(guesses)
            offers.append(chances)
        if not any(offers):
            return False
        lengths = choose_lengths(
            offers,
            self._costs,
            n_more_max=n_more_max,
            seq_ids=None if self._kv_unified else [s.seq_id for s in answering],
        )
        for sequence, guesses, length in zip(answering, all_guesses, lengths, strict=True):
            sequence.draft = guesses[:length]
        return any(lengths)


def _level(answering: list[Sequence]) -> bool:
    """Shorten the guesses to what is checked in one pass. False: there are none then."""
    ids = [sequence.seq_id for sequence in answering]
    are_neighbours = max(ids) - min(ids) == len(ids) - 1
    n = min(len(sequence.draft) for sequence in answering) if are_neighbours else 0
    for sequence in answering:
        del sequence.draft[n:]
    return n > 0
