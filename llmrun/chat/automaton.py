"""Deterministic automata of regular expressions: whatever the expression, a text has one way.

llama.cpp follows every way through a grammar at once, in a call that nothing can stop. A regular
expression translated part by part (`(a?){500}`, `((a|b)*c?)*`) gives it more ways than it can
ever end with; an automaton gives it one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from llmrun.chat.regex_syntax import (
    ALL,
    Anchor,
    Chars,
    Choice,
    Node,
    PatternTooLargeError,
    Ranges,
    Repeat,
    union,
)

MAX_STATES = 4096
# Of sets that are looked through and nodes that are made: about a third of a second at most.
MAX_WORK = 250_000
_END = 0
_Set = frozenset[int]


@dataclass(frozen=True, slots=True)
class Automaton:
    """States by number, 0 is the first one. `steps[state]`: the characters that lead to each next
    state; no character leads to two. An accepting one is reachable from every state."""

    steps: tuple[Mapping[int, Ranges], ...]
    accepting: frozenset[int]


class Work:
    """What may still be spent on automata; to be shared by all of one schema."""

    def __init__(self) -> None:
        self._left = MAX_WORK

    def spend(self, amount: int) -> None:
        """Raises PatternTooLargeError when nothing is left."""
        self._left -= amount
        if self._left < 0:
            raise PatternTooLargeError("the patterns are too large, or repeat too much")


def automaton(
    all_of: Sequence[Node], none_of: Sequence[Node] = (), work: Work | None = None
) -> Automaton | None:
    """The automaton of the texts that match all of `all_of` and none of `none_of`; None when
    there are none.

    An expression matches a text that holds a match, as JSON Schema has it: `^` and `$` tie it to
    the ends. Raises PatternTooLargeError beyond MAX_STATES or MAX_WORK.
    """
    work = work or Work()
    parts = [_Nondeterministic(node, work) for node in (*all_of, *none_of)]
    n_all = len(all_of)
    # The first state has a number of its own: `^` holds there alone.
    numbers: dict[tuple[_Set, ...], int] = {}
    steps: list[dict[int, Ranges]] = []
    accepting = set()
    waiting = [tuple(part.start for part in parts)]
    for state in waiting:
        are_in = [
            part.accepts(each, is_first=not steps) for part, each in zip(parts, state, strict=True)
        ]
        if all(are_in[:n_all]) and not any(are_in[n_all:]):
            accepting.add(len(steps))
        found: dict[int, list[tuple[int, int]]] = {}
        for low, high, following in _moves(parts, state, work):
            if not all(following[:n_all]):
                continue
            number = numbers.setdefault(following, len(numbers) + 1)
            if number == len(waiting):
                waiting.append(following)
                if number >= MAX_STATES:
                    raise PatternTooLargeError(f"a pattern has more than {MAX_STATES} states")
            found.setdefault(number, []).append((low, high))
        steps.append({number: union(ranges) for number, ranges in found.items()})
    return _trimmed(steps, accepting)


def trie(texts: Iterable[str]) -> Automaton:
    """The automaton of these very texts, one at least."""
    steps: list[dict[str, int]] = [{}]
    accepting = set()
    for text in texts:
        at = 0
        for char in text:
            if char not in steps[at]:
                steps[at][char] = len(steps)
                steps.append({})
            at = steps[at][char]
        accepting.add(at)
    return Automaton(
        tuple({at: ((ord(char), ord(char)),) for char, at in each.items()} for each in steps),
        frozenset(accepting),
    )


class _Nondeterministic:
    """Thompson's automaton of one expression. A state of it is a set of nodes that wait for a
    character or for the end of the text; `_END` among them is a match, whatever follows."""

    def __init__(self, tree: Node, work: Work) -> None:
        self._work = work
        self.chars: dict[int, tuple[Ranges, int]] = {}
        self._empty: list[tuple[int, ...]] = [()]
        self._anchors: dict[int, tuple[bool, int]] = {}
        self._closures: dict[int, _Set] = {}
        self._followed: dict[_Set, _Set] = {}
        entry = self._add(tree, _END)
        # A match may begin later too, unless each is tied to the start.
        later = self._closure([entry], at_start=False)
        if later:
            loop = self._node()
            self.chars[loop] = ALL, loop
            self._empty[loop] = (entry,)
            entry = loop
        self.start = self._whole(self._closure([entry], at_start=True))

    def accepts(self, state: _Set, *, is_first: bool) -> bool:
        return _END in state or _END in self._closure(
            (node for node in state if node in self._anchors), at_start=is_first, at_end=True
        )

    def after(self, nodes: _Set) -> _Set:
        """The state when these nodes are the next ones."""
        found = self._followed.get(nodes)
        if found is None:
            parts = [self._closures.get(node) or self._keep(node) for node in nodes]
            self._work.spend(sum(map(len, parts)))
            found = self._followed[nodes] = self._whole(frozenset().union(*parts))
        return found

    def _keep(self, node: int) -> _Set:
        found = self._closures[node] = self._closure([node], at_start=False)
        return found

    def _whole(self, state: _Set) -> _Set:
        return frozenset({_END}) if _END in state else state

    def _closure(self, nodes: Iterable[int], *, at_start: bool, at_end: bool = False) -> _Set:
        """The nodes that wait for something, among these and those reached without a character."""
        waiting, seen, found = list(nodes), set[int](), set[int]()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            waiting += self._empty[node]
            if node in self._anchors:
                is_start, following = self._anchors[node]
                if at_start if is_start else at_end:
                    waiting.append(following)
                if not is_start:
                    found.add(node)
            elif node in self.chars or node == _END:
                found.add(node)
        self._work.spend(len(seen))
        return frozenset(found)

    def _node(self) -> int:
        self._work.spend(1)
        self._empty.append(())
        return len(self._empty) - 1

    def _add(self, tree: Node, following: int) -> int:
        """The node where the way through `tree` to the node `following` begins."""
        self._work.spend(1)
        if isinstance(tree, Chars):
            node = self._node()
            self.chars[node] = tree.ranges, following
            return node
        if isinstance(tree, Anchor):
            node = self._node()
            self._anchors[node] = tree.is_start, following
            return node
        if isinstance(tree, Choice):
            node = self._node()
            self._empty[node] = tuple(self._add(way, following) for way in tree.ways)
            return node
        if isinstance(tree, Repeat):
            return self._add_repeat(tree, following)
        for part in reversed(tree.parts):
            following = self._add(part, following)
        return following

    def _add_repeat(self, tree: Repeat, following: int) -> int:
        entry = following
        if tree.high is None:
            entry = self._node()
            self._empty[entry] = self._add(tree.part, entry), following
        else:
            # Each but the first within the one before: what is left out is left out at once.
            for _ in range(tree.high - tree.low):
                node = self._node()
                self._empty[node] = self._add(tree.part, entry), following
                entry = node
        for _ in range(tree.low):
            entry = self._add(tree.part, entry)
        return entry


def _moves(
    parts: Sequence[_Nondeterministic], state: tuple[_Set, ...], work: Work
) -> Iterable[tuple[int, int, tuple[_Set, ...]]]:
    """Ranges of characters, and the state that each of them leads to."""
    edges: dict[int, list[tuple[int, int, bool]]] = {}
    for i, (part, nodes) in enumerate(zip(parts, state, strict=True)):
        for node in nodes:
            if node == _END:
                ranges, following = ALL, _END
            elif node in part.chars:
                ranges, following = part.chars[node]
            else:
                continue
            for low, high in ranges:
                edges.setdefault(low, []).append((i, following, True))
                edges.setdefault(high + 1, []).append((i, following, False))
    # Several nodes may lead to the same one.
    counts: list[dict[int, int]] = [{} for _ in parts]
    for low, end in pairwise(sorted(edges)):
        for i, following, begins in edges[low]:
            count = counts[i].get(following, 0) + (1 if begins else -1)
            if count:
                counts[i][following] = count
            else:
                del counts[i][following]
        work.spend(sum(map(len, counts)) + 1)
        yield (
            low,
            end - 1,
            tuple(part.after(frozenset(each)) for part, each in zip(parts, counts, strict=True)),
        )


def _trimmed(steps: Sequence[Mapping[int, Ranges]], accepting: set[int]) -> Automaton | None:
    """Without the states from which no accepting one can be reached."""
    before: dict[int, list[int]] = {}
    for state, each in enumerate(steps):
        for following in each:
            before.setdefault(following, []).append(state)
    waiting, alive = list(accepting), set(accepting)
    while waiting:
        for state in before.get(waiting.pop(), ()):
            if state not in alive:
                alive.add(state)
                waiting.append(state)
    if 0 not in alive:
        return None
    numbers = {state: number for number, state in enumerate(sorted(alive))}
    return Automaton(
        tuple(
            {numbers[to]: ranges for to, ranges in steps[state].items() if to in alive}
            for state in sorted(alive)
        ),
        frozenset(numbers[state] for state in accepting),
    )
