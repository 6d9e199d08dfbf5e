"""Which cached tokens a new request can start from. Pure: it decides, the engine's loop acts.

A slot is one sequence id of the cache with the tokens it holds. A finished request leaves its
tokens in its slot; the next one that starts alike takes the slot over and computes only the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Slot:
    """One sequence id. `tokens` are in the cache; `used_at` counts requests, not seconds."""

    seq_id: int
    tokens: list[int] = field(default_factory=list)
    busy: bool = False
    used_at: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Put the request into `slot`; its first `n_keep` tokens are there, what follows must go.

    `copy_from` names another slot whose first `n_keep` cells are to be shared first.
    """

    slot: Slot
    n_keep: int
    copy_from: Slot | None = None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are equal. Compares slices first: equal ones are the common case."""
    n = min(len(a), len(b))
    low = 0
    step = 256
    while low < n and a[low : low + step] == b[low : low + step]:
        low += step
    low = min(low, n)
    while low < n and a[low] == b[low]:
        low += 1
    return low


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
    ) -> None:
        """`can_cut` False: a sequence is used whole or not at all (recurrent state).

        `pos_min(seq_id)` reads the first position a sequence still has in every layer.
        """
        self.slots = [Slot(seq_id) for seq_id in range(n_slots)]
        self._n_swa = n_swa
        self._can_cut = can_cut
        self._pos_min = pos_min
        self._clock = 0

    def place(self, prompt: Sequence[int]) -> Placement | None:
        """A free slot for `prompt`, or None when all are busy.

        At least the prompt's last token is always computed: its logits choose the next one. The
        longest usable prefix wins; without any, an empty slot, then the one unused for longest.
        """
        free = [slot for slot in self.slots if not slot.busy]
        if not free:
            return None
        most = len(prompt) - 1
        keep = {slot.seq_id: self._usable(slot, prompt, most) for slot in self.slots}

        def order(slot: Slot) -> tuple[int, bool, int]:
            return keep[slot.seq_id], not slot.busy, -slot.used_at

        best, own = max(self.slots, key=order), max(free, key=order)
        n_best, n_own = keep[best.seq_id], keep[own.seq_id]

        def emptiest(slot: Slot) -> tuple[bool, int]:
            return bool(slot.tokens), slot.used_at

        spare = min((slot for slot in free if slot is not best), key=emptiest, default=None)
        if spare is not None:
            # Another conversation that only starts alike (one system prompt for all) stays whole
            # as long as there is an empty slot for this one.
            is_other = 0 < n_own < len(own.tokens) // 2 and not spare.tokens
            if n_best > n_own or is_other:
                return self._claim(Placement(spare, n_best, copy_from=best))
        if n_own == 0:
            own = min(free, key=emptiest)
        return self._claim(Placement(own, n_own))

    def release(self, slot: Slot, tokens: Sequence[int]) -> None:
        """The slot's request is over and `tokens` are in the cache under its id."""
        slot.tokens = list(tokens)
        slot.busy = False

    def evict_idle(self) -> Slot | None:
        """Give up the idle slot unused for longest; the caller clears its cells."""
        idle = [slot for slot in self.slots if not slot.busy and slot.tokens]
        if not idle:
            return None
        slot = min(idle, key=lambda candidate: candidate.used_at)
        slot.tokens = []
        return slot

    def _claim(self, placement: Placement) -> Placement:
        self._clock += 1
        placement.slot.busy = True
        placement.slot.used_at = self._clock
        return placement

    def _usable(self, slot: Slot, prompt: Sequence[int], most: int) -> int:
        n_held = len(slot.tokens)
        n_keep = min(common_prefix(slot.tokens, prompt), most)
        if n_keep <= 0 or (not self._can_cut and (slot.busy or n_keep < n_held)):
            return 0
        if slot.busy:
            # It has more tokens than these by now, and its window may have moved on.
            n_held = -1
        return (
            n_keep if window_allows(n_keep, n_held, self._pos_min(slot.seq_id), self._n_swa) else 0
        )
