"""Numbers within bounds as GBNF: every sentence is a JSON number that keeps them. Pure.

Not every number that keeps them is a sentence: no exponents, and where a bound lies between two
whole numbers, the places behind the point go by hundredths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

# As many as a float tells apart.
_MAX_DIGITS = 15
_LIMIT = 10**_MAX_DIGITS
_FRACTION = "[0-9]{0,12}"


def number_body(schema: Mapping[str, object], *, is_integer: bool) -> str | None:
    """The body for numbers with the schema's `minimum`, `maximum` and the exclusive ones; None
    where it has no bounds, or none that any number of reasonable length keeps."""
    low, is_low_out = _bound(schema, "minimum", "exclusiveMinimum", max)
    high, is_high_out = _bound(schema, "maximum", "exclusiveMaximum", min)
    if low is None and high is None:
        return None
    if is_integer:
        least = None if low is None else math.floor(low) + 1 if is_low_out else math.ceil(low)
        most = None if high is None else math.ceil(high) - 1 if is_high_out else math.floor(high)
        ways = _whole(least, most)
    else:
        ways = _real(low, is_low_out, high, is_high_out)
    return f"({' | '.join(ways)})" if ways else None


def _bound(
    schema: Mapping[str, object],
    key: str,
    exclusive_key: str,
    stricter: Callable[[Fraction, Fraction], Fraction],
) -> tuple[Fraction | None, bool]:
    """The stricter of the two bounds, and whether it is itself outside."""
    value, exclusive = _number(schema.get(key)), _number(schema.get(exclusive_key))
    if exclusive is None:
        # An older draft has a boolean there, which is about the other one.
        return value, value is not None and schema.get(exclusive_key) is True
    if value is None or stricter(value, exclusive) == exclusive:
        return exclusive, True
    return value, False


def _number(value: object) -> Fraction | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value):
        return None
    # What was written, not the float next to it: 0.1 has to be below a bound of 0.1 or equal to it.
    return Fraction(repr(value))


# ---- whole numbers


def _whole(low: int | None, high: int | None) -> list[str]:
    ways = []
    if high is None or high >= 0:
        ways += _natural(max(low or 0, 0), high)
    if low is None or low < 0:
        most = None if low is None else -low
        ways += [
            f'"-" {way}' for way in _natural(max(1, -(high if high is not None else -1)), most)
        ]
    return ways


def _natural(low: int, high: int | None) -> list[str]:
    """Numbers from `low` (not negative) to `high`."""
    high = _LIMIT - 1 if high is None else min(high, _LIMIT - 1)
    ways = []
    for n_digits in range(len(str(low)), len(str(high)) + 1):
        least = max(low, 10 ** (n_digits - 1) if n_digits > 1 else 0)
        most = min(high, 10**n_digits - 1)
        if least <= most:
            ways.append(_between(str(least), str(most)))
    return ways


def _between(low: str, high: str) -> str:
    """Digits from `low` to `high`, as many as each of them has."""
    n = len(low)
    if low == high:
        return f'"{low}"' if low else ""
    if low == "0" * n and high == "9" * n:
        return f"[0-9]{{{n}}}"
    if low[0] == high[0]:
        return f'"{low[0]}" {_between(low[1:], high[1:])}'
    first, last = int(low[0]), int(high[0])
    ways = []
    if low[1:] != "0" * (n - 1):
        ways.append(f'"{first}" {_between(low[1:], "9" * (n - 1))}')
        first += 1
    above = None
    if high[1:] != "9" * (n - 1):
        above = f'"{last}" {_between("0" * (n - 1), high[1:])}'
        last -= 1
    if first <= last:
        ways.append(f"[{first}-{last}]{f' [0-9]{{{n - 1}}}' if n > 1 else ''}")
    if above is not None:
        ways.append(above)
    return ways[0] if len(ways) == 1 else f"({' | '.join(ways)})"


# ---- others


def _real(
    low: Fraction | None, is_low_out: bool, high: Fraction | None, is_high_out: bool
) -> list[str]:
    ways: list[str] = []
    if high is None or high > 0 or (high == 0 and not is_high_out):
        begin = (Fraction(0), False) if low is None or low < 0 else (low, is_low_out)
        ways += _positive(*begin, high, is_high_out)
    if low is None or low < 0:
        begin = (Fraction(0), False) if high is None or high > 0 else (-high, is_high_out)
        end = None if low is None else -low
        ways += [f'"-" {way}' for way in _positive(*begin, end, is_low_out)]
    return ways


def _positive(
    low: Fraction, is_low_out: bool, high: Fraction | None, is_high_out: bool
) -> list[str]:
    """Numbers from `low` (not negative) to `high`."""
    if high is None or high >= _LIMIT:
        high, is_high_out = Fraction(_LIMIT), True
    if low > high or (low == high and (is_low_out or is_high_out)):
        return []
    ways = []
    for bound, is_out in ((low, is_low_out), (high, is_high_out)):
        if not is_out and bound.denominator != 1:
            ways.append(f'"{float(bound)!r}"')
    least = math.floor(low) + 1 if is_low_out else math.ceil(low)
    most = math.ceil(high) - 1 if is_high_out else math.floor(high)
    # Between two whole numbers any fraction may stand; `high` may be the upper one of them.
    until = math.floor(high)
    if least < until:
        ways += [f'{way} ("." [0-9] {_FRACTION})?' for way in _natural(least, until - 1)]
    if least <= most and most >= until:
        ways += _natural(max(least, until), most)
    ways += _part(low, high, math.floor(low)) if is_low_out or low.denominator != 1 else []
    if math.floor(low) != until or not (is_low_out or low.denominator != 1):
        ways += _part(low, high, until)
    return list(dict.fromkeys(ways))


def _part(low: Fraction, high: Fraction, whole: int) -> list[str]:
    """`whole` with what may stand behind the point to lie strictly between both bounds: tenths, or
    hundredths and any digits after them."""
    ways = []
    first, last = math.floor((low - whole) * 10) + 1, math.ceil((high - whole) * 10) - 1
    if max(0, first) <= min(9, last):
        ways.append(f'"{whole}." {_between(str(max(0, first)), str(min(9, last)))}')
    # What follows adds up to less than a hundredth, or is rounded to one.
    first, last = math.floor((low - whole) * 100) + 1, math.ceil((high - whole) * 100) - 2
    if max(0, first) <= min(99, last):
        digits = _between(f"{max(0, first):02}", f"{min(99, last):02}")
        ways.append(f'"{whole}." {digits} {_FRACTION}')
    return ways
