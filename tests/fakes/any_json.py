"""JSON that a stranger may send, for property tests of the wire formats."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, -(10**400)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=12),
    st.sampled_from(["", "user", "assistant", "tool", "json", "5m", "-1", '{"a":', "\ud800", "x"]),
)

ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=12,
)


def bodies(names: Iterable[str]) -> st.SearchStrategy[object]:
    """Objects with the members that a format knows, at all depths, and anything as their values."""
    known = st.sampled_from(sorted(names))
    return st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(known, inner, max_size=6),
        max_leaves=20,
    )
