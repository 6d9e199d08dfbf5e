"""Where a request starts: the longest usable prefix, never one whose window is gone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmrun.engine.prefix_cache import Checkpoint, PrefixCache, window_allows


def make(
    *held: list[int],
    n_swa: int = 0,
    can_cut: bool = True,
    pos_min: dict[int, int] | None = None,
    busy: tuple[int, ...] = (),
) -> PrefixCache:
    """Slots that hold these tokens; the first was used the longest ago."""
    cache = PrefixCache(
        len(held),
        n_swa=n_swa,
        can_cut=can_cut,
        pos_min=lambda seq_id: (pos_min or {}).get(seq_id, 0),
    )
    for slot, tokens in zip(cache.slots, held, strict=True):
        cache.tree.extend(slot.seq_id, tokens)
        slot.busy = slot.seq_id in busy
        slot.used_at = slot.seq_id + 1 if tokens else 0
    cache._clock = len(held)
    return cache


def count(n: int, start: int = 0) -> list[int]:
    return list(range(start, start + n))


tokens = st.lists(st.integers(0, 2), max_size=12)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(-1, 50), st.integers(1, 20))
def test_a_cut_never_leaves_a_window_with_a_hole(
    n_keep: int, n_held: int, pos_min: int, n_swa: int
) -> None:
    if n_keep < n_held and window_allows(n_keep, n_held, pos_min, n_swa):
        assert pos_min <= max(0, n_keep - n_swa)


@st.composite
def caches(draw: st.DrawFn) -> tuple[PrefixCache, int]:
    n_slots = draw(st.integers(1, 4))
    n_swa = draw(st.sampled_from([0, 1, 3]))
    held = [draw(tokens) for _ in range(n_slots)]
    pos_min = {i: draw(st.integers(0, max(0, len(h) - 1))) for i, h in enumerate(held)}
    busy = tuple(draw(st.sets(st.integers(0, n_slots - 1))))
    can_cut = draw(st.booleans())
    cache = make(*held, n_swa=n_swa, can_cut=can_cut, pos_min=pos_min, busy=busy)
    return cache, n_swa


@given(caches(), tokens.filter(bool))
def test_every_placement_is_sound(made: tuple[PrefixCache, int], prompt: list[int]) -> None:
    cache, n_swa = made
    busy = {slot.seq_id for slot in cache.slots if slot.busy}
    held = {slot.seq_id: cache.tree.tokens(slot.seq_id) for slot in cache.slots}
    placement = cache.place(prompt)
    if placement is None:
        assert len(busy) == len(cache.slots)
        return
    assert placement.slot.seq_id not in busy
    assert placement.slot.busy
    source = placement.copy_from or placement.slot
    assert source is not placement.slot or placement.copy_from is None
    n_keep, n_held = placement.n_keep, len(held[source.seq_id])
    assert 0 <= n_keep < len(prompt)
    assert held[source.seq_id][:n_keep] == prompt[:n_keep]
    if 0 < n_keep < n_held:
        assert cache._can_cut
        if n_swa:
            assert cache._pos_min(source.seq_id) <= max(0, n_keep - n_swa)


def test_a_conversation_goes_on_in_its_own_slot() -> None:
    cache = make([9, 9], count(10), count(4))
    placement = cache.place(count(14))
    assert placement is not None
    assert (placement.slot.seq_id, placement.n_keep, placement.copy_from) == (1, 10, None)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    placement = make(count(10)).place(count(10))
    assert placement is not None and placement.n_keep == 9


def test_the_prefix_of_a_running_request_is_shared() -> None:
    cache = make(count(10), [], busy=(0,))
    placement = cache.place([*count(8), 99])
    assert placement is not None and placement.copy_from is cache.slots[0]
    assert (placement.slot.seq_id, placement.n_keep) == (1, 8)


def test_an_idle_slot_with_as_long_a_prefix_is_taken_over_before_one_is_copied() -> None:
    placement = make(count(10), count(8), busy=(0,)).place([*count(8), 99])
    assert placement is not None
    assert (placement.slot.seq_id, placement.n_keep, placement.copy_from) == (1, 8, None)


def test_another_conversation_stays_whole_while_a_slot_is_empty() -> None:
    cache = make(count(100), [])
    placement = cache.place([*count(20), 999])
    assert placement is not None and placement.copy_from is cache.slots[0]
    assert (placement.slot.seq_id, placement.n_keep) == (1, 20)
    assert cache.tree.tokens(0) == count(100)


def test_a_turn_taken_back_keeps_its_slot() -> None:
    placement = make(count(100), []).place([*count(60), 999])
    assert placement is not None and (placement.slot.seq_id, placement.n_keep) == (0, 60)


def test_without_a_common_prefix_the_oldest_goes_and_empty_ones_first() -> None:
    placement = make([1], [], [3]).place([7, 8])
    assert placement is not None and (placement.slot.seq_id, placement.n_keep) == (1, 0)
    cache = make([1], [2], [3])
    cache.slots[0].used_at = 9
    placement = cache.place([7, 8])
    assert placement is not None and (placement.slot.seq_id, placement.n_keep) == (1, 0)


def test_a_window_that_moved_on_is_not_reused() -> None:
    # The figures of Gemma 3: 1700 tokens read, window 512, 676 is the first position left.
    held, pos_min = count(1700), {0: 676}
    kept = make(held, n_swa=512, pos_min=pos_min).place(count(1301))
    assert kept is not None and kept.n_keep == 1300
    refused = make(held, n_swa=512, pos_min=pos_min).place(count(701))
    assert refused is not None and refused.n_keep == 0


def test_a_recurrent_state_is_used_whole_or_not_at_all() -> None:
    whole = make(count(10), can_cut=False).place(count(14))
    assert whole is not None and whole.n_keep == 10
    cut = make(count(10), [], can_cut=False).place([*count(9), 99])
    assert cut is not None and (cut.slot.seq_id, cut.n_keep) == (1, 0)
    part = make(count(10), [], can_cut=False, busy=(0,)).place([*count(9), 99])
    assert part is not None and (part.n_keep, part.copy_from) == (0, None)
    cache = make(count(10), [], can_cut=False, busy=(0,))
    shared = cache.place(count(14))
    assert shared is not None
    assert (shared.slot.seq_id, shared.n_keep, shared.copy_from) == (1, 10, cache.slots[0])


def test_eviction_takes_the_idle_slot_unused_for_longest() -> None:
    cache = make([1], [2], [3], [], busy=(0,))
    evicted = [cache.evict_idle() for _ in range(3)]
    assert [slot.seq_id if slot else None for slot in evicted] == [1, 2, None]
    assert cache.tree.tokens(0) == [1]


def test_all_busy_is_none() -> None:
    assert make([1], busy=(0,)).place([1, 2]) is None


# ---- room


def test_without_room_a_request_waits() -> None:
    cache = make(count(10), [], busy=(0,))
    assert cache.n_busy_cells() == 10
    assert cache.place(count(6, 50), 5) is None
    assert not cache.slots[1].busy
    assert cache.place(count(6, 50), 6) is not None


def test_cells_shared_with_a_running_request_need_no_room() -> None:
    cache = make(count(100), [], busy=(0,))
    placement = cache.place([*count(100), 7, 8], 2)
    assert placement is not None and placement.n_keep == 100
    assert cache.tree.n_cells() == 100


# ---- checkpoints


def test_a_checkpoint_takes_back_what_the_window_forgot() -> None:
    cache = make(count(1700), n_swa=512, pos_min={0: 676})
    early, late = Checkpoint(400, b"early"), Checkpoint(700, b"late")
    cache.keep(cache.slots[0], early)
    cache.keep(cache.slots[0], late)
    placement = cache.place([*count(800), 9999])
    assert placement is not None
    assert (placement.n_keep, placement.restore) == (700, late)
    assert cache.slots[0].checkpoints == [early, late]
    cache.release(cache.slots[0])
    placement = cache.place([*count(500), 9999])
    assert placement is not None
    assert (placement.n_keep, placement.restore) == (400, early)
    assert cache.slots[0].checkpoints == [early]


def test_a_recurrent_state_goes_back_to_a_checkpoint_or_nowhere() -> None:
    cache = make(count(100), can_cut=False)
    kept = Checkpoint(60, b"state")
    cache.keep(cache.slots[0], kept)
    placement = cache.place([*count(80), 9999])
    assert placement is not None and (placement.n_keep, placement.restore) == (60, kept)
    cache.release(cache.slots[0])
    placement = cache.place([*count(50), 9999])
    assert placement is not None and (placement.n_keep, placement.restore) == (0, None)
    assert cache.slots[0].checkpoints == []


def test_a_checkpoint_of_a_running_request_is_not_put_back() -> None:
    cache = make(count(100), [], can_cut=False, busy=(0,))
    cache.keep(cache.slots[0], Checkpoint(60, b"state"))
    placement = cache.place([*count(80), 9999])
    assert placement is not None and (placement.n_keep, placement.restore) == (0, None)


def test_old_checkpoints_make_room() -> None:
    cache = PrefixCache(2, n_swa=4, can_cut=True, pos_min=lambda _seq_id: 0, checkpoint_bytes=100)
    first, second = cache.slots
    for slot, n_tokens in ((first, 10), (second, 10), (first, 20)):
        cache.keep(slot, Checkpoint(n_tokens, b"x" * 40))
    assert [c.n_tokens for c in first.checkpoints] == [20]
    assert [c.n_tokens for c in second.checkpoints] == [10]
    cache.keep(second, Checkpoint(30, b"x" * 400))
    assert first.checkpoints == second.checkpoints == []


def test_of_two_that_start_alike_the_shorter_is_copied() -> None:
    cache = PrefixCache(4, n_swa=0, can_cut=True, pos_min=lambda _seq_id: 0, shares_cells=False)
    cache.put(cache.slots[0], count(100))
    cache.put(cache.slots[1], [*count(3), *range(200, 210)])
    placement = cache.place([*count(3), 300])
    assert placement is not None and placement.copy_from is cache.slots[1]
    assert placement.n_keep == 3 and cache.tree.length(0) == 100
