"""Finds where a text repeats itself, and learns how far such repeats can be trusted. Pure.

The last three tokens are looked up among all earlier ones; where they occurred before, the text
that followed is the guess for what comes now. Every token that then really comes is held against
the guess, whether it was drafted or not: so how good guesses are is known before one has cost
anything. (Text compressors call this a match model.)

Few repeats are exact: lines of a list count on, a name is replaced, a word is put in or left out.
So a long repeat goes on behind a token that differs, and what differed is learnt: the replacement
comes again, the number counts on again, and where the last repeat differed this one will, too.
"""

from __future__ import annotations

from collections.abc import Sequence

_ORDER = 3  # tokens that must agree before a repeat is believed
_TOKEN_BITS = 20  # vocabularies are smaller than a million
_KEY_MASK = (1 << _ORDER * _TOKEN_BITS) - 1
_N_CANDIDATES = 8  # earlier places that are compared, the latest first
_MAX_MATCH = 32  # a longer agreement says no more
_N_HELD = 512  # of the prompt's last tokens are held against what they repeat; it takes time
_MISS_COST = 8  # of the trust; a repeat that has less ends at a token that differs
_SURE = 16  # this is much trust

# Kinds of guesses. That it is the same token: just behind an unforeseen one; else by how far the
# repeat is trusted; where it differed once, in a repeat of much trust (what ended there may only
# have been a short repeat).
_AFTER_MISS = 0
_TRUST_FROM = (0, 5, 8, 16, 32)
_KIND_OF = tuple(
    max(kind for kind, start in enumerate(_TRUST_FROM, 1) if n >= start)
    for n in range(_MAX_MATCH + 1)
)
_DIFFERED_ONCE = len(_TRUST_FROM) + 1
# That it differs: replaced as once before, as more than once; counted on; nobody knows how.
_REPLACED, _REPLACED_AGAIN, _COUNTED, _OTHER = range(_DIFFERED_ONCE + 1, _DIFFERED_ONCE + 5)
# How often a guess of the kind is taken for right before anything is known.
_FIRST_CHANCES = (0.2, 0.5, 0.65, 0.8, 0.93, 0.97, 0.8, 0.3, 0.8, 0.2, 0.2)
_FIRST_WEIGHT = 3.0
_KEEP = 0.97  # of the old counts at each new guess: the last thirty or so decide


class CopyModel:
    """The repeats of one growing list of tokens.

    A repeat holds what comes against its source: token by token an earlier place, the origin.
    """

    def __init__(self, n_given: int) -> None:
        """The first `n_given` tokens (the prompt) are searched, but teach no chances."""
        self._n_given = n_given
        self._n_seen = 0
        self._key = 0
        self._last: dict[int, int] = {}  # three tokens -> where they last ended
        self._before: list[int] = []  # place -> where its three tokens ended the time before
        self._origins: list[int] = []  # place -> its origin, -1: it had none
        # token -> what came instead of it the last time, and whether it did before that
        self._replaced: dict[int, tuple[int, bool]] = {}
        self._pending: tuple[int, int] | None = None  # the same, if the repeat goes on behind it
        self._highest = 0  # a number up to here is a token
        self._source = -1  # the token expected next is the one here; -1: none is expected
        self._n_match = 0  # tokens that agreed since the last unforeseen one
        self._trust = 0  # tokens that agreed, less the cost of those that did not
        self._missed = -1  # the last origin that did not agree
        self._right = [chance * _FIRST_WEIGHT for chance in _FIRST_CHANCES]
        self._total = [_FIRST_WEIGHT] * len(_FIRST_CHANCES)

    def update(self, tokens: Sequence[int]) -> None:
        """Take in what `tokens` has more than at the last call."""
        last, before, origins = self._last, self._before, self._origins
        key, highest = self._key, self._highest
        first_held = self._n_given - _N_HELD
        for place in range(self._n_seen, len(tokens)):
            token = tokens[place]
            key = (key << _TOKEN_BITS | token) & _KEY_MASK
            if token > highest:
                highest = token
            origins.append(self._source)
            if self._source >= 0:
                self._highest = highest
                self._compare(tokens, place)
            earlier = -1
            if place >= _ORDER - 1:
                earlier = last.get(key, -1)
                last[key] = place
            before.append(earlier)
            if earlier >= 0 and self._n_match < _ORDER and place >= first_held:
                self._search(tokens, place)
        self._key, self._highest = key, highest
        self._n_seen = len(tokens)

    def offer(self, tokens: Sequence[int], n: int) -> tuple[list[int], list[float]]:
        """The next `n` tokens as guessed, and for each how likely it and all before it are right;
        nothing where no repeat is known. Call after `update`. A repeat that reaches the end of the
        text goes round again."""
        guesses: list[int] = []
        chances: list[float] = []
        source, n_seen = self._source, self._n_seen
        if source < 0:
            return guesses, chances
        chance = 1.0
        n_match, trust = self._n_match, self._trust
        for place in range(source, source + n):
            if place < n_seen:
                token, origin = tokens[place], self._origins[place]
            else:
                token, origin = guesses[place - n_seen], place - n_seen + source
            former, twice = token, False
            if origin >= 0:
                former = tokens[origin] if origin < n_seen else guesses[origin - n_seen]
                if former != token:
                    twice = origin >= n_seen or self._differed(tokens, origin)
            guess, kind = self._guess(token, former, twice, n_match, trust)
            chance *= self._right[kind] / self._total[kind]
            guesses.append(guess)
            chances.append(chance)
            n_match = 1
            if trust < _MAX_MATCH:
                trust += 1
        return guesses, chances

    def _guess(
        self, token: int, former: int, differed_twice: bool, n_match: int, trust: int
    ) -> tuple[int, int]:
        """What is expected in a repeat of `token`, and the kind of that guess. `former` is the
        token at its origin: the same one where it was itself a copy. `differed_twice`: it was not,
        and nor was that one."""
        if token in self._replaced:
            guess, again = self._replaced[token]
            return guess, _REPLACED_AGAIN if again else _REPLACED
        if token != former:
            next_token = token + token - former
            # Vocabularies have the ten digits in a row.
            if abs(token - former) == 1 and 0 <= next_token <= self._highest:
                return next_token, _COUNTED
            return token, _OTHER if trust < _SURE or differed_twice else _DIFFERED_ONCE
        return token, _KIND_OF[trust] if n_match else _AFTER_MISS

    def _differed(self, tokens: Sequence[int], place: int) -> bool:
        """Whether the token there came in a repeat, in the place of another."""
        origin = self._origins[place]
        return origin >= 0 and tokens[origin] != tokens[place]

    def _compare(self, tokens: Sequence[int], place: int) -> None:
        """Hold the token that came against the one expected, and go on to the next."""
        came, source = tokens[place], self._source
        token, origin = tokens[source], self._origins[source]
        former, twice = token, False
        if origin >= 0:
            former = tokens[origin]
            twice = former != token and self._differed(tokens, origin)
        guess, kind = self._guess(token, former, twice, self._n_match, self._trust)
        if place >= self._n_given:
            self._right[kind] = self._right[kind] * _KEEP + (guess == came)
            self._total[kind] = self._total[kind] * _KEEP + 1
        self._source = source + 1
        if came in (token, guess):
            self._n_match = min(self._n_match + 1, _MAX_MATCH)
            self._trust = min(self._trust + 1, _MAX_MATCH)
            if self._pending is not None:
                self._note_replaced(*self._pending)
            if came == token:
                self._replaced.pop(token, None)
            else:
                self._note_replaced(token, came)
            self._pending = None
        elif self._trust >= _MISS_COST:
            self._trust -= _MISS_COST
            if kind < _REPLACED:
                self._n_match = 0
            self._pending = None
            if source + 1 < place and tokens[source + 1] == came:
                self._source = source + 2  # one was left out
                self._n_match = 1
            elif self._missed == source - 1 and tokens[source - 1] == came:
                self._source = source  # the token before was put in
                self._n_match = 1
            else:
                self._pending = token, came
            self._missed = source
        else:
            self._source = -1
            self._n_match = self._trust = 0

    def _note_replaced(self, token: int, came: int) -> None:
        former = self._replaced.get(token)
        self._replaced[token] = came, former is not None and former[0] == came

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
                self._n_match = self._trust = n
                self._pending = None
            candidate = self._before[candidate]
