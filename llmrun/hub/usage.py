"""When each model was last used: one JSON object a line, appended, so that processes can share it.

An append of one short line is atomic. The file is rewritten when it has grown; a use that another
process appends at that very moment may be forgotten, nothing else.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

MAX_BYTES = 64 * 1024


class UsageLog:
    """Last uses by model reference or file path, kept in `folder`/usage.jsonl.

    Damaged lines are skipped, and a folder that cannot be written loses the records, no more.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "usage.jsonl"

    def record(self, model: str, when: float | None = None) -> None:
        """Note that `model` is used at `when` (seconds since the epoch; now when None)."""
        line = json.dumps({"model": model, "used": time.time() if when is None else when})
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as out:
                # A line cut short by a crash would swallow this one.
                out.write(f"\n{line}\n")
            if self._file.stat().st_size > MAX_BYTES:
                self._compact()
        except OSError:
            return

    def load(self) -> dict[str, float]:
        """The last use of each model."""
        found: dict[str, float] = {}
        try:
            text = self._file.read_bytes().decode("utf-8", "replace")
        except OSError:
            return found
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                model, used = entry["model"], entry["used"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if isinstance(model, str) and isinstance(used, int | float):
                found[model] = max(float(used), found.get(model, 0.0))
        return found

    def _compact(self) -> None:
        newest = sorted(self.load().items(), key=lambda item: -item[1])[:200]
        lines = [json.dumps({"model": model, "used": used}) for model, used in newest]
        fresh = self._file.with_name(f"{self._file.name}.{os.getpid()}.tmp")
        fresh.write_text("\n".join(lines) + "\n", "utf-8")
        os.replace(fresh, self._file)
