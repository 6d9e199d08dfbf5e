"""Which cached tokens a new request can start from. Pure: it decides, the engine's loop acts.

A slot is one sequence id of the cache. A finished request leaves its tokens in its slot; the next
one that starts alike takes the slot over and computes only the rest, or shares the cells with a
slot that is in use. Where a model forgets (sliding windows, recurrent states), a checkpoint of the
forgotten part, taken where a prompt ended, takes the sequence back to there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llmrun.engine.radix import RadixTree
from llmrun.engine.types import CHECKPOINT_BYTES, StateBytes

# A token is read in the time that it takes to copy so many, or more.
_COPIED_PER_READ = 64


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What `seq_rm` cannot bring back, as it was after the first `n_tokens` of a sequence."""

    n_tokens: int
    state: StateBytes


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence id; its tokens are in the cache's tree. `used_at` counts requests, not seconds.

    `checkpoints` are of its tokens, in their order.
    """

    seq_id: int
    busy: bool = False
    used_at: int = 0
    checkpoints: list[Checkpoint] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Placement:
    """Put the request into `slot`; its first `n_keep` tokens are there, what follows must go.

    `copy_from` names another slot whose first `n_keep` tokens the slot, which is empty by then,
    gets first. `restore` is to be put back once what follows is gone.
    """

    slot: Slot
    n_keep: int
    copy_from: Slot | None = None
    restore: Checkpoint | None = None


def window_allows(n_keep: int, n_held: int, pos_min: int, n_swa: int) -> bool:
    """Whether a sequence of `n_held` tokens can be cut back to `n_keep` and decoded on.

    Sliding-window layers forget old cells. What follows position n_keep attends to the `n_swa`
    tokens before it, so these must still be there. llama.cpp's own removal does not check this.
    """
    return n_keep == n_held or n_swa == 0 or pos_min <= max(0, n_keep - n_swa)


class PrefixCache:
    """Chooses slots for requests and remembers what each holds."""

    def __init__(
        self,
        n_slots: int,
        *,
        n_swa: int,
        can_cut: bool,
        pos_min: Callable[[int], int],
        shares_cells: bool = True,
        checkpoint_bytes: int = CHECKPOINT_BYTES,
    ) -> None:
        """`can_cut` False: a sequence is used whole or not at all (recurrent state).

        `pos_min(seq_id)` reads the first position a sequence still has in every layer.
        `shares_cells` False: each slot has cells of its own, and a prefix is copied, without what
        a window has moved on from.
        `checkpoint_bytes`: what all checkpoints together may take of the memory.
        """
        self.slots = [Slot(seq_id) for seq_id in range(n_slots)]
        self.tree = RadixTree()
        self._n_swa = n_swa
        self._can_cut = can_cut
        self._pos_min = pos_min
        self._shares_cells = shares_cells
        self._clock = 0
        self._checkpoint_bytes = checkpoint_bytes
        self._checkpoints: list[tuple[Slot, Checkpoint]] = []  # the oldest first

    def n_usable(self, prompt: Sequence[int]) -> int:
        """Tokens of `prompt` that need not be computed if it were placed now."""
        common, most = self.tree.match(prompt), len(prompt) - 1
        own = (self._own(slot, common, most)[0] for slot in self.slots if not slot.busy)
        return max(*own, *(self._shared(slot, common, most)[0] for slot in self.slots), 0)

    def n_busy_cells(self) -> int:
        """Cells that running requests hold; all others can be had."""
        return self.tree.n_cells(lambda seq_id: self.slots[seq_id].busy)

    def place(self, prompt: Sequence[int], n_room: int | None = None) -> Placement | None:
        """A free slot for `prompt`, or None when all are busy or it needs more than `n_room` cells
        that no running request holds.

        At least the prompt's last token is always computed: its logits choose the next one. The
        longest usable prefix wins; without any, an empty slot, then the one unused for longest.
        """
        placement = self._choose(prompt)
        if placement is None:
            return None
        slot, n_keep, source = placement.slot, placement.n_keep, placement.copy_from
        n_shared = n_keep if source is not None and source.busy and self._shares_cells else 0
        if n_room is not None and len(prompt) - n_shared > n_room:
            return None
        if source is not None:
            self.cut(slot, 0)
            if self._shares_cells:
                self.tree.share(source.seq_id, slot.seq_id, n_keep)
            else:
                self.tree.extend(slot.seq_id, prompt[:n_keep])
            for checkpoint in source.checkpoints:
                if checkpoint.n_tokens <= n_keep:
                    self.keep(slot, checkpoint)
        else:
            self.cut(slot, n_keep)
        self._clock += 1
        slot.busy = True
        slot.used_at = self._clock
        return placement

    def grow(self, slot: Slot, tokens: Sequence[int], n_past: int) -> None:
        """The first `n_past` of `tokens` are in the cache under the slot's id."""
        self.tree.extend(slot.seq_id, tokens[self.tree.length(slot.seq_id) : n_past])

    def cut(self, slot: Slot, n_keep: int) -> None:
        """What the slot holds beyond `n_keep` tokens is gone."""
        self.tree.cut(slot.seq_id, n_keep)
        if slot.checkpoints and slot.checkpoints[-1].n_tokens > n_keep:
            slot.checkpoints = [c for c in slot.checkpoints if c.n_tokens <= n_keep]
            self._checkpoints = [(s, c) for s, c in self._checkpoints if c in s.checkpoints]

    def release(self, slot: Slot) -> None:
        """The slot's request is over; its tokens stay."""
        slot.busy = False

    def exchange(self, a: Slot, b: Slot) -> None:
        """The two change places: each takes what it holds to the other's sequence id."""
        self.tree.swap(a.seq_id, b.seq_id)
        a.seq_id, b.seq_id = b.seq_id, a.seq_id
        self.slots[a.seq_id], self.slots[b.seq_id] = a, b

    def most_alike(self, tokens: Sequence[int]) -> tuple[Slot, int] | None:
        """The slot that has the longest common prefix with `tokens`, and its length."""
        common = self.tree.match(tokens)
        if not common:
            return None
        seq_id = max(common, key=lambda held_by: common[held_by])
        return self.slots[seq_id], common[seq_id]

    def find_idle(self) -> Slot | None:
        """An idle slot, an empty one or else the one unused for longest; None when all are busy."""
        idle = [slot for slot in self.slots if not slot.busy]
        return min(idle, key=self._emptiest, default=None)

    def put(self, slot: Slot, tokens: Sequence[int]) -> None:
        """An idle slot, which was empty, holds `tokens` now."""
        self._clock += 1
        slot.used_at = self._clock
        self.tree.extend(slot.seq_id, tokens)

    def evict_idle(self, spare: Slot | None = None) -> Slot | None:
        """Give up the idle slot unused for longest, but not `spare`. The caller clears its
        cells."""
        idle = [
            slot
            for slot in self.slots
            if not slot.busy and slot is not spare and self.tree.length(slot.seq_id)
        ]
        if not idle:
            return None
        slot = min(idle, key=lambda candidate: candidate.used_at)
        self.cut(slot, 0)
        return slot

    def keep(self, slot: Slot, checkpoint: Checkpoint) -> None:
        """Remember a checkpoint of the slot's first tokens, beyond those it has; old ones make
        room. Slots that share cells share checkpoints."""
        slot.checkpoints.append(checkpoint)
        self._checkpoints.append((slot, checkpoint))
        while self._n_checkpoint_bytes() > self._checkpoint_bytes:
            owner, oldest = self._checkpoints.pop(0)
            owner.checkpoints.remove(oldest)

    def _n_checkpoint_bytes(self) -> int:
        return sum({id(kept): len(kept.state) for _, kept in self._checkpoints}.values())

    def _emptiest(self, slot: Slot) -> tuple[bool, int, int]:
        is_held = self.tree.length(slot.seq_id) > 0
        n_away = 0
        if not self._shares_cells and not is_held:
            # Those that run should be neighbours (`Residents.close_gaps`).
            busy = [other.seq_id for other in self.slots if other.busy]
            n_away = min((abs(slot.seq_id - seq_id) for seq_id in busy), default=0)
        return is_held, slot.used_at if is_held else 0, n_away

    def _choose(self, prompt: Sequence[int]) -> Placement | None:
        free = [slot for slot in self.slots if not slot.busy]
        if not free:
            return None
        common, most = self.tree.match(prompt), len(prompt) - 1
        owns = {slot.seq_id: self._own(slot, common, most) for slot in free}
        shares = {slot.seq_id: self._shared(slot, common, most) for slot in self.slots}

        def n_own(slot: Slot) -> int:
            return owns[slot.seq_id][0]

        def n_shared(slot: Slot) -> int:
            return shares[slot.seq_id][0]

        def n_held(slot: Slot) -> int:
            return self.tree.length(slot.seq_id)

        own = max(free, key=lambda slot: (n_own(slot), -slot.used_at))
        # To copy takes time for all that the other holds.
        weight = 0 if self._shares_cells else -1
        best = max(
            self.slots,
            key=lambda slot: (
                n_shared(slot), weight * n_held(slot), not slot.busy, -slot.used_at
            ),
        )  # fmt: skip
        spare = min((slot for slot in free if slot is not best), key=self._emptiest, default=None)
        if spare is not None:
            # Another conversation that only starts alike (one system prompt for all, or the few
            # tokens that a template begins with) stays whole as long as there is an empty slot
            # for this one, or one that nobody has used for longer.
            is_other = 0 < n_own(own) < n_held(own) // 2
            # Those few may be too few to be copied.
            is_kept = n_shared(best) >= n_own(own) or not self._pays(n_own(own), n_held(own))
            is_better = n_held(spare) == 0 or spare.used_at < own.used_at
            if n_shared(best) > n_own(own) or (is_other and is_better and is_kept):
                if n_shared(best) == 0:
                    return Placement(spare, 0)
                return Placement(spare, n_shared(best), best, shares[best.seq_id][1])
        if n_own(own) == 0:
            return Placement(min(free, key=self._emptiest), 0)
        return Placement(own, n_own(own), restore=owns[own.seq_id][1])

    def _own(self, slot: Slot, common: dict[int, int], most: int) -> tuple[int, Checkpoint | None]:
        """Tokens that can stay in the slot, and the checkpoint that this takes."""
        n_held = self.tree.length(slot.seq_id)
        n_keep = min(common.get(slot.seq_id, 0), most)
        if n_keep <= 0:
            return 0, None
        is_allowed = n_keep == n_held
        if self._can_cut and not is_allowed:
            is_allowed = window_allows(n_keep, n_held, self._pos_min(slot.seq_id), self._n_swa)
        return (n_keep, None) if is_allowed else _last_checkpoint(slot, n_keep)

    def _pays(self, n_keep: int, n_held: int) -> bool:
        """Whether another slot should have the first `n_keep` tokens of one that holds `n_held`,
        rather than read them: a copy takes time for all."""
        return self._shares_cells or n_keep * _COPIED_PER_READ >= n_held

    def _shared(
        self, slot: Slot, common: dict[int, int], most: int
    ) -> tuple[int, Checkpoint | None]:
        """The same of tokens that another slot can have of this one, whether it is busy or not."""
        n_held = self.tree.length(slot.seq_id)
        n_keep = min(common.get(slot.seq_id, 0), most)
        if not self._pays(n_keep, n_held):
            return 0, None
        if n_keep <= 0 or n_keep == n_held:
            return max(n_keep, 0), None
        if not self._can_cut:
            return 0, None
        pos_min = self._pos_min(slot.seq_id)
        if not self._shares_cells and self._n_swa:
            pos_min = max(pos_min, n_held - self._n_swa)
        if window_allows(n_keep, n_held, pos_min, self._n_swa):
            return n_keep, None
        return _last_checkpoint(slot, n_keep)


def _last_checkpoint(slot: Slot, n_most: int) -> tuple[int, Checkpoint | None]:
    for checkpoint in reversed(slot.checkpoints):
        if checkpoint.n_tokens <= n_most:
            return checkpoint.n_tokens, checkpoint
    return 0, None
