"""`llmrun show`: all about one model, on disk or on the hub, without downloading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llmrun.cli.options import Invocation, ModelArgument, register
from llmrun.cli.pull import FileRow
from llmrun.text import format_bytes, format_count
from llmrun.ui.output import Output

if TYPE_CHECKING:
    from llmrun.catalog.entries import CatalogEntry
    from llmrun.catalog.types import Resolved
    from llmrun.gguf.types import ModelInfo


@dataclass(frozen=True, slots=True)
class MixRow:
    type: str
    size: int


@dataclass(frozen=True, slots=True)
class RequirementRow:
    """A published figure: GB (10^9 bytes) of memory, and who says so."""

    quant: str | None
    memory_gb: float
    source: str


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """A model of the same repository that can be had with a tag."""

    tag: str
    size: int


@dataclass(frozen=True, slots=True)
class ShowResult:
    """`path` is the local path of the first file, or null. Header facts are null where the header
    does not give them or is not here yet. `unverified` names catalog facts that rest on general
    knowledge."""

    model: str
    title: str
    path: Path | None
    files: tuple[FileRow, ...]
    size: int
    origin: str
    repo: str | None
    commit: str | None
    quant: str | None
    quant_mix: tuple[MixRow, ...]
    architecture: str | None
    kind: str | None
    params: int | None
    params_active: int | None
    layers: int | None
    context: int | None
    embedding: int | None
    vocabulary: int | None
    sliding_window: int | None
    experts: int | None
    experts_used: int | None
    has_template: bool | None
    capabilities: tuple[str, ...]
    licence: str | None
    gated: bool
    sampling: dict[str, float | int]
    requirements: tuple[RequirementRow, ...]
    projector: FileRow | None
    drafter: FileRow | None
    alternatives: tuple[ChoiceRow, ...]
    unverified: tuple[str, ...]
    notes: tuple[str, ...]

    def show(self, output: Output) -> None:
        output.line(self.title)
        rows = [(name, text) for name, text in self._facts() if text]
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            first, *rest = text.split("\n")
            output.line(f"  {name:<{width}}  {first}")
            for line in rest:
                output.line(f"  {'':<{width}}  {line}")

    def _facts(self) -> list[tuple[str, str]]:
        def count(value: int | None) -> str:
            return format_count(value) if value else ""

        active = f", {count(self.params_active)} active" if self.params_active else ""
        experts = f"{self.experts}, {self.experts_used} used" if self.experts else ""
        has_template = {True: "yes", False: "no: `run` completes plain text", None: ""}
        return [
            ("model", self.model),
            ("path", str(self.path) if self.path else "not downloaded"),
            ("architecture", self.architecture or ""),
            ("parameters", count(self.params) + active if self.params else ""),
            ("layers", str(self.layers) if self.layers else ""),
            ("experts", experts),
            ("context", f"{self.context} tokens" if self.context else ""),
            ("window", f"{self.sliding_window} tokens" if self.sliding_window else ""),
            ("quant", self.quant or ""),
            ("mix", ", ".join(f"{row.type} {format_bytes(row.size)}" for row in self.quant_mix)),
            ("size", format_bytes(self.size)),
            ("template", has_template[self.has_template]),
            ("can", ", ".join(self.capabilities)),
            ("sampling", ", ".join(f"{k} {v:g}" for k, v in self.sampling.items())),
            ("licence", (self.licence or "") + (" (gated)" if self.gated else "")),
            ("memory", "\n".join(_requirement_line(row) for row in self.requirements)),
            ("repository", self.repo or ""),
            ("commit", self.commit or ""),
            ("files", "\n".join(_file_line(file) for file in self.files)),
            ("projector", _file_line(self.projector) if self.projector else ""),
            ("drafter", _file_line(self.drafter) if self.drafter else ""),
            ("quants", _choices_line(self.alternatives)),
            ("unverified", ", ".join(self.unverified)),
            ("note", "\n".join(self.notes)),
        ]


def _requirement_line(row: RequirementRow) -> str:
    what = f"{row.quant}: " if row.quant else ""
    return f"{what}{row.memory_gb:g} GB ({row.source})"


def _choices_line(rows: tuple[ChoiceRow, ...]) -> str:
    return ", ".join(f"{r.tag} {format_bytes(r.size)}" for r in rows) if len(rows) > 1 else ""


def _file_line(file: FileRow) -> str:
    return f"{file.path}  {format_bytes(file.size)}" + (
        f"  sha256 {file.sha256}" if file.sha256 else ""
    )


def show(invocation: Invocation, model: ModelArgument) -> ShowResult:
    """Show all about a model, without downloading it."""
    from llmrun.cli.acquire import read_model_info, resolve_model

    resolved = resolve_model(invocation, model)
    return _describe(resolved, read_model_info(invocation, resolved))


def _describe(resolved: Resolved, info: ModelInfo | None) -> ShowResult:
    entry = resolved.entry
    return ShowResult(
        model=resolved.reference,
        title=resolved.title,
        path=resolved.local_paths[0] if resolved.local_paths else None,
        files=tuple(FileRow(file.path, file.n_bytes, file.sha256) for file in resolved.files),
        size=resolved.n_bytes,
        origin=resolved.origin,
        repo=resolved.repo,
        commit=resolved.commit,
        quant=resolved.quant or (info.quant if info else None),
        quant_mix=tuple(MixRow(name, size) for name, size in info.quant_mix) if info else (),
        architecture=info.architecture if info else None,
        kind=info.kind if info else None,
        params=info.n_params if info else (entry.n_params if entry else None),
        params_active=entry.n_params_active if entry else None,
        layers=info.n_layers if info else None,
        context=info.n_ctx_train if info else (entry.n_ctx if entry else None),
        embedding=info.n_embd if info else None,
        vocabulary=info.n_vocab if info else None,
        sliding_window=info.n_swa if info else None,
        experts=info.n_expert if info else None,
        experts_used=info.n_expert_used if info else None,
        has_template=bool(info.chat_template) if info else None,
        capabilities=entry.capabilities if entry else (),
        licence=resolved.licence
        or (info.licence if info else None)
        or (entry.licence if entry else None),
        gated=resolved.gated,
        sampling=_sampling(info, entry),
        requirements=_requirements(entry),
        projector=_companion(resolved.projector),
        drafter=_companion(resolved.drafter),
        alternatives=tuple(ChoiceRow(c.label, c.n_bytes) for c in resolved.alternatives),
        unverified=tuple(sorted(entry.unverified)) if entry else (),
        notes=entry.notes if entry else (),
    )


def _companion(file: object) -> FileRow | None:
    from llmrun.hub.types import RemoteFile

    return FileRow(file.path, file.n_bytes, file.sha256) if isinstance(file, RemoteFile) else None


def _sampling(info: ModelInfo | None, entry: CatalogEntry | None) -> dict[str, float | int]:
    """The recommended values: what the header says wins over the catalog."""
    from llmrun.cli.sampling import recommended_sampling

    return recommended_sampling(info, entry)


def _requirements(entry: CatalogEntry | None) -> tuple[RequirementRow, ...]:
    if entry is None:
        return ()
    rows = [RequirementRow(row.quant, row.gb, row.source) for row in entry.memory]
    if entry.min_memory_gb is not None:
        rows.insert(0, RequirementRow(None, entry.min_memory_gb, entry.min_memory_source or ""))
    return tuple(rows)


def add_to(app: typer.Typer) -> None:
    register(app, "show", show, "hub")
