"""`llmrun bench`: how fast a model is here, and what makes it so."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from llmrun.cli.bench_result import (
    BenchCompareResult,
    BenchHistoryResult,
    compare_row,
    difference_row,
)
from llmrun.cli.bench_session import Session, Sizes
from llmrun.cli.options import Invocation, Outcome, complete_model, register
from llmrun.errors import UsageError

_MAX_REPEATS = 100


def bench(
    invocation: Invocation,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] | history | compare A B",
            help="The model (without one: as chat does); or what to do with earlier runs, which "
            "are named by id, or as last, last~1, and so on.",
            autocompletion=complete_model,
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[
        str | None,
        typer.Option("--repeats", metavar="N", help="Measure everything so often. [default: 3]"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Less of everything: a first impression.")
    ] = False,
    what_pays: Annotated[
        bool,
        typer.Option("--what-pays", help="What each optimization buys here, off and on in turns."),
    ] = False,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Search the fastest settings and keep them for run, chat and serve."
        ),
    ] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print the results as CSV.")] = False,
    md: Annotated[bool, typer.Option("--md", help="Print the results as Markdown.")] = False,
    report: Annotated[
        str | None,
        typer.Option("--report", metavar="FILE.html", help="Write a page with charts."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="BASE",
            help="Measure a server of the OpenAI protocol; with a MODEL, that beside it.",
        ),
    ] = None,
    served_model: Annotated[
        str | None,
        typer.Option("--served-model", metavar="NAME", help="The model to ask the server for."),
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(
            "--api-key-env", metavar="NAME", help="The variable that holds the server's key."
        ),
    ] = None,
) -> Outcome:
    """Measure speed, latency and memory of a model here. Earlier runs are kept: see history."""
    settings = invocation.settings
    if sum((settings.json, csv, md)) > 1:
        raise UsageError("--json, --csv and --md: only one can be printed")
    if what_pays and tune:
        raise UsageError("--what-pays and --tune are two runs", hint="llmrun bench --tune")
    words = list(words or ())
    if words[:1] in (["history"], ["compare"]):
        if csv or md or report or url or tune or what_pays or quick or repeats:
            raise UsageError(f"bench {words[0]} measures nothing: it takes no such option")
        return (
            _show_history(invocation, words[1:])
            if words[0] == "history"
            else _compare(invocation, words[1:])
        )
    if len(words) > 1:
        raise UsageError("bench measures one model at a time", hint=f"llmrun bench {words[0]}")
    if url is None and (served_model or api_key_env):
        raise UsageError("--served-model and --api-key-env go with --url")
    if url is not None and (what_pays or tune):
        raise UsageError(
            "a server's settings are its own: --url goes with no --what-pays or --tune"
        )
    page = None if report is None else _check_report(report)
    sizes = Sizes(quick, _read_repeats(repeats))
    session = Session(invocation, sizes, csv=csv, md=md, page=page)
    if url is None or words:
        text = words[0] if words else _default_model(invocation)
        if what_pays:
            session.measure_what_pays(text)
        elif tune:
            session.tune(text)
        else:
            session.measure(text)
    if url is not None and session.problem is None:
        session.measure_server(url, served_model, _read_key(invocation, api_key_env))
    return session.finish()


def _default_model(invocation: Invocation) -> str:
    from llmrun.cli.chat import default_model

    return default_model(invocation)


def _read_repeats(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_REPEATS:
        raise UsageError(f"--repeats: {text!r} is not a whole number from 1 to {_MAX_REPEATS}")
    return int(text)


def _read_key(invocation: Invocation, name: str | None) -> str | None:
    if name is None:
        return None
    key = invocation.environment.environ.get(name, "")
    if not key:
        raise UsageError(f"--api-key-env: the variable {name} is not set")
    return key


def _check_report(text: str) -> Path:
    """Fail before minutes are spent on measuring. Raises UsageError."""
    path = Path(text).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--report: {text} is not a place for a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"--report: {text} cannot be written")
    return path


# ---- earlier runs


def _show_history(invocation: Invocation, words: Sequence[str]) -> BenchHistoryResult:
    from llmrun.bench.history import History
    from llmrun.bench.record import to_dict

    invocation.output.command = "bench history"
    if len(words) > 1:
        raise UsageError("bench history takes one model at most", hint="llmrun bench history")
    history = History(invocation.environment.state_dir, invocation.output.warn)
    runs = history.list(words[0] if words else None)
    return BenchHistoryResult(tuple(to_dict(run) for run in runs))


def _compare(invocation: Invocation, words: Sequence[str]) -> BenchCompareResult:
    from llmrun.bench.compare import compare, find_differences
    from llmrun.bench.history import History
    from llmrun.bench.record import to_dict

    invocation.output.command = "bench compare"
    if len(words) != 2:
        raise UsageError("bench compare takes two runs", hint="llmrun bench compare last~1 last")
    history = History(invocation.environment.state_dir, invocation.output.warn)
    a, b = history.get(words[0]), history.get(words[1])
    return BenchCompareResult(
        to_dict(a),
        to_dict(b),
        tuple(compare_row(row) for row in compare(a, b)),
        tuple(difference_row(each) for each in find_differences(a, b)),
    )


def add_to(app: typer.Typer) -> None:
    register(app, "bench", bench, "hub", "load", "streams")
