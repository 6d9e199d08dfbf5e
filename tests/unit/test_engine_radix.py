"""The tree of resident sequences against the plain idea: a list of cells for each sequence."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.engine.radix import RadixTree, common_prefix

N_SEQ = 4
tokens = st.lists(st.integers(0, 2), max_size=8)


@given(tokens, tokens)
def test_common_prefix_is_the_definition(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


@given(st.integers(0, 1200), st.integers(0, 1200))
def test_common_prefix_of_long_lists(n_same: int, n_rest: int) -> None:
    assert common_prefix([1] * n_same + [2] * n_rest, [1] * n_same + [3] * n_rest) == n_same


class PlainCells:
    """Each sequence is a list of cells; a cell is a number and its token."""

    def __init__(self) -> None:
        self.held: dict[int, list[tuple[int, int]]] = {s: [] for s in range(N_SEQ)}
        self._n_made = 0

    def extend(self, seq_id: int, more: Sequence[int]) -> None:
        for token in more:
            self._n_made += 1
            self.held[seq_id].append((self._n_made, token))

    def tokens(self, seq_id: int) -> list[int]:
        return [token for _, token in self.held[seq_id]]

    def n_cells(self, seq_ids: set[int]) -> int:
        return len({cell for seq_id in seq_ids for cell, _ in self.held[seq_id]})


ids = st.integers(0, N_SEQ - 1)
acts = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), ids, tokens),
        st.tuples(st.just("cut"), ids, st.integers(0, 12)),
        st.tuples(st.just("swap"), ids, ids),
        st.tuples(st.just("share"), ids, st.tuples(ids, st.integers(0, 12))),
    ),
    max_size=30,
)


@settings(max_examples=400, deadline=None)
@given(acts, tokens, st.sets(ids))
def test_the_tree_is_the_cells(
    script: list[tuple[str, int, object]], prompt: list[int], some: set[int]
) -> None:
    tree, plain = RadixTree(), PlainCells()
    for act, seq_id, what in script:
        if act == "extend":
            tree.extend(seq_id, what)  # type: ignore[arg-type]
            plain.extend(seq_id, what)  # type: ignore[arg-type]
        elif act == "cut":
            tree.cut(seq_id, what)  # type: ignore[arg-type]
            del plain.held[seq_id][what:]  # type: ignore[misc]
        elif act == "swap":
            tree.swap(seq_id, what)  # type: ignore[arg-type]
            held = plain.held
            held[seq_id], held[what] = held[what], held[seq_id]  # type: ignore[index]
        else:
            target, n = what  # type: ignore[misc]
            if target != seq_id:
                tree.cut(target, 0)
                n = min(n, tree.length(seq_id))
                tree.share(seq_id, target, n)
                plain.held[target] = plain.held[seq_id][:n]
        for s in range(N_SEQ):
            assert tree.tokens(s) == plain.tokens(s)
            assert tree.length(s) == len(plain.tokens(s))
        assert tree.n_cells() == plain.n_cells(set(range(N_SEQ)))
        assert tree.n_cells(some.__contains__) == plain.n_cells(some)
    found = tree.match(prompt)
    for s in range(N_SEQ):
        assert found.get(s, 0) == common_prefix(plain.tokens(s), prompt)


def test_a_shared_prefix_is_counted_once() -> None:
    tree = RadixTree()
    tree.extend(0, range(600))
    for s in range(1, 8):
        tree.share(0, s, 600)
        tree.extend(s, [1000 + s] * 10)
    assert tree.n_cells() == 600 + 7 * 10
    tree.cut(0, 0)
    assert tree.n_cells() == 600 + 7 * 10
    assert tree.n_cells(lambda s: s == 3) == 610


def test_a_match_ends_where_sequences_part() -> None:
    tree = RadixTree()
    tree.extend(0, [1, 2, 3, 4])
    tree.extend(1, [1, 2, 9])
    assert tree.match([1, 2, 3, 7]) == {0: 3, 1: 2}
    assert tree.match([1, 2]) == {0: 2, 1: 2}
    assert tree.match([5]) == {} == tree.match([])
