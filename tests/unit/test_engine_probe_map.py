"""The walk over a C++ `std::map` in memory, in the layouts of the two libraries."""

from __future__ import annotations

import ctypes
import random

import pytest

from llmrun.engine.ggml import (
    _MAP_LAYOUTS,
    _MAX_ENTRIES,
    BreakdownUnavailableError,
    _MapLayout,
    walk_map,
)

LAYOUTS = pytest.mark.parametrize("layout", _MAP_LAYOUTS.values(), ids=_MAP_LAYOUTS)


class FakeMap:
    """A binary tree of `n` nodes in random shape; each node's key is its number from 1."""

    def __init__(self, layout: _MapLayout, n: int, *, claimed: int | None = None) -> None:
        self.layout = layout
        self.nodes = [ctypes.create_string_buffer(64) for _ in range(n)]
        self.head = ctypes.create_string_buffer(layout.n_bytes)
        self._put(self.head, layout.count, n if claimed is None else claimed)
        # libstdc++ has garbage in the colour's padding, libc++ in what is behind the count.
        rng = random.Random(n)
        free: list[tuple[object, int]] = [(self.head, layout.root)]
        for number, node in enumerate(self.nodes, start=1):
            target, offset = free.pop(rng.randrange(len(free)))
            self._put(target, offset, ctypes.addressof(node))
            self._put(node, layout.values, number)
            free += [(node, layout.left), (node, layout.right)]

    def _put(self, buffer: object, offset: int, value: int) -> None:
        ctypes.c_size_t.from_buffer(buffer, offset).value = value

    def walk(self) -> list[int]:
        found = walk_map(ctypes.addressof(self.head), self.layout)
        keys = [ctypes.c_size_t.from_address(node + self.layout.values).value for node in found]
        return sorted(keys)


@LAYOUTS
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 40])
def test_each_node_once(layout: _MapLayout, n: int) -> None:
    assert FakeMap(layout, n).walk() == list(range(1, n + 1))


@LAYOUTS
@pytest.mark.parametrize(("n", "claimed"), [(3, 4), (3, 2), (1, 0), (0, 1)])
def test_a_count_that_does_not_match(layout: _MapLayout, n: int, claimed: int) -> None:
    if claimed == 0:
        # An empty map's root is not looked at.
        assert FakeMap(layout, n, claimed=claimed).walk() == []
        return
    with pytest.raises(BreakdownUnavailableError, match="were found"):
        FakeMap(layout, n, claimed=claimed).walk()


@LAYOUTS
def test_a_loop_ends(layout: _MapLayout) -> None:
    fake = FakeMap(layout, 3)
    root = ctypes.addressof(fake.nodes[0])
    for node in fake.nodes:
        fake._put(node, layout.left, root)
    with pytest.raises(BreakdownUnavailableError):
        fake.walk()


@LAYOUTS
def test_a_count_that_is_no_count(layout: _MapLayout) -> None:
    with pytest.raises(BreakdownUnavailableError, match="claims"):
        FakeMap(layout, 1, claimed=_MAX_ENTRIES + 1).walk()
