"""Guesses by a small model of the same vocabulary.

The small model follows the running answers in a cache of its own, a slot of the same number for
each, and says what it would say next: all answers' first guesses in one step, then all second
ones. The target checks them as it checks any guess, so a bad small model costs time, never a token.
How far it can be trusted is learnt from how its guesses came out; what its steps cost is counted
with those of the target, and where both say that it does not pay it rests, but for a rare try.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from llmrun.engine.backend import Backend, Chunk, DecodeResult, Sampler
from llmrun.engine.draft_file import check_vocabulary
from llmrun.engine.governor import Governor
from llmrun.engine.pace import Pace
from llmrun.engine.prefix_cache import window_allows
from llmrun.engine.radix import common_prefix
from llmrun.engine.sequence import Sequence
from llmrun.engine.speculate import StepCosts, choose_lengths
from llmrun.engine.types import SamplingParams
from llmrun.errors import LlmrunError, UsageError

# Kinds of guesses by how many before it were right in a row, and how often one of the kind is
# taken for right before anything is known.
_RUN_FROM = (0, 1, 3, 6, 12, 24)
_FIRST_CHANCES = (0.55, 0.65, 0.7, 0.75, 0.8, 0.85)
_FIRST_WEIGHT = 4.0
_KEEP = 0.97  # of the old counts at each new guess

# While guessing does not pay: a try of so many tokens, seldom enough to cost this part of the time.
_TRY_TOKENS = 3
_LOST_PART = 0.02
_MIN_WAIT_S = 0.5
_MAX_WAIT_S = 60.0
_MAX_GAP_S = 1.0
# The small model's cache has no room: so many steps without it.
_REST_STEPS = 8

# A text is only read for an answer that can make up for it: taken to be this long at most, and
# half of its time to be saved.
_LONG_ANSWER = 256
_SAVED_PART = 0.5
_WORTH_SHARING = 32  # tokens that another slot has and this one would have to read

_log = logging.getLogger("llmrun.llama")


@dataclass(slots=True)
class _Slot:
    """`tokens` are in the small model's cache under this number; the first `n_sure` of them are
    known to be those of `owner`. `guess` followed the owner's first `n_before` tokens. `n_run`
    guesses in a row were right lately."""

    seq_id: int
    owner: Sequence | None = None
    tokens: list[int] = field(default_factory=list)
    n_sure: int = 0
    guess: list[int] = field(default_factory=list)
    n_before: int = 0
    n_run: int = 0


class DraftModel:
    """Fills `Sequence.draft` before a step. Lives in the engine's thread; owns its backend."""

    def __init__(
        self,
        backend: Backend,
        target: Backend,
        *,
        clock: Callable[[], float],
        steady_threads: bool = False,
    ) -> None:
        """Raises UsageError for a model that cannot guess for `target`."""
        facts = backend.facts
        if facts.is_recurrent or facts.is_hybrid:
            raise UsageError(
                "this draft model cannot take a guess back",
                why=f"{facts.description} has a recurrent state",
                hint="name a draft model with attention only",
            )
        check_vocabulary(target.tokenizer, backend.tokenizer)
        self._backend = backend
        self._target_is_unified = target.kv_unified
        self._clock = clock
        self.costs = StepCosts()
        governor = Governor(backend.n_threads, backend.n_threads_batch) if steady_threads else None
        self._pace = Pace(backend, clock, governor, self.costs)
        self._slots = [_Slot(seq_id) for seq_id in range(backend.n_seq_max)]
        self._sampler: Sampler | None = None
        self._right = [chance * _FIRST_WEIGHT for chance in _FIRST_CHANCES]
        self._total = [_FIRST_WEIGHT] * len(_FIRST_CHANCES)
        self._is_trying = False
        self._wait_s = _MIN_WAIT_S
        self._seen_s = self._busy_s = self._last_s = 0.0
        self._n_rest = 0
        self._is_broken = False

    def plan(self, answering: list[Sequence], costs: StepCosts, n_more_max: int) -> bool:
        """Choose the guesses of the next step, whose time `costs` knows. False: there are none, and
        no time was spent. Guesses that were not checked yet stand when they are asked for again."""
        if self._is_broken:
            return False
        if self._n_rest:
            self._n_rest -= 1
            return False
        try:
            return self._repeat(answering, n_more_max) or self._plan(answering, costs, n_more_max)
        except LlmrunError as error:
            # The answers need no guesses.
            self._is_broken = True
            _log.warning("the draft model is out of use: %s", error)
            for sequence in answering:
                sequence.draft = []
            return False

    def close(self) -> None:
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None
        self._backend.close()

    def _repeat(self, answering: list[Sequence], n_more_max: int) -> bool:
        had_any = False
        for sequence in answering:
            slot = self._slots[sequence.seq_id]
            if slot.owner is sequence and slot.n_before == len(sequence.tokens):
                sequence.draft = slot.guess[:n_more_max]
                n_more_max -= len(sequence.draft)
                had_any = had_any or bool(sequence.draft)
        return had_any

    def _plan(self, answering: list[Sequence], costs: StepCosts, n_more_max: int) -> bool:
        slots = [self._slots[sequence.seq_id] for sequence in answering]
        rooms = []
        for sequence, slot in zip(answering, slots, strict=True):
            self._learn(slot)
            if slot.owner is not sequence:
                slot.owner = sequence
                slot.n_sure = slot.n_run = 0
            # The last token of an answer is never decoded, so there is nothing to guess after it.
            n_left = sequence.n_tokens_max - len(sequence.tokens) - 1
            rooms.append(max(0, min(n_left, n_more_max)))
        lengths = choose_lengths(
            [
                self._chances(slot, room) if self._is_worth_reading(sequence, slot, costs) else []
                for sequence, slot, room in zip(answering, slots, rooms, strict=True)
            ],
            costs,
            n_more_max=n_more_max,
            guess_costs=self.costs,
            seq_ids=None if self._target_is_unified else [s.seq_id for s in answering],
        )
        now_s = self._clock()
        # What passes while nothing runs is no time to make up for a try.
        self._busy_s += min(now_s - self._seen_s, _MAX_GAP_S)
        self._seen_s = now_s
        if any(lengths):
            self._wait_s = _MIN_WAIT_S
            self._is_trying = False
        else:
            if not self._is_trying and not self._may_try(answering, slots, costs):
                return False
            self._is_trying = True
            n_each = min(_TRY_TOKENS, n_more_max // len(answering))
            lengths = [min(n_each, room) for room in rooms]
        self._last_s = self._busy_s
        return self._draft(
            [part for part in zip(answering, slots, lengths, strict=True) if part[2]]
        )

    # ---- what guesses are worth

    def _learn(self, slot: _Slot) -> None:
        """Hold the last guess against what came."""
        guess, slot.guess = slot.guess, []
        if not guess or slot.owner is None:
            return
        came = slot.owner.tokens[slot.n_before : slot.n_before + len(guess)]
        for guessed, token in zip(guess, came, strict=False):
            kind = _kind_of(slot.n_run)
            is_right = guessed == token
            self._right[kind] = self._right[kind] * _KEEP + is_right
            self._total[kind] = self._total[kind] * _KEEP + 1
            slot.n_run = slot.n_run + 1 if is_right else 0
            if not is_right:
                return

    def _chances(self, slot: _Slot, n: int) -> list[float]:
        chances = []
        chance = 1.0
        for n_run in range(slot.n_run, slot.n_run + n):
            kind = _kind_of(n_run)
            chance *= self._right[kind] / self._total[kind]
            chances.append(chance)
        return chances

    def _n_unread(self, sequence: Sequence, slot: _Slot) -> int:
        """At most; what slots share is not looked at."""
        n_read = len(slot.tokens) if slot.n_sure else 0
        return max(1, len(sequence.tokens) - n_read)

    def _is_worth_reading(self, sequence: Sequence, slot: _Slot, costs: StepCosts) -> bool:
        n_unread = self._n_unread(sequence, slot)
        if n_unread < _WORTH_SHARING or not self.costs.is_known:
            return True
        n_left = min(sequence.n_tokens_max - len(sequence.tokens), _LONG_ANSWER)
        return self.costs.seconds(n_unread) < _SAVED_PART * n_left * costs.seconds(1)

    def _may_try(self, answering: list[Sequence], slots: list[_Slot], costs: StepCosts) -> bool:
        n = len(answering)
        n_unread = sum(map(self._n_unread, answering, slots))
        cost_s = self.costs.seconds(n_unread) + (_TRY_TOKENS - 1) * self.costs.seconds(n)
        cost_s += costs.seconds(n * (1 + _TRY_TOKENS)) - costs.seconds(n)
        if self._busy_s - self._last_s < max(self._wait_s, cost_s / _LOST_PART):
            return False
        self._wait_s = min(2 * self._wait_s, _MAX_WAIT_S)
        return True

    # ---- guessing

    def _draft(self, chosen: list[tuple[Sequence, _Slot, int]]) -> bool:
        """At most one batch of unread text, then a step for each place. What is not read to the
        end gets no guess yet."""
        for sequence, slot, _ in chosen:
            self._align(sequence, slot)
        chosen.sort(key=lambda part: len(part[0].tokens) - len(part[1].tokens))
        n_room = self._backend.n_batch
        chunks = []
        for sequence, slot, _ in chosen:
            first = len(slot.tokens)
            tokens = sequence.tokens[first : first + n_room]
            if tokens:
                is_end = first + len(tokens) == len(sequence.tokens)
                chunks.append(Chunk(slot.seq_id, tokens, first, int(is_end)))
                n_room -= len(tokens)
        if not self._decode(chunks):
            self._n_rest = _REST_STEPS
            return False
        guessed = self._take(chunks)
        for sequence, slot, _ in chosen:
            slot.n_sure = len(slot.tokens)
            slot.n_before = len(sequence.tokens)
            if slot.guess:
                self._is_trying = False
        is_eog = self._backend.tokenizer.is_eog
        depth = 1
        while guessed:
            depth += 1
            going = {
                slot.seq_id
                for sequence, slot, length in chosen
                if length >= depth and not sequence.cancelled
            }
            chunks = [
                Chunk(slot.seq_id, [token], len(slot.tokens), 1)
                for slot, token in guessed
                if slot.seq_id in going and not is_eog(token)
            ]
            guessed = self._take(chunks) if chunks and self._decode(chunks) else []
        for sequence, slot, _ in chosen:
            sequence.draft = list(slot.guess)
        return True

    def _take(self, chunks: list[Chunk]) -> list[tuple[_Slot, int]]:
        """The guesses that the last batch gives, one for each chunk with an output."""
        if self._sampler is None:
            self._sampler = self._backend.new_sampler(SamplingParams(temperature=0), 0)
        found = []
        row = -1
        for chunk in chunks:
            slot = self._slots[chunk.seq_id]
            slot.tokens.extend(chunk.tokens)
            row += len(chunk.tokens)
            if chunk.n_outputs:
                token = self._sampler.sample(row)
                slot.guess.append(token)
                found.append((slot, token))
        self._pace.end_step()
        return found

    def _decode(self, chunks: list[Chunk]) -> bool:
        result = self._pace.decode(chunks)
        if result is DecodeResult.FULL:
            wanted = {chunk.seq_id for chunk in chunks}
            others = [slot for slot in self._slots if slot.tokens and slot.seq_id not in wanted]
            for slot in others:
                self._empty(slot)
            result = self._pace.decode(chunks) if others else result
        return result is DecodeResult.DONE

    def _align(self, sequence: Sequence, slot: _Slot) -> None:
        """Drop what the slot holds beyond the sequence's text, and the last token, which has to
        be decoded for its logits."""
        tokens = sequence.tokens
        n_same = slot.n_sure + common_prefix(slot.tokens[slot.n_sure :], tokens[slot.n_sure :])
        if slot.n_sure == 0 and self._share(tokens, slot, n_same):
            n_same = len(slot.tokens)
        self._cut(slot, min(n_same, len(tokens) - 1))

    def _share(self, tokens: list[int], slot: _Slot, n_own: int) -> bool:
        """Take over the cells of another slot that starts more alike."""
        for other in self._slots:
            n = min(common_prefix(other.tokens, tokens), len(tokens) - 1)
            if other is not slot and n >= n_own + _WORTH_SHARING and self._keeps(other, n):
                self._empty(slot)
                if self._backend.seq_cp(other.seq_id, slot.seq_id, n):
                    slot.tokens = other.tokens[:n]
                    return True
        return False

    def _keeps(self, slot: _Slot, n_keep: int) -> bool:
        pos_min, n_swa = self._backend.seq_pos_min(slot.seq_id), self._backend.facts.n_swa
        return window_allows(n_keep, len(slot.tokens), pos_min, n_swa)

    def _cut(self, slot: _Slot, n_keep: int) -> None:
        if n_keep == len(slot.tokens):
            return
        if self._keeps(slot, n_keep) and self._backend.seq_rm(slot.seq_id, n_keep, -1):
            del slot.tokens[n_keep:]
        else:
            self._empty(slot)

    def _empty(self, slot: _Slot) -> None:
        self._backend.seq_rm(slot.seq_id, -1, -1)
        slot.tokens = []
        slot.n_sure = 0


def _kind_of(n_run: int) -> int:
    return max(kind for kind, start in enumerate(_RUN_FROM) if n_run >= start)
