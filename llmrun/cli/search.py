"""`llmrun search`: repositories with GGUF files on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from llmrun.cli.options import Invocation, register
from llmrun.errors import HubUnreachableError
from llmrun.text import format_bytes, format_count
from llmrun.ui.output import Output


@dataclass(frozen=True, slots=True)
class QuantRow:
    quant: str
    size: int | None


@dataclass(frozen=True, slots=True)
class SearchRow:
    repo: str
    downloads: int
    likes: int
    updated: str | None
    params: int | None
    architecture: str | None
    context: int | None
    gated: bool
    quants: tuple[QuantRow, ...]


@dataclass(frozen=True, slots=True)
class SearchResult:
    repos: tuple[SearchRow, ...]

    def show(self, output: Output) -> None:
        if not self.repos:
            output.note("nothing found")
            return
        output.table(
            ("repository", "downloads", "parameters", "updated", "sizes"),
            [
                (
                    row.repo + (" (gated)" if row.gated else ""),
                    str(row.downloads),
                    format_count(row.params) if row.params else "-",
                    row.updated or "-",
                    _sizes(row.quants),
                )
                for row in self.repos
            ],
            right=" rr",
        )
        output.note(f"next: llmrun show {self.repos[0].repo}")


def _sizes(quants: tuple[QuantRow, ...]) -> str:
    """The smallest and the largest, and the usual one."""
    known = sorted((row.size, row.quant) for row in quants if row.size)
    if not known:
        return ", ".join(row.quant for row in quants[:3]) or "-"
    usual = [pair for pair in known if pair[1].endswith("Q4_K_M")]
    shown = dict.fromkeys([known[0], *usual[:1], known[-1]])
    text = ", ".join(f"{quant} {format_bytes(size)}" for size, quant in shown)
    rest = len(known) - len(shown)
    return f"{text} (+{rest})" if rest else text


def search(
    invocation: Invocation,
    text: Annotated[list[str], typer.Argument(metavar="TEXT", help="Words to look for.")],
    limit: Annotated[int, typer.Option("--limit", min=1, max=100, help="At most so many.")] = 10,
) -> SearchResult:
    """Search the hub for repositories with GGUF files."""
    if invocation.settings.offline:
        raise HubUnreachableError("offline: nothing can be searched for", hint="llmrun list")
    hits = invocation.services.hub(offline=False).search(" ".join(text), limit)
    return SearchResult(
        tuple(
            SearchRow(
                repo=hit.repo,
                downloads=hit.n_downloads,
                likes=hit.n_likes,
                updated=hit.updated,
                params=hit.n_params,
                architecture=hit.architecture,
                context=hit.n_ctx_train,
                gated=hit.gated,
                quants=tuple(QuantRow(quant, size) for quant, size in hit.quants),
            )
            for hit in hits
        )
    )


def add_to(app: typer.Typer) -> None:
    register(app, "search", search, "hub")
