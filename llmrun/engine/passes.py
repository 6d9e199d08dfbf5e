"""How many passes over the weights a batch takes. Pure.

In a unified cache a batch is computed at once. Where each sequence has a cache of its own, a pass
takes equally many rows of sequences whose ids follow each other without a gap, so that what it
looks at is one block of the cache (llama.cpp: `split_equal`, sequential). Each further pass reads
all weights again.
"""

from __future__ import annotations

from collections.abc import Sequence


def split_rows(rows: Sequence[tuple[int, int]]) -> list[int]:
    """The rows of each pass. `rows`: sequence ids in ascending order, each with its rows (≥ 1)."""
    left = list(rows)
    passes = []
    while left:
        n_together = 1
        while n_together < len(left) and left[n_together][0] == left[0][0] + n_together:
            n_together += 1
        n_each = min(n_rows for _, n_rows in left[:n_together])
        passes.append(n_each * n_together)
        rest = [(seq_id, n_rows - n_each) for seq_id, n_rows in left[:n_together]]
        left = [row for row in rest if row[1]] + left[n_together:]
    return passes
