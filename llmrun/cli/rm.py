"""`llmrun rm`: delete stored models, one quant at a time."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from llmrun.cli.options import Invocation, complete_stored, register
from llmrun.text import format_bytes
from llmrun.ui.output import Output

if TYPE_CHECKING:
    from llmrun.hub.types import StoredModel


@dataclass(frozen=True, slots=True)
class RemovedRow:
    model: str
    size: int
    state: str


@dataclass(frozen=True, slots=True)
class RemoveResult:
    """`freed` may be less than the sizes: blobs that other models share stay."""

    models: tuple[RemovedRow, ...]
    freed: int

    def show(self, output: Output) -> None:
        for row in self.models:
            output.note(f"removed {row.model}")
        if not self.models:
            output.note("nothing removed")
        else:
            output.note(f"{format_bytes(self.freed)} freed")


def rm(
    invocation: Invocation,
    models: Annotated[
        list[str],
        typer.Argument(
            help="Models as `llmrun list` shows them, or catalog names.",
            metavar="MODEL",
            autocompletion=complete_stored,
            show_default=False,
        ),
    ],
    all_: Annotated[
        bool, typer.Option("--all", help="Every quant of the named repository.")
    ] = False,
) -> RemoveResult:
    """Delete models from this machine. Asks first."""
    from llmrun.cli.stored import find_stored, require_one

    chosen: dict[tuple[str, str], StoredModel] = {}
    for text in models:
        found = find_stored(invocation, text)
        if not all_:
            require_one(text, found, "llmrun rm")
        chosen.update({(model.reference, model.state): model for model in found})
    rows = tuple(RemovedRow(m.reference, m.n_bytes, m.state) for m in chosen.values())
    total = format_bytes(sum(row.size for row in rows))
    names = ", ".join(row.model for row in rows)
    words = [*(["--all"] if all_ else []), "--yes", *models]
    question = f"Remove {names} ({total})?"
    if not invocation.output.confirm(question, agreeing=f"llmrun rm {shlex.join(words)}"):
        return RemoveResult((), 0)
    return RemoveResult(rows, invocation.services.store().remove(chosen.values()))


def add_to(app: typer.Typer) -> None:
    register(app, "rm", rm)
