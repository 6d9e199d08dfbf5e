"""Who is in the cache: gives sequences their slots and takes them back, in the backend too."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from llmrun.engine.backend import Backend, count_cells
from llmrun.engine.prefix_cache import Checkpoint, Placement, PrefixCache, Slot
from llmrun.engine.radix import common_prefix
from llmrun.engine.sequence import Phase, Sequence
from llmrun.engine.types import CHECKPOINT_BYTES, SavedPrefix

# A running answer will need this many cells soon; whoever comes in must leave them.
_GROWTH = 16
# A prefix that another request is reading just now is worth waiting for from this length on.
_WORTH_WAITING = 8
# Where each sequence has cells of its own: a gap among the running ones costs a step as much as it
# takes to move so many cells (SmolLM2 on two cores: 5 ms, 1200 cells in 13 ms). A larger model has
# more weights for each cell, and gains more.
_CELLS_PER_GAP = 512
# A checkpoint costs megabytes: only after so many tokens more.
_CHECKPOINT_EVERY = 64
# The newest checkpoints of a sequence go to disk with it.
_N_SAVED_CHECKPOINTS = 3


@dataclass(frozen=True, slots=True)
class _Gaps:
    """`n` of them; `moves` from a running sequence's id to an idle one's would close them, and take
    `n_moved` cells with them."""

    n: int = 0
    moves: SequenceOf[tuple[int, int]] = ()
    n_moved: int = 0


class Residents:
    """The slots of the running sequences. Runs in the engine's thread. `n_cells_max`: cells of all
    sequences together."""

    def __init__(self, backend: Backend, checkpoint_bytes: int = CHECKPOINT_BYTES) -> None:
        self._backend = backend
        # A recurrent state is the sum of all tokens so far: no part of it can be taken or undone.
        self.has_state = backend.facts.is_recurrent or backend.facts.is_hybrid
        self._forgets = self.has_state or backend.facts.n_swa > 0
        self.cache = PrefixCache(
            backend.n_seq_max,
            n_swa=backend.facts.n_swa,
            can_cut=not self.has_state,
            pos_min=backend.seq_pos_min,
            shares_cells=backend.kv_unified,
            checkpoint_bytes=checkpoint_bytes,
        )
        self._slots: dict[Sequence, Slot] = {}
        self.n_cells_max = count_cells(backend)
        # The moves that would close the gaps among the running sequences, and what they cost; None:
        # to be found out. What the gaps have cost since there are any. All in cells.
        self._gaps: _Gaps | None = None
        self._n_paid = 0

    def __len__(self) -> int:
        """Sequences that have a slot."""
        return len(self._slots)

    def n_cells(self) -> int:
        """Cells that hold tokens. From any thread: then it is right up to what a step changes."""
        tree = self.cache.tree
        n_cells = tree.n_cells()
        for sequence in self._slots.copy():
            # The tree learns of it when the next request comes or this one goes.
            n_cells += max(0, sequence.n_past - tree.length(sequence.seq_id))
        return min(n_cells, self.n_cells_max)

    def serves_anyone(self) -> bool:
        """Whether anyone with a slot still wants his answer. From any thread."""
        return not all(sequence.cancelled for sequence in self._slots.copy())

    def place(self, sequence: Sequence) -> bool:
        """Give the sequence a slot and what the cache holds of its tokens. False: no slot is free,
        or the cells that no running sequence needs are too few."""
        self._note_progress()
        is_limited = self._backend.kv_unified and bool(self._slots)
        placement = self.cache.place(sequence.tokens, self._n_room() if is_limited else None)
        if placement is None:
            return False
        self._gaps = None
        slot = placement.slot
        self._slots[sequence] = slot
        sequence.seq_id = slot.seq_id
        sequence.phase = Phase.PREFILL
        sequence.n_past = placement.n_keep
        if not self._carry_out(placement):
            self.start_over(sequence)
        sequence.boundaries = set()
        if self.has_state:
            # A checkpoint before the last token serves the same prompt again, too.
            sequence.boundaries.add(sequence.n_prompt - 1)
        if self._forgets:
            wanted = sequence.request.come_back_to
            sequence.boundaries.update(n for n in wanted if 0 < n < sequence.n_prompt)
        return True

    def wait_for_prefix(self, sequence: Sequence, active: Iterable[Sequence]) -> bool:
        """Whether another sequence is just reading tokens that this one needs too: then it pays to
        wait and share them."""
        self._note_progress()
        n_usable = None
        for other in active:
            if other.phase is not Phase.PREFILL:
                continue
            n_common = min(common_prefix(other.tokens, sequence.tokens), len(sequence.tokens) - 1)
            if n_common <= other.n_past:
                continue
            if n_usable is None:
                n_usable = self.cache.n_usable(sequence.tokens)
            if n_common - n_usable >= _WORTH_WAITING:
                if self._forgets:
                    # Beyond it, the other could no longer give what was there.
                    other.boundaries.add(n_common)
                return True
        return False

    def close_gaps(self) -> None:
        """Where each sequence has cells of its own, one pass computes the rows of neighbours only
        (`passes`): the running ones change places with idle ones until they are neighbours.

        That moves all they hold, and saves reading all weights once more in every step. So it is
        done when the steps since they came apart have cost as much as it does: whatever comes and
        goes, at most twice of what would have been best is spent.
        """
        if self._backend.kv_unified or self.has_state:
            return
        if self._gaps is None:
            self._note_progress()
            running = {slot.seq_id for slot in self._slots.values()}
            held = [self.cache.tree.length(slot.seq_id) for slot in self.cache.slots]
            self._gaps = _find_gaps(running, held)
        gaps = self._gaps
        if not gaps.moves:
            self._n_paid = 0
            return
        self._n_paid += gaps.n * _CELLS_PER_GAP
        if self._n_paid < gaps.n_moved:
            return
        self._n_paid = 0
        self._gaps = _Gaps()
        slots = self.cache.slots
        running_at = {slot.seq_id: sequence for sequence, slot in self._slots.items()}
        for old, new in gaps.moves:
            if not self._backend.seq_swap(old, new):
                return
            running_at[old].seq_id = new
            self.cache.exchange(slots[old], slots[new])

    def start_over(self, sequence: Sequence) -> None:
        """Drop all that the cache holds of the sequence; it is read again."""
        self._backend.seq_rm(sequence.seq_id, -1, -1)
        self.cache.cut(self._slots[sequence], 0)
        sequence.n_past = sequence.n_cached = 0
        sequence.phase = Phase.PREFILL

    def cut(self, sequence: Sequence, n_past: int) -> None:
        """Drop what the cache holds beyond the first `n_past` tokens."""
        self._backend.seq_rm(sequence.seq_id, n_past, -1)
        self.cache.cut(self._slots[sequence], n_past)
        sequence.n_past = n_past

    def keep_checkpoint(self, sequence: Sequence) -> None:
        """After a step of the sequence's prompt: keep what the model is about to forget, where the
        next turn may have to go back to, and where others begin to differ."""
        n_past = sequence.n_past
        is_end = n_past == sequence.n_prompt and not self.has_state
        if not self._forgets or not (is_end or n_past in sequence.boundaries):
            return
        is_asked = n_past in sequence.request.come_back_to
        slot = self._slots[sequence]
        last = slot.checkpoints[-1].n_tokens if slot.checkpoints else 0
        if n_past - last < (1 if is_asked else _CHECKPOINT_EVERY):
            return
        self.cache.grow(slot, sequence.tokens, n_past)
        state = self._backend.save_state(sequence.seq_id, partial=True)
        self.cache.keep(slot, Checkpoint(n_past, state))

    def release(self, sequence: Sequence) -> bool:
        """The sequence leaves; its tokens stay for others. False: it had no slot."""
        slot = self._slots.pop(sequence, None)
        if slot is None:
            return False
        self.cache.grow(slot, sequence.tokens, sequence.n_past)
        self.cache.release(slot)
        self._gaps = None
        return True

    def evict_idle(self) -> bool:
        """Clear the idle slot unused for longest. False: there is none."""
        slot = self.cache.evict_idle()
        if slot is None:
            return False
        self._empty(slot)
        return True

    def save(self, tokens: SequenceOf[int], max_bytes: int) -> SavedPrefix | None:
        """See `EngineLike.save_prefix`."""
        self._note_progress()
        found = self.cache.most_alike(tokens)
        if found is None:
            return None
        slot, _ = found
        seq_id = slot.seq_id
        n_left = max_bytes - self._backend.state_bytes(seq_id)
        if n_left < 0:
            return None
        checkpoints = []
        for checkpoint in slot.checkpoints[: -1 - _N_SAVED_CHECKPOINTS : -1]:
            n_left -= len(checkpoint.state)
            if n_left >= 0:
                checkpoints.append((checkpoint.n_tokens, checkpoint.state))
        tokens = self.cache.tree.tokens(seq_id)
        first, n_swa = self._backend.seq_pos_min(seq_id), self._backend.facts.n_swa
        return SavedPrefix(
            tuple(tokens),
            self._backend.save_state(seq_id, partial=False),
            # Of what a window has moved on from nothing is saved, though it may still be there.
            max(0, first, len(tokens) - n_swa if n_swa else 0),
            tuple(reversed(checkpoints)),
        )

    def restore(self, saved: SavedPrefix) -> int:
        """See `EngineLike.restore_prefix`."""
        self._note_progress()
        tokens, n = saved.tokens, len(saved.tokens)
        found = self.cache.most_alike(tokens)
        if found is not None and found[1] == n:
            is_end = self.cache.tree.length(found[0].seq_id) == n
            if is_end or not self._forgets:
                return n
        slot = self.cache.find_idle()
        is_shared = self._backend.kv_unified
        n_room = self._n_room() if is_shared else self._backend.n_ctx
        if slot is None or n == 0 or n > n_room:
            return 0
        self._empty(slot)
        while is_shared and self.cache.tree.n_cells() + n > self._backend.n_ctx:
            other = self.cache.evict_idle(slot)
            if other is None:
                return 0
            self._empty(other)
        is_back = self._backend.load_state(slot.seq_id, saved.state, partial=False)
        if not is_back or self._backend.seq_pos_max(slot.seq_id) != n - 1:
            self._empty(slot)
            return 0
        self.cache.put(slot, tokens)
        for n_tokens, state in saved.checkpoints:
            if 0 < n_tokens <= n:
                self.cache.keep(slot, Checkpoint(n_tokens, state))
        return n

    def check(self) -> None:
        """The books against the backend, while nothing runs. AssertionError when they differ."""
        assert not self._slots, "a sequence was never released"
        cells = self.cache.tree.n_cells()
        assert cells <= self.n_cells_max, f"{cells} cells in a cache of {self.n_cells_max}"
        for slot in self.cache.slots:
            n_held, seq_id = self.cache.tree.length(slot.seq_id), slot.seq_id
            assert not slot.busy, f"slot {seq_id} is busy"
            last, first = self._backend.seq_pos_max(seq_id), self._backend.seq_pos_min(seq_id)
            assert last == n_held - 1, f"sequence {seq_id} ends at {last}, not {n_held - 1}"
            window = self._backend.facts.n_swa or n_held + 1
            is_whole = first <= max(0, n_held + 1 - window)
            # A recurrent state is one cell, at the last position.
            assert is_whole or self.has_state, f"sequence {seq_id} begins at {first}"
            assert all(c.n_tokens <= n_held for c in slot.checkpoints), "a checkpoint of nothing"

    def _empty(self, slot: Slot) -> None:
        self._backend.seq_rm(slot.seq_id, -1, -1)
        self.cache.cut(slot, 0)

    def _note_progress(self) -> None:
        """What running sequences have read can be shared from here on."""
        for sequence, slot in self._slots.items():
            self.cache.grow(slot, sequence.tokens, sequence.n_past)

    def _n_room(self) -> int:
        """Cells that no running sequence holds or will soon need."""
        n_needed = 0
        for sequence in self._slots:
            n_left = sequence.n_tokens_max - len(sequence.tokens)
            n_needed += sequence.n_pending + min(n_left, _GROWTH)
        return self._backend.n_ctx - self.cache.n_busy_cells() - n_needed

    def _carry_out(self, placement: Placement) -> bool:
        """False: the backend cannot, and the slot must be emptied."""
        backend, seq_id, n_keep = self._backend, placement.slot.seq_id, placement.n_keep
        if placement.copy_from is not None:
            backend.seq_rm(seq_id, -1, -1)
            if not backend.seq_cp(placement.copy_from.seq_id, seq_id, n_keep):
                return False
        if placement.restore is None:
            return backend.seq_rm(seq_id, n_keep or -1, -1)
        state = placement.restore.state
        if self.has_state:
            # Its state must be back before the rest can be cut to it; windows the other way.
            return backend.load_state(seq_id, state, partial=True) and backend.seq_rm(
                seq_id, n_keep, -1
            )
        return backend.seq_rm(seq_id, n_keep, -1) and backend.load_state(
            seq_id, state, partial=True
        )


def _find_gaps(running: set[int], held: SequenceOf[int]) -> _Gaps:
    """Between sequences of these ids, and the moves that take the fewest cells. `held`: cells by
    id."""
    n_gaps = sum(seq_id + 1 not in running for seq_id in running) - 1
    if n_gaps < 1:
        return _Gaps()
    n = len(running)

    def moves_into(first: int) -> _Gaps:
        window = set(range(first, first + n))
        moves = list(zip(sorted(running - window), sorted(window - running), strict=True))
        return _Gaps(n_gaps, moves, sum(held[old] + held[new] for old, new in moves))

    return min(map(moves_into, range(len(held) - n + 1)), key=lambda gaps: gaps.n_moved)
