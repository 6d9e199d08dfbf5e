"""`llmrun prune`: delete unfinished downloads, blobs that nothing refers to, saved prefixes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmrun.cli.list import format_age
from llmrun.cli.options import Invocation, register
from llmrun.text import format_bytes
from llmrun.ui.output import Output


@dataclass(frozen=True, slots=True)
class PruneRow:
    """`kind`: partial (an unfinished download), record (its book-keeping), blob, or prefix (what a
    model has read, kept for the next run). `size` is the disk space it takes, `age_s` the seconds
    since it was last written or, a prefix, used."""

    path: Path
    repo: str
    kind: str
    size: int
    age_s: float


@dataclass(frozen=True, slots=True)
class PruneResult:
    """`freed` is 0 with `dry_run`, and when the answer was no."""

    files: tuple[PruneRow, ...]
    total: int
    freed: int
    dry_run: bool

    def show(self, output: Output) -> None:
        if not self.files:
            output.note("nothing to prune")
            return
        if self.dry_run:
            _show_files(output, self.files)
            output.note(f"{format_bytes(self.total)} could be freed; without --dry-run they are")
        else:
            output.note(f"{format_bytes(self.freed)} freed")


def _show_files(output: Output, files: tuple[PruneRow, ...]) -> None:
    output.table(
        ("size", "kind", "written", "repository", "file"),
        [(format_bytes(f.size), f.kind, format_age(f.age_s), f.repo, f.path.name) for f in files],
        right="r",
    )


def prune(
    invocation: Invocation,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
) -> PruneResult:
    """Delete unfinished downloads, unused blobs, saved prefixes.

    Downloads that run now are left alone. A conversation whose prefix is gone is read again.
    """
    from llmrun.cli.prefixes import open_store

    store, output = invocation.services.store(), invocation.output
    orphans = store.orphans()
    prefixes = open_store(invocation)
    saved, now = prefixes.list(), invocation.services.now()
    files = (
        *(PruneRow(o.path, o.repo, o.kind, o.n_bytes, o.age_s) for o in orphans),
        *(PruneRow(s.path, s.title, "prefix", s.n_bytes, max(0.0, now - s.used_s)) for s in saved),
    )
    total = sum(file.size for file in files)
    if not files or dry_run:
        return PruneResult(files, total, 0, dry_run)
    n_partial = sum(file.kind == "partial" for file in files)
    question = (
        f"Delete {len(files)} files ({format_bytes(total)}), "
        f"{n_partial} of them unfinished downloads, {len(saved)} saved prefixes?"
    )
    agreed = output.confirm(question, agreeing="llmrun prune --yes")
    freed = store.prune(orphans) + prefixes.remove(saved) if agreed else 0
    return PruneResult(files, total, freed, False)


def add_to(app: typer.Typer) -> None:
    register(app, "prune", prune)
