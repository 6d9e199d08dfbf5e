"""Finds where a text repeats itself, and learns how far such repeats can be trusted. Pure.

The last three tokens are looked up among all earlier ones; where they occurred before, the text
that followed is the guess for what comes now. Every token that then really comes is held against
the guess, whether it was drafted or not: so how good guesses are is known before one has cost
anything. (Text compressors call this a match model.)
"""

from __future__ import annotations

from collections.abc import Sequence

_ORDER = 3  # tokens that must agree before a repeat is believed
_TOKEN_BITS = 20  # vocabularies are smaller than a million
_KEY_MASK = (1 << _ORDER * _TOKEN_BITS) - 1
_N_CANDIDATES = 8  # earlier places that are compared, the latest first
_MAX_MATCH = 32  # a longer agreement says no more
# A repeat this long is not given up at one other token: a word was replaced, the rest goes on.
_LONG = 8

# Kinds of guesses by how many tokens agreed before (the first: just after such a replaced token),
# and how often a guess of the kind is taken for right before anything is known.
_CLASS_FROM = (0, 3, 5, 8, 16, 32)
_FIRST_CHANCES = (0.3, 0.4, 0.5, 0.7, 0.85, 0.93)
_FIRST_WEIGHT = 4.0
_KEEP = 0.97  # of the old counts at each new guess: the last thirty or so decide
_CLASS_OF = tuple(
    max(c for c, start in enumerate(_CLASS_FROM) if n >= start) for n in range(_MAX_MATCH + 1)
)


class CopyModel:
    """The repeats of one growing list of tokens."""

    def __init__(self, n_given: int) -> None:
        """The first `n_given` tokens (the prompt) are searched, but teach nothing about guesses."""
        self._n_given = n_given
        self._n_seen = 0
        self._key = 0
        self._last: dict[int, int] = {}  # three tokens -> where they last ended
        self._before: list[int] = []  # place -> where its three tokens ended the time before
        self._source = -1  # the token expected next is the one here; -1: none is expected
        self._n_match = 0
        self._right = [chance * _FIRST_WEIGHT for chance in _FIRST_CHANCES]
        self._total = [_FIRST_WEIGHT] * len(_FIRST_CHANCES)

    def update(self, tokens: Sequence[int]) -> None:
        """Take in what `tokens` has more than at the last call."""
        last, before = self._last, self._before
        key = self._key
        for place in range(self._n_seen, len(tokens)):
            token = tokens[place]
            key = (key << _TOKEN_BITS | token) & _KEY_MASK
            if place >= self._n_given:
                self._compare(tokens, token)
            earlier = -1
            if place >= _ORDER - 1:
                earlier = last.get(key, -1)
                last[key] = place
            before.append(earlier)
            if self._n_match < _ORDER and place >= self._n_given - 1:
                self._search(tokens, place)
        self._key = key
        self._n_seen = len(tokens)

    def draft(self, tokens: Sequence[int], n_max: int) -> list[int]:
        """Up to `n_max` tokens that may come next; call after `update`. A repeat that reaches the
        end of the text goes round again."""
        source = self._source
        if source < 0:
            return []
        found = list(tokens[source : source + n_max])
        while len(found) < n_max:
            found.append(found[source + len(found) - len(tokens)])
        return found

    def chances(self, n: int) -> list[float]:
        """For each of the next `n` drafted tokens: how likely it and all before it are right."""
        if self._source < 0:
            return []
        chances = []
        chance = 1.0
        for n_match in range(self._n_match, self._n_match + n):
            kind = _CLASS_OF[min(n_match, _MAX_MATCH)]
            chance *= self._right[kind] / self._total[kind]
            chances.append(chance)
        return chances

    def _compare(self, tokens: Sequence[int], token: int) -> None:
        """Hold the token that came against the one expected."""
        source = self._source
        if source < 0:
            return
        is_right = tokens[source] == token
        kind = _CLASS_OF[self._n_match]
        self._right[kind] = self._right[kind] * _KEEP + is_right
        self._total[kind] = self._total[kind] * _KEEP + 1
        if is_right:
            self._source = source + 1
            self._n_match = min(self._n_match + 1, _MAX_MATCH)
        elif self._n_match >= _LONG:
            self._source = source + 1
            self._n_match = 0
        else:
            self._source = -1
            self._n_match = 0

    def _search(self, tokens: Sequence[int], place: int) -> None:
        """Look for the earlier place that agrees longest with what ends at `place`."""
        candidate = self._before[place]
        best = 0
        for _ in range(_N_CANDIDATES):
            if candidate < 0:
                break
            n = 0
            while n < _MAX_MATCH and n <= candidate and tokens[candidate - n] == tokens[place - n]:
                n += 1
            if n > best:
                best = n
                self._source = candidate + 1
                self._n_match = n
            candidate = self._before[candidate]
