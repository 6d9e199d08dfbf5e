"""Locks between processes, the same files and the same kind that the hub's own tools use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def hold(path: Path, timeout_s: float) -> Iterator[bool]:
    """Take the lock at `path` for the block; False when another holds it for `timeout_s`."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(path, timeout=max(timeout_s, 0.01)))
        except TimeoutError:
            yield False
            return
        yield True


def is_held(path: Path) -> bool:
    """Whether some process holds the lock at `path` now. Creates nothing."""
    if not path.exists():
        return False
    with hold(path, 0.01) as free:
        return not free
