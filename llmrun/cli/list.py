"""`llmrun list`: what is on this machine."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrun.cli.options import Invocation, register
from llmrun.cli.pull import FileRow
from llmrun.errors import LlmrunError
from llmrun.text import format_bytes, format_count
from llmrun.ui.output import Output

if TYPE_CHECKING:
    import typer

    from llmrun.hub.types import StoredModel


@dataclass(frozen=True, slots=True)
class ModelRow:
    """`state`: complete, partial or damaged. `last_used` is in seconds since the epoch, `age_s`
    how long that is ago. `path` is the first file's."""

    model: str
    repo: str
    quant: str | None
    size: int
    context: int | None
    last_used: float | None
    age_s: float | None
    state: str
    origin: str
    commit: str | None
    path: Path | None
    files: tuple[FileRow, ...]


@dataclass(frozen=True, slots=True)
class ListResult:
    models: tuple[ModelRow, ...]
    total_size: int

    def show(self, output: Output) -> None:
        if output.quiet:
            for row in self.models:
                output.line(row.model)
            return
        if not self.models:
            output.note("no models yet; try: llmrun pull smollm2-135m")
            return
        output.table(
            ("model", "size", "quant", "context", "last used", "where"),
            [
                (
                    row.model,
                    format_bytes(row.size),
                    row.quant or "-",
                    format_count(row.context) if row.context else "-",
                    "never" if row.age_s is None else format_age(row.age_s),
                    row.origin if row.state == "complete" else f"{row.origin}, {row.state}",
                )
                for row in self.models
            ],
            right=" r r",
        )
        output.note(f"{format_bytes(self.total_size)} in all")
        if any(row.state == "partial" for row in self.models):
            output.note("partial: pull again to finish, or llmrun prune")
        if any(row.state == "damaged" for row in self.models):
            output.note("damaged: pull again to mend, or llmrun rm")


def list_models(invocation: Invocation) -> ListResult:
    """List the models on this machine."""
    models = invocation.services.store().models()
    now = invocation.services.now()
    contexts = ContextCache(invocation.environment.cache_dir / "contexts.json")
    rows = [_row(model, contexts, now) for model in models]
    contexts.save()
    rows.sort(key=lambda row: (-(row.last_used or 0), row.model))
    return ListResult(tuple(rows), sum(row.size for row in rows))


def _row(model: StoredModel, contexts: ContextCache, now: float) -> ModelRow:
    path = model.files[0].local_path if model.files else None
    is_complete = model.state == "complete"
    return ModelRow(
        model=model.reference,
        repo=model.repo,
        quant=model.quant,
        size=model.n_bytes,
        context=contexts.of(path) if is_complete and path is not None else None,
        last_used=model.last_used,
        age_s=None if model.last_used is None else max(0.0, now - model.last_used),
        state=model.state,
        origin=model.origin,
        commit=model.commit,
        path=path if is_complete else None,
        files=tuple(FileRow(file.path, file.n_bytes, file.sha256) for file in model.files),
    )


class ContextCache:
    """The trained context of files by path, size and time, so that `list` parses a header once.

    A damaged cache counts as empty, one that cannot be written is not.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, int | None] = {}
        self._seen: dict[str, int | None] = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
            self._known = _valid(found)

    def of(self, path: Path) -> int | None:
        """The context of the model in `path`; None when its header does not say or is damaged."""
        from llmrun.gguf.info import find_shards, read_info

        try:
            status = path.stat()
            key = f"{path}|{status.st_size}|{status.st_mtime_ns}"
            if key not in self._known:
                self._known[key] = read_info(find_shards(path)).n_ctx_train
        except (OSError, LlmrunError):
            return None
        self._seen[key] = self._known[key]
        return self._known[key]

    def save(self) -> None:
        """Keep what was asked for; entries of files that are gone are dropped."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            temporary.write_text(json.dumps(self._seen), encoding="utf-8")
            os.replace(temporary, self._path)


def _valid(found: Any) -> dict[str, int | None]:
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if value is None or type(value) is int}


def format_age(seconds: float) -> str:
    """`90` -> `1 minute ago`."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        n = int(seconds // length)
        if n >= 1:
            return f"{n} {unit}{'s' if n > 1 else ''} ago"
    return "just now"


def add_to(app: typer.Typer) -> None:
    register(app, "list", list_models)
