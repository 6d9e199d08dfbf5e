"""A conversation that only starts like another one does not take the other's place in the cache
while an older place is free."""

from __future__ import annotations

from llmrun.engine.prefix_cache import PrefixCache

TEMPLATE = [1, 2, 3]
"""What every prompt of a chat template begins with."""


def conversation(number: int, n: int = 40) -> list[int]:
    return [*TEMPLATE, *range(number * 100, number * 100 + n)]


def run(cache: PrefixCache, prompt: list[int]) -> int:
    """One request from its start to its end; how many of its tokens were cached."""
    placement = cache.place(prompt)
    assert placement is not None
    cache.grow(placement.slot, prompt, len(prompt))
    cache.release(placement.slot)
    return placement.n_keep


def make(n_slots: int) -> PrefixCache:
    return PrefixCache(n_slots, n_swa=0, can_cut=True, pos_min=lambda _seq_id: 0)


def test_conversations_that_take_turns_keep_their_places() -> None:
    cache = make(4)
    for other in range(6, 10):  # other prompts, without the template, fill all slots
        run(cache, list(range(other * 1000, other * 1000 + 20)))
    first, second = conversation(1), conversation(2)
    assert (run(cache, first), run(cache, second)) == (0, 3)
    for _ in range(3):
        assert run(cache, first) == len(first) - 1
        assert run(cache, second) == len(second) - 1


def test_of_many_conversations_the_one_unused_for_longest_goes() -> None:
    cache = make(3)
    for number in (1, 2, 3, 4):
        run(cache, conversation(number))
    assert run(cache, conversation(3)) == 42
    assert run(cache, conversation(2)) == 42
    assert run(cache, conversation(1)) == 3


def test_a_conversation_that_is_itself_the_oldest_gives_way() -> None:
    cache = make(2)
    run(cache, conversation(1))
    run(cache, [7] * 20)
    placement = cache.place(conversation(2))
    assert placement is not None
    assert (placement.slot.seq_id, placement.n_keep, placement.copy_from) == (0, 3, None)
