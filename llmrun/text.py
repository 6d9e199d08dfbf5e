"""Text that is safe and readable on a terminal: control-character escaping, sizes, close names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# C0 but for tab and newline, DEL, C1, and the bidirectional and invisible format characters that
# can reorder or hide what a reader sees. Lone surrogates (of undecodable file names) do not print.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def _visible(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def escape_controls(text: str) -> str:
    """Return `text` with every character that could drive a terminal in a visible form.

    Tab and newline stay. Each character is escaped by itself, so text may be escaped in pieces.
    """
    return _UNSAFE.sub(_visible, text)


def escape_line(text: str) -> str:
    """Like `escape_controls`, for one-line fields such as names: newlines and tabs go as well."""
    return escape_controls(text).replace("\n", "\\n").replace("\t", "\\t")


def format_bytes(n_bytes: int) -> str:
    """Decimal units, as hubs and disks are sold: `4977169568` -> `4.98 GB`."""
    value = float(n_bytes)
    if abs(value) < 1000:
        return f"{n_bytes} B"
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if abs(value) < 999.5 or unit == "TB":
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    raise AssertionError("unreachable")


_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([kmgtp]?)(i?)(b?)", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str) -> int:
    """A size as people write it: `16GiB` and `16G` are binary, `16 GB` is decimal, a number alone
    is bytes. Case does not matter. Raises ValueError, with no words for users."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    number, prefix, binary, byte = match.groups()
    if binary and not prefix:
        raise ValueError(text)
    base = 1024 if binary or not byte else 1000
    power = "kmgtp".index(prefix.lower()) + 1 if prefix else 0
    whole, _, fraction = number.partition(".")
    # In whole numbers: a float has not enough digits for every size.
    scale: int = base**power
    return int(whole) * scale + (int(fraction) * scale // 10 ** len(fraction) if fraction else 0)


def format_count(n: int) -> str:
    """`131072` -> `128K`, `30_700_000_000` -> `30.7B`: for contexts and parameters."""
    if n >= 1024 and n % 1024 == 0 and n < 1024 * 1024 * 4:
        return f"{n // 1024}K"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if n >= limit:
            return f"{n / limit:.1f}{unit}".replace(".0" + unit, unit)
    return str(n)


def format_duration(seconds: float) -> str:
    """`0.0421` -> `42 ms`, `3.21` -> `3.2 s`, `192` -> `3:12`, `7384` -> `2:03:04`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, sec = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{sec:02}" if hours else f"{minutes}:{sec:02}"


def format_speed(tok_s: tuple[float, float] | None) -> str:
    """A range of tokens a second: `(9.4, 21.2)` -> `9-21`, `(1.52, 2.8)` -> `1.5-2.8`."""
    if tok_s is None:
        return "-"
    digits = 1 if min(tok_s) < 3 else 0
    low, high = (f"{value:.{digits}f}" for value in tok_s)
    return low if low == high else f"{low}-{high}"


def close_names(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The known names most like `name`, best first; the match ignores case."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=n, cutoff=0.5)
    return [by_lower[candidate] for candidate in found]
