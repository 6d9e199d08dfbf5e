"""`llmrun verify`: hash every file again and compare, offline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmrun.cli.options import Invocation, Outcome, StoredModelsArgument, register
from llmrun.cli.stored import get_again
from llmrun.errors import DamagedFileError, GgufError, LlmrunError
from llmrun.text import escape_line, format_bytes
from llmrun.ui.output import Failed, Output

if TYPE_CHECKING:
    import typer

    from llmrun.hub.store import VerifyResult as FileResult
    from llmrun.hub.types import StoredModel


@dataclass(frozen=True, slots=True)
class VerifiedFile:
    """`ok` is null where no hash is known. `actual` is null for a file that cannot be read."""

    path: str
    local_path: Path
    size: int
    expected: str | None
    actual: str | None
    ok: bool | None


@dataclass(frozen=True, slots=True)
class VerifiedModel:
    """`header` says what is wrong with the GGUF header, null when it is sound."""

    model: str
    ok: bool
    header: str | None
    files: tuple[VerifiedFile, ...]


@dataclass(frozen=True, slots=True)
class VerifyResult:
    models: tuple[VerifiedModel, ...]

    def show(self, output: Output) -> None:
        for model in self.models:
            output.line(f"{'ok     ' if model.ok else 'DAMAGED'}  {model.model}")
            for file in model.files:
                if file.ok is None:
                    output.note(f"  {escape_line(file.path)}: no hash is known for it")
        if not self.models:
            output.note("nothing to verify")


def verify(invocation: Invocation, models: StoredModelsArgument = None) -> Outcome:
    """Hash stored models again and compare.

    All models if none is named. Uses no network.
    """
    from llmrun.cli.stored import find_stored

    store = invocation.services.store()
    if models:
        chosen = [model for text in models for model in find_stored(invocation, text)]
    else:
        chosen = list(store.models())
    rows: list[VerifiedModel] = []
    errors: list[LlmrunError] = []
    for model in dict.fromkeys(chosen):
        if model.state == "partial":
            invocation.output.note(f"{model.reference}: unfinished, skipped")
            continue
        invocation.output.note(f"hashing {model.reference} ({format_bytes(model.n_bytes)})")
        row = _row(model, store.verify(model))
        rows.append(row)
        if not row.ok:
            errors.append(_error(row))
    result = VerifyResult(tuple(rows))
    return Failed(result, tuple(errors)) if errors else result


def _row(model: StoredModel, results: tuple[FileResult, ...]) -> VerifiedModel:
    files = tuple(
        VerifiedFile(r.file.path, r.file.local_path, r.file.n_bytes, r.expected, r.actual, r.ok)
        for r in results
    )
    header = _header_fault(model)
    is_ok = header is None and all(file.ok is not False for file in files)
    return VerifiedModel(model.reference, is_ok, header, files)


def _header_fault(model: StoredModel) -> str | None:
    from llmrun.gguf.info import find_shards, read_info

    try:
        read_info(find_shards(model.files[0].local_path), thorough=True)
    except GgufError as error:
        return f"{error.message}: {error.why}" if error.why else error.message
    except LlmrunError as error:
        return error.message
    return None


def _error(row: VerifiedModel) -> DamagedFileError:
    bad = [file for file in row.files if file.ok is False]
    if not bad:
        why = row.header
    elif bad[0].actual is None:
        why = f"{bad[0].path} is not there or cannot be read"
    else:
        why = f"{bad[0].path} should have sha256 {bad[0].expected}, but has {bad[0].actual}"
    return DamagedFileError(
        f"{row.model} is damaged",
        why=why,
        hint=get_again(row.model),
    )


def add_to(app: typer.Typer) -> None:
    register(app, "verify", verify)
