"""Whether llama.cpp can follow a grammar: how many ways it may have to follow at once.

llama.cpp keeps a stack of places for each way in which what is written so far can be a sentence's
beginning (`llama_grammar_advance_stack`). Ways that differ within one another multiply: after n
brackets of `a ::= "[" a "]" | "[" a "]" | "0"` there are 2^n stacks. All that is one call of C,
which nothing can stop, so that such a grammar has to be found out before it is used.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import pairwise

from llmrun.engine.gbnf import Grammar, UnreadableGrammarError, UnusableGrammarError, read_gbnf

# As many take llama.cpp some tenths of a second for a token chosen from a large vocabulary.
MAX_STACKS = 512
# A stack looked at is about two microseconds of ours.
MAX_WORK = 400_000
# Of llama.cpp's search for left recursion, which takes every way to the first symbol.
_MAX_FIRST_WAYS = 1_000_000
_MAX_DEPTH = 100
# So many ways on are worth a look for a part that has them too.
_MANY = 16

_Stack = tuple[int, ...]
"""Places from the bottom up: the top one is what comes next."""
_Stacks = frozenset[_Stack]


def check_grammar(text: str, *, max_copies: int | None = None) -> None:
    """Raises UnusableGrammarError for a grammar under which llama.cpp may have to follow more than
    MAX_STACKS ways at once, whatever is written, or where that cannot be found out in reasonable
    time. Says nothing of what is no GBNF: llama.cpp will.

    The sets of stacks that can come up are enumerated, as a set of states is when an automaton is
    made deterministic. What all stacks of a set have in common is followed by itself, once for
    each place, so that a recursive grammar has finitely many sets unless its ambiguity recurs.

    With `max_copies`, what is repeated more often is taken to be repeated for ever: much faster,
    and right where every text says how often it is repeated, as JSON does by its commas.
    """
    try:
        grammar = read_gbnf(text, max_copies=max_copies)
    except UnreadableGrammarError:
        return
    _check_first_ways(grammar)
    _Search(grammar).run()


class _Part:
    """What is followed by itself: sets of stacks on top of others (`callers`) that do not matter
    until it ends. `weight`: how many of these there may be, which each of its stacks is on."""

    __slots__ = ("callees", "callers", "ends", "key", "seen", "weight", "width")

    def __init__(self, key: _Stacks) -> None:
        self.key = key
        self.seen: set[_Stacks] = set()
        # Sets in which a stack is empty: the part has ended, or goes on in the others.
        self.ends: list[_Stacks] = []
        self.callers: set[tuple[_Part, _Stacks]] = set()
        self.callees: list[tuple[_Part, int]] = []
        self.weight = 1
        self.width = 1


class _Search:
    def __init__(self, grammar: Grammar) -> None:
        self._classes = grammar.classes
        # All alternatives one after another; None ends each.
        self._symbols: list[int | None] = []
        self._starts: list[tuple[int, ...]] = []
        for alternatives in grammar.rules:
            starts = []
            for symbols in alternatives:
                starts.append(len(self._symbols))
                self._symbols += [*symbols, None]
            self._starts.append(tuple(starts))
        self._parts: dict[_Stacks, _Part] = {}
        self._waiting: list[tuple[_Part, _Stacks]] = []
        # Parts that wait for wider ones, the widest first.
        self._wide: list[tuple[int, int, _Stacks, _Part]] = []
        self._followed: list[tuple[_Stacks, _Part]] = []
        self._overlaps: dict[frozenset[int], list[frozenset[int]]] = {}
        self._left = MAX_WORK

    def run(self) -> None:
        root = self._part(self._rule(0))
        while self._waiting or self._wide:
            if not self._waiting:
                self._begin_widest()
                continue
            part, stacks = self._waiting.pop()
            if stacks not in part.seen:
                part.seen.add(stacks)
                self._spend(len(stacks))
                if () in stacks:
                    self._end(part, stacks, is_root=part is root)
                else:
                    self._follow(part, stacks)

    def _end(self, part: _Part, stacks: _Stacks, *, is_root: bool) -> None:
        if is_root:
            self._waiting.append((part, stacks - {()})) if len(stacks) > 1 else None
            return
        part.ends.append(stacks)
        for caller, bases in part.callers:
            self._waiting.append((caller, self._on(bases, stacks)))

    def _follow(self, part: _Part, stacks: _Stacks) -> None:
        if stacks == part.key:
            if len(stacks) > 1:
                self._step(part, stacks)
            else:
                self._pass(part, next(iter(stacks)))
            return
        tops = {stack[-1] for stack in stacks}
        if len(tops) == 1:
            self._call(part, frozenset(stack[:-1] for stack in stacks), frozenset({(*tops,)}))
            return
        n = _n_common(stacks)
        if n:
            base = next(iter(stacks))[:n]
            self._call(part, frozenset({base}), frozenset(stack[n:] for stack in stacks))
        else:
            self._step(part, stacks)

    def _pass(self, part: _Part, stack: _Stack) -> None:
        """One stack: up to the next rule that it uses, nothing can happen to it."""
        (at,) = stack
        while (symbol := self._symbols[at]) is not None and symbol >= 0:
            at += 1
        if symbol is None:
            self._waiting.append((part, frozenset({()})))
        else:
            self._call(part, frozenset({self._at(at + 1)}), self._rule(~symbol))

    def _call(self, part: _Part, bases: _Stacks, key: _Stacks) -> None:
        """Follow `key` by itself, on top of `bases`."""
        self._use(part, bases, self._part(key))

    def _use(self, part: _Part, bases: _Stacks, called: _Part) -> None:
        if (part, bases) in called.callers:
            return
        called.callers.add((part, bases))
        part.callees.append((called, len(bases)))
        self._weigh(called, part.weight * len(bases))
        for stacks in called.ends:
            self._waiting.append((part, self._on(bases, stacks)))

    def _weigh(self, part: _Part, weight: int) -> None:
        heavier = [(part, weight)]
        while heavier:
            part, weight = heavier.pop()
            if weight > part.weight:
                self._spend(1)
                part.weight = weight
                self._check(weight * part.width)
                heavier += [(called, weight * n) for called, n in part.callees]

    def _step(self, part: _Part, stacks: _Stacks) -> None:
        """What each character that some of these stacks take leaves."""
        ready = self._closure(stacks)
        if () in ready:
            self._waiting.append((part, frozenset(ready)))
            return
        part.width = max(part.width, len(ready))
        self._check(part.width * part.weight)
        by_class = self._by_class(ready)
        while len(by_class) == 1:
            # Most often the same letters of texts that begin alike.
            (ready,) = by_class.values()
            if any(not stack or not self._takes_char(stack[-1]) for stack in ready):
                break
            by_class = self._by_class(ready)
        for together in self._together(frozenset(by_class)):
            left = frozenset(stack for symbol in together for stack in by_class[symbol])
            self._waiting.append((part, left))

    def _by_class(self, ready: list[_Stack]) -> dict[int, list[_Stack]]:
        """What is left of each stack behind the character on top of it, by the class of that."""
        self._spend(len(ready) // 2)
        found: dict[int, list[_Stack]] = {}
        for stack in ready:
            at = stack[-1]
            symbol = self._symbols[at]
            assert symbol is not None
            below = stack[:-1]
            left = below if self._symbols[at + 1] is None else (*below, at + 1)
            found.setdefault(symbol, []).append(left)
        return found

    def _takes_char(self, at: int) -> bool:
        symbol = self._symbols[at]
        return symbol is not None and symbol >= 0

    def _closure(self, stacks: Iterable[_Stack]) -> list[_Stack]:
        """These stacks with a character on top, or empty: each rule on top taken apart."""
        waiting = list(stacks)
        seen = set(waiting)
        found = []
        while waiting:
            stack = waiting.pop()
            symbol = self._symbols[stack[-1]] if stack else 0
            assert symbol is not None
            if symbol >= 0:
                found.append(stack)
                continue
            below = stack[:-1] + self._at(stack[-1] + 1)
            if len(below) > _MAX_DEPTH:
                raise _too_ambiguous()
            for start in self._starts[~symbol]:
                each = below + self._at(start)
                if each not in seen:
                    seen.add(each)
                    waiting.append(each)
            if len(seen) > self._left:
                raise _too_ambiguous()
        self._spend(len(seen))
        return found

    def _together(self, symbols: frozenset[int]) -> list[frozenset[int]]:
        """Which of these classes a character can be in at once: all such groups."""
        found = self._overlaps.get(symbols)
        if found is None:
            edges: dict[int, set[int]] = {}
            for symbol in symbols:
                for low, high in self._classes[symbol]:
                    edges.setdefault(low, set()).add(symbol)
                    edges.setdefault(high + 1, set()).add(symbol)
            inside: set[int] = set()
            groups = set()
            for low, _ in pairwise(sorted(edges)):
                inside ^= edges[low]
                self._spend(len(inside) // 4 + 1)
                if inside:
                    groups.add(frozenset(inside))
            found = self._overlaps[symbols] = list(groups)
        return found

    def _part(self, key: _Stacks) -> _Part:
        part = self._parts.get(key)
        if part is None:
            part = self._parts[key] = _Part(key)
            ready = frozenset[_Stack]()
            if len(key) > 1 and () not in key:
                ready = frozenset(self._closure(key))
            # One that may be over at once is followed where it is used, and not by itself.
            if len(ready) < _MANY or () in ready:
                self._waiting.append((part, key))
            else:
                heapq.heappush(self._wide, (-len(ready), len(self._parts), ready, part))
        return part

    def _begin_widest(self) -> None:
        """Follow the part that may begin in the most ways, unless one that was followed may begin
        in all of these and more. Stacks do not meddle with each other, so that the sets of that one
        hold those of this one. In an object of many members that may be left out there is one part
        for all that may come first, and one for what is left behind each member."""
        _, _, ready, part = heapq.heappop(self._wide)
        for wider_ready, wider in self._followed:
            if ready <= wider_ready:
                self._parts[part.key] = wider
                for caller, bases in part.callers:
                    self._use(caller, bases, wider)
                return
        self._followed.append((ready, part))
        self._waiting.append((part, part.key))

    def _rule(self, rule: int) -> _Stacks:
        return frozenset(self._at(start) for start in self._starts[rule])

    def _at(self, place: int) -> _Stack:
        """The stack of this place; empty where an alternative has its end there."""
        return () if self._symbols[place] is None else (place,)

    def _on(self, bases: _Stacks, stacks: _Stacks) -> _Stacks:
        self._check(len(bases) * len(stacks))
        self._spend(len(bases) * len(stacks))
        return frozenset(base + stack for base in bases for stack in stacks)

    def _check(self, n_stacks: int) -> None:
        if n_stacks > MAX_STACKS:
            raise _too_ambiguous()

    def _spend(self, amount: int) -> None:
        self._left -= amount
        if self._left < 0:
            raise _too_ambiguous()


def _n_common(stacks: _Stacks) -> int:
    """How many places from the bottom all stacks share, their tops left out."""
    first, *others = stacks
    n = min(map(len, stacks)) - 1
    for stack in others:
        while n > 0 and stack[:n] != first[:n]:
            n -= 1
    return n


def _check_first_ways(grammar: Grammar) -> None:
    """llama.cpp looks for left recursion by taking every way to what comes first, each anew; and it
    overlooks one behind a rule that is empty only through others, which it then never leaves."""
    empty = _empty(grammar)
    firsts = [_firsts(grammar, rule, empty) for rule in range(len(grammar.rules))]
    ways: dict[int, int] = {}
    for rule in range(len(firsts)):
        waiting, open_rules = [rule], set[int]()
        while waiting:
            at = waiting[-1]
            if at in ways or at in open_rules:
                waiting.pop()
                if at not in ways:
                    open_rules.discard(at)
                    ways[at] = 1 + sum(ways[first] for first in firsts[at])
                    if ways[at] > _MAX_FIRST_WAYS:
                        raise _too_ambiguous()
                continue
            open_rules.add(at)
            if not open_rules.isdisjoint(firsts[at]):
                raise UnusableGrammarError(
                    "the grammar cannot be used",
                    why="a rule begins with itself, so that it would never get to a character",
                )
            waiting += [first for first in firsts[at] if first not in ways]


def _empty(grammar: Grammar) -> set[int]:
    """The rules that may stand for nothing."""
    found = {rule for rule, alternatives in enumerate(grammar.rules) if not all(alternatives)}
    users: dict[int, list[tuple[int, list[int]]]] = {}
    for rule, alternatives in enumerate(grammar.rules):
        for symbols in alternatives:
            if all(symbol < 0 for symbol in symbols):
                for symbol in set(symbols):
                    users.setdefault(~symbol, []).append((rule, symbols))
    waiting = list(found)
    while waiting:
        for rule, symbols in users.get(waiting.pop(), ()):
            if rule not in found and all(~symbol in found for symbol in symbols):
                found.add(rule)
                waiting.append(rule)
    return found


def _firsts(grammar: Grammar, rule: int, empty: set[int]) -> list[int]:
    """The rules that a rule's alternatives may begin with, as often as they may."""
    found = []
    for symbols in grammar.rules[rule]:
        for symbol in symbols:
            if symbol >= 0:
                break
            found.append(~symbol)
            if ~symbol not in empty:
                break
    return found


def _too_ambiguous() -> UnusableGrammarError:
    return UnusableGrammarError(
        "the grammar is too ambiguous, or too large",
        why=f"a text could begin in more than {MAX_STACKS} ways at once, or nobody can tell",
        hint="make alternatives that begin alike (in anyOf, for instance) fewer or one",
    )
