"""`llmrun pull`: models onto this machine, judged first, verified always."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmrun.cli.options import Invocation, ModelsArgument, Outcome, register
from llmrun.errors import LlmrunError
from llmrun.text import format_bytes
from llmrun.ui.output import Failed, Output

if TYPE_CHECKING:
    from llmrun.cli.acquire import Acquired
    from llmrun.fit.plan import Plan


@dataclass(frozen=True, slots=True)
class FileRow:
    """`path` is the name in the repository, or the file's own. `sha256` may not be known."""

    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class FitData:
    """`verdict`: fits, tight, partly_on_cpu, cpu_only or no. Bytes of memory; 0 free: not known.
    `source` is where the figures come from: exact, formula or filesize. `tok_s` is the forecast of
    tokens a second, [low, high], or null."""

    verdict: str
    n_ctx: int
    needed_bytes: int
    available_bytes: int
    source: str
    tok_s: tuple[float, float] | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PulledModel:
    """`path` is the first file's. `downloaded` is False when it was here before."""

    model: str
    path: Path
    files: tuple[FileRow, ...]
    size: int
    quant: str | None
    commit: str | None
    origin: str
    downloaded: bool
    fit: FitData


@dataclass(frozen=True, slots=True)
class PullResult:
    models: tuple[PulledModel, ...]

    def show(self, output: Output) -> None:
        for model in self.models:
            what = "downloaded" if model.downloaded else "already here"
            output.note(f"{what}: {model.model} ({format_bytes(model.size)})")
            output.line(str(model.path))


def pull(
    invocation: Invocation,
    models: ModelsArgument,
    projector: Annotated[
        bool,
        typer.Option("--projector", help="Also the projector for images, if there is one."),
    ] = False,
) -> Outcome:
    """Download models, checked and resumable.

    An interrupted download goes on where it stopped; every file's sha256 is compared.
    """
    from llmrun.cli.acquire import acquire, wishes_of
    from llmrun.cli.judge import describe_fit
    from llmrun.cli.measure import with_forecast

    wishes = wishes_of(invocation.settings)
    pulled: list[PulledModel] = []
    errors: list[LlmrunError] = []
    for text in models:
        try:
            acquired = acquire(
                invocation,
                text,
                wishes,
                prefer_cache=False,
                events=True,
                projector=projector,
                draft=False,
            )
        except LlmrunError as error:
            errors.append(error)
            continue
        except KeyboardInterrupt:
            invocation.output.note("stopped; the same command again goes on from here")
            raise
        made = with_forecast(invocation, acquired.machine, acquired.info, acquired.plan)
        if not acquired.was_downloaded:
            invocation.output.note(describe_fit(made))
        for reason in made.reasons:
            invocation.output.detail(reason)
        pulled.append(_row(acquired, made))
    result = PullResult(tuple(pulled))
    return Failed(result, tuple(errors)) if errors else result


def _row(acquired: Acquired, made: Plan) -> PulledModel:
    resolved = acquired.resolved
    return PulledModel(
        model=resolved.reference,
        path=acquired.paths[0],
        files=tuple(FileRow(file.path, file.n_bytes, file.sha256) for file in resolved.files),
        size=acquired.info.n_bytes,
        quant=resolved.quant or acquired.info.quant,
        commit=resolved.commit,
        origin=resolved.origin,
        downloaded=acquired.was_downloaded,
        fit=fit_data(made),
    )


def fit_data(made: Plan) -> FitData:
    speed = made.forecast
    return FitData(
        verdict=made.verdict,
        n_ctx=made.n_ctx,
        needed_bytes=made.placement.total_bytes,
        available_bytes=made.available_bytes,
        source=made.source,
        tok_s=None if speed is None else (round(speed.low, 1), round(speed.high, 1)),
        reasons=made.reasons,
    )


def add_to(app: typer.Typer) -> None:
    register(app, "pull", pull, "hub", "load")
