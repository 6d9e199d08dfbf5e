"""Which tokens the cache holds for whom, as a tree of runs of cells. Pure.

A node is a run of cells at consecutive positions, held by the same sequences. A sequence is a path
from the root; two that share cells share nodes. Sequences that read the same tokens each for
itself have nodes of their own, side by side: the tree is what is in the cache, so the lengths of
its nodes add up to the cells in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

V = TypeVar("V")


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


class _Node:
    __slots__ = ("children", "owners", "parent", "tokens")

    def __init__(self, tokens: list[int], parent: _Node | None, owners: set[int]) -> None:
        self.tokens = tokens
        self.parent = parent
        self.owners = owners
        self.children: dict[int, list[_Node]] = {}

    def attach(self, child: _Node) -> None:
        child.parent = self
        self.children.setdefault(child.tokens[0], []).append(child)

    def detach(self) -> None:
        assert self.parent is not None
        siblings = self.parent.children[self.tokens[0]]
        siblings.remove(self)
        if not siblings:
            del self.parent.children[self.tokens[0]]

    def split(self, n: int) -> _Node:
        """Keep the first `n` tokens (0 < n < all); the rest becomes the only child."""
        rest = _Node(self.tokens[n:], self, set(self.owners))
        rest.children = self.children
        for siblings in rest.children.values():
            for child in siblings:
                child.parent = rest
        self.tokens = self.tokens[:n]
        self.children = {}
        self.attach(rest)
        return rest


def _exchange(table: dict[int, V], a: int, b: int) -> None:
    found = {b: table.pop(a)} if a in table else {}
    if b in table:
        found[a] = table.pop(b)
    table.update(found)


class RadixTree:
    """The tokens of resident sequences, by sequence id."""

    def __init__(self) -> None:
        self._root = _Node([], None, set())
        self._ends: dict[int, _Node] = {}
        self._lengths: dict[int, int] = {}
        self._n_cells = 0

    def length(self, seq_id: int) -> int:
        return self._lengths.get(seq_id, 0)

    def tokens(self, seq_id: int) -> list[int]:
        parts = [node.tokens for node in self._path(seq_id)]
        return [token for part in reversed(parts) for token in part]

    def n_cells(self, counts: Callable[[int], bool] | None = None) -> int:
        """Cells in use, which costs nothing to ask; with `counts`, those of which an owner
        counts."""
        if counts is None:
            return self._n_cells
        return sum(
            len(node.tokens)
            for node in self._nodes()
            if any(counts(owner) for owner in node.owners)
        )

    def match(self, tokens: Sequence[int]) -> dict[int, int]:
        """How many leading tokens each sequence has in common with `tokens`; those with none are
        left out."""
        found: dict[int, int] = {}
        open_nodes = [(self._root, 0)]
        while open_nodes:
            node, n = open_nodes.pop()
            for child in node.children.get(tokens[n], ()) if n < len(tokens) else ():
                n_same = common_prefix(child.tokens, tokens[n : n + len(child.tokens)])
                for owner in child.owners:
                    found[owner] = n + n_same
                if n_same == len(child.tokens):
                    open_nodes.append((child, n + n_same))
        return found

    def extend(self, seq_id: int, tokens: Sequence[int]) -> None:
        """The sequence has read `tokens` more, into cells of its own."""
        if not tokens:
            return
        end = self._ends.get(seq_id, self._root)
        self._lengths[seq_id] = self.length(seq_id) + len(tokens)
        self._n_cells += len(tokens)
        if end is not self._root and end.owners == {seq_id} and not end.children:
            end.tokens += tokens
            return
        node = _Node(list(tokens), end, {seq_id})
        end.attach(node)
        self._ends[seq_id] = node

    def share(self, source: int, seq_id: int, n: int) -> None:
        """`seq_id`, which is empty, now holds the first `n` cells of `source` too."""
        assert seq_id not in self._ends and 0 <= n <= self.length(source)
        if n == 0:
            return
        node = self._split_at(source, n)
        self._ends[seq_id], self._lengths[seq_id] = node, n
        while node is not self._root:
            node.owners.add(seq_id)
            assert node.parent is not None
            node = node.parent

    def swap(self, a: int, b: int) -> None:
        """What one sequence held, the other holds now."""
        for node in set(self._path(a)) ^ set(self._path(b)):
            node.owners ^= {a, b}
        _exchange(self._ends, a, b)
        _exchange(self._lengths, a, b)

    def cut(self, seq_id: int, n: int) -> None:
        """The sequence keeps its first `n` cells at most."""
        if n >= self.length(seq_id):
            return
        keep = self._split_at(seq_id, n) if n > 0 else self._root
        for node in list(self._path(seq_id)):
            if node is keep:
                break
            node.owners.discard(seq_id)
            if not node.owners:
                node.detach()
                self._n_cells -= len(node.tokens)
        if n > 0:
            self._ends[seq_id], self._lengths[seq_id] = keep, n
        else:
            del self._ends[seq_id], self._lengths[seq_id]

    def _split_at(self, seq_id: int, n: int) -> _Node:
        """The node of the sequence that ends with its `n`-th token."""
        start = self.length(seq_id)
        for node in self._path(seq_id):
            start -= len(node.tokens)
            if start < n:
                if n - start < len(node.tokens):
                    rest = node.split(n - start)
                    for owner, end in self._ends.items():
                        if end is node and self._lengths[owner] > n:
                            self._ends[owner] = rest
                return node
        raise AssertionError

    def _path(self, seq_id: int) -> Iterator[_Node]:
        """From the sequence's last node up to the root, without it."""
        node = self._ends.get(seq_id, self._root)
        while node is not self._root:
            yield node
            assert node.parent is not None
            node = node.parent

    def _nodes(self) -> Iterator[_Node]:
        open_nodes = [self._root]
        while open_nodes:
            node = open_nodes.pop()
            for siblings in node.children.values():
                yield from siblings
                open_nodes += siblings
