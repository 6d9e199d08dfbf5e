"""What the engine's thread does, step by step: admit, choose a batch, decode, sample.

A step takes the waiting requests into free cache slots, decodes one batch, and samples a token for
each sequence that got logits.
"""

from __future__ import annotations

from collections.abc import Callable

from llmrun.engine.answers import Answers
from llmrun.engine.backend import Backend, Chunk, DecodeResult
from llmrun.engine.drafting import Drafter
from llmrun.engine.pace import Pace
from llmrun.engine.residents import Residents
from llmrun.engine.scheduler import choose_batch
from llmrun.engine.sequence import Phase, Sequence
from llmrun.engine.types import CHECKPOINT_BYTES, FinishReason
from llmrun.errors import LlmrunError


class Core:
    """The requests of one engine on their way through one backend. Lives in the engine's thread.

    `nothing_new` says that no request waits to be taken in; it is asked between two tokens. Of the
    totals `n_…` see `engine.types.EngineCounters`.
    """

    def __init__(
        self,
        backend: Backend,
        answers: Answers,
        pace: Pace,
        drafter: Drafter | None,
        *,
        clock: Callable[[], float],
        nothing_new: Callable[[], bool],
        checkpoint_bytes: int = CHECKPOINT_BYTES,
    ) -> None:
        self._backend = backend
        self._answers = answers
        self._pace = pace
        self._drafter = drafter
        self._clock = clock
        self._nothing_new = nothing_new
        self.residents = Residents(backend, checkpoint_bytes)
        self.active: list[Sequence] = []
        # A request lost its slot for want of cells: none comes in before another has left.
        self._crowded = False
        self.n_requests = self.n_prompt = self.n_cached = self.n_drafted = self.n_accepted = 0

    def run_once(self) -> None:
        """One step, or the steps of a single answer until something else comes up."""
        active = self.active
        for sequence in active:
            if sequence.cancelled:
                self.finish(sequence, "cancelled")
        self._admit()
        self.residents.close_gaps()
        has_draft = self._drafter is not None and self._drafter.plan(active)
        if len(active) == 1 and active[0].phase is Phase.DECODE and not has_draft:
            self._decode_alone(active[0])
            # One token is always ahead of what was decoded.
            self._pace.end_alone(active[0].n_past + 1)
        else:
            self._step()
        active[:] = [sequence for sequence in active if sequence.phase is not Phase.FINISHED]

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._release(sequence)
        self._answers.finish(sequence, reason)

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        """End one request with an error; the others go on."""
        self._release(sequence)
        self._answers.fail(sequence, error)

    def _release(self, sequence: Sequence) -> None:
        if self.residents.release(sequence):
            self._crowded = False

    def _admit(self) -> None:
        """Give slots to waiting requests, first come first served."""
        if self._crowded and len(self.residents) > 0:
            return
        self._crowded = False
        for sequence in self.active:
            if sequence.phase is not Phase.WAITING:
                continue
            try:
                # Before a slot is taken: a grammar that does not parse costs nobody the cache.
                if sequence.sampler is None:
                    sequence.sampler = self._answers.new_sampler(sequence)
            except LlmrunError as error:
                self._fail(sequence, error)
                continue
            if self.residents.wait_for_prefix(sequence, self.active):
                continue
            if not self.residents.place(sequence):
                return
            if sequence.started_s is None:
                sequence.started_s = self._clock()
                sequence.n_cached = sequence.n_past
                self.n_requests += 1
                self.n_prompt += sequence.n_prompt
                self.n_cached += sequence.n_cached

    def _step(self) -> None:
        backend = self._backend
        phases = [sequence.phase for sequence in self.active]
        batch = choose_batch(
            self.active,
            n_batch=backend.n_batch,
            n_outputs_max=backend.n_outputs_max,
            n_beside=self._pace.n_rows_beside(
                phases.count(Phase.PREFILL), phases.count(Phase.DECODE)
            ),
        )
        if not batch:
            return
        if not backend.kv_unified:
            # Neighbours are computed together when they come in the order of their ids.
            batch.sort(key=lambda chosen: chosen[0].seq_id)
        result = self._pace.decode([chunk for _, chunk in batch])
        if result is DecodeResult.DONE:
            row = -1
            for sequence, chunk in batch:
                n_tokens = len(chunk.tokens)
                row += n_tokens
                if sequence.draft:
                    self._check_draft(sequence, row + 1 - n_tokens)
                    continue
                sequence.n_past += n_tokens
                if sequence.phase is Phase.PREFILL:
                    self.residents.keep_checkpoint(sequence)
                if chunk.n_outputs:
                    self._take_token(sequence, row)
                else:
                    self._answers.report_prompt(sequence)
            self._pace.end_step()
        elif result is DecodeResult.ABORTED:
            for sequence, chunk in batch:
                self._trim_after_abort(sequence, chunk)
        elif self._drafter is None or not self._drafter.pause(self.active):
            self._make_room()

    def _check_draft(self, sequence: Sequence, row: int) -> None:
        """Take tokens from the rows of a chunk with guesses, from `row` on, up to and with the
        first that was guessed otherwise. Each is the model's own choice after those before it."""
        draft, sequence.draft = sequence.draft, []
        sequence.n_drafted += len(draft)
        n_before = sequence.n_accepted
        seq_id = sequence.seq_id
        for i in range(len(draft) + 1):
            sequence.n_past += 1
            self._take_token(sequence, row + i)
            if sequence.phase is not Phase.DECODE:
                break
            if i == len(draft) or sequence.tokens[-1] != draft[i]:
                break
            sequence.n_accepted += 1
        self.n_drafted += len(draft)
        self.n_accepted += sequence.n_accepted - n_before
        if i < len(draft):
            self._backend.seq_rm(seq_id, sequence.n_past, -1)

    def _take_token(self, sequence: Sequence, row: int) -> None:
        if sequence.phase is Phase.PREFILL:
            sequence.phase = Phase.DECODE
            if sequence.request.max_tokens == 0:
                sequence.first_token_s = sequence.last_token_s = self._clock()
                self.finish(sequence, "length")
                return
        try:
            reason = self._answers.sample(sequence, row)
        except LlmrunError as error:
            self._fail(sequence, error)
            return
        if reason is not None:
            self.finish(sequence, reason)

    def _decode_alone(self, sequence: Sequence) -> None:
        """The steps of a single answer, until something else comes up.

        The same as `_step` where there is nothing to choose. It exists because after a decode the
        processor's caches hold weights, not this program: every line here costs ten times what it
        does in a benchmark of Python.
        """
        decode_one, sample = self._backend.decode_one, self._answers.sample
        nothing_new = self._nothing_new
        done = DecodeResult.DONE
        seq_id, tokens = sequence.seq_id, sequence.tokens
        look_s = self._pace.start_alone(len(tokens))
        while not sequence.cancelled and nothing_new():
            n_past = sequence.n_past
            result = decode_one(seq_id, tokens[n_past], n_past)
            if result is done:
                sequence.n_past = n_past + 1
                try:
                    reason = sample(sequence, 0)
                except LlmrunError as error:
                    self._fail(sequence, error)
                    return
                if reason is not None:
                    self.finish(sequence, reason)
                    return
                if sequence.last_token_s >= look_s:
                    look_s = self._pace.look(sequence.last_token_s, len(tokens))
                    if self._drafter is not None and self._drafter.plan(self.active):
                        return
            elif result is DecodeResult.ABORTED:
                self._trim_after_abort(sequence, Chunk(seq_id, tokens[n_past:], n_past, 1))
                return
            else:
                self._make_room()
                return

    def _trim_after_abort(self, sequence: Sequence, chunk: Chunk) -> None:
        """Keep what the cache really holds, but never the last token: its logits are not there."""
        if self.residents.has_state:
            # The state may have been changed in part, and cannot go back.
            self.residents.start_over(sequence)
            return
        held = self._backend.seq_pos_max(sequence.seq_id) + 1
        self.residents.cut(sequence, max(chunk.pos, min(held, len(sequence.tokens) - 1)))

    def _make_room(self) -> None:
        """The cache is full: give up idle slots, then the youngest request.

        A request that loses its slot keeps its answer so far and its sampler; it goes on once
        another has finished. Waiting that long is what lets the others come to an end.
        """
        if self.residents.evict_idle():
            return
        running = [s for s in self.active if s.phase in (Phase.PREFILL, Phase.DECODE)]
        if len(running) == 1:
            self.finish(running[0], "length")
            return
        sequence = running[-1]
        self._release(sequence)
        sequence.phase = Phase.WAITING
        self._crowded = True
