"""What the catalog knows about a model. Data only; `load.py` fills it from `catalog.toml`.

Every figure here is a first guess for display and for use without a network: the hub's listing and
the file's header win over it. Names in `unverified` are fields that rest on general knowledge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmrun.catalog.keys import model_key
from llmrun.hub.types import BundledSpec

Capability = Literal["tools", "vision", "audio", "thinking", "embedding", "rerank"]
Pooling = Literal["none", "mean", "cls", "last", "rank"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Recommended sampling. None means that the source says nothing about it."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    source: str | None = None
    unverified: bool = False


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a family marks its thinking. Whether an answer *starts* inside is not stored: it is read
    from the rendered prompt (an unclosed `start` at its end).

    `kwarg` is the template argument that switches it, a bool, or one of `levels` when there are
    any. `default_on`: what the template does when the argument is not passed.
    """

    start: str
    end: str
    kwarg: str | None = None
    levels: tuple[str, ...] = ()
    default_on: bool = True


@dataclass(frozen=True, slots=True)
class PublishedMemory:
    """Somebody's published figure: GB (10^9 bytes) to run `quant`, and who said it."""

    quant: str
    gb: float
    source: str


@dataclass(frozen=True, slots=True)
class Companion:
    """A projector or drafter that belongs to a model. `sha256` is a prefix. `kind` is set for
    drafters only ("mtp")."""

    repo: str
    file: str
    n_bytes: int | None = None
    approximate: bool = False
    sha256: str | None = None
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model.

    `file` is the default file in `repo` (None when its name is not known) and `quant` its tag.
    `n_bytes` is that file's size, None when unknown and rounded when `approximate`; `sizes` gives
    other quants of the same repo. `also` are names that other converters give the files.
    `revision` and `sha256` are published prefixes of the commit and of the file's hash.
    `n_params_active` is the count used for each token (experts), for Gemma "E" models the
    published effective count. `n_ctx` is the trained context. `sampling_plain` and
    `sampling_tools` are given where thinking off or tools want other values.
    """

    name: str
    title: str
    family: str
    repo: str
    file: str | None
    quant: str
    n_bytes: int | None
    approximate: bool
    licence: str
    aliases: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    revision: str | None = None
    sha256: str | None = None
    n_params: int | None = None
    n_params_active: int | None = None
    n_ctx: int | None = None
    capabilities: tuple[Capability, ...] = ()
    min_memory_gb: float | None = None
    min_memory_source: str | None = None
    memory_note: str | None = None
    memory: tuple[PublishedMemory, ...] = ()
    sampling: Sampling | None = None
    sampling_plain: Sampling | None = None
    sampling_tools: Sampling | None = None
    thinking: Thinking | None = None
    tool_format: str | None = None
    pooling: Pooling | None = None
    n_embd: int | None = None
    query_prefix: str | None = None
    document_prefix: str | None = None
    projector: Companion | None = None
    drafter: Companion | None = None
    bundled: BundledSpec | None = None
    unverified: frozenset[str] = frozenset()
    source: str | None = None
    notes: tuple[str, ...] = ()

    def has(self, capability: Capability) -> bool:
        """Whether the model is known to do this."""
        return capability in self.capabilities

    def sampling_for(self, *, thinking: bool = True, tools: bool = False) -> Sampling | None:
        """The recommended sampling for a request with thinking on or off, with tools or without."""
        if tools and self.sampling_tools is not None:
            return self.sampling_tools
        if not thinking and self.sampling_plain is not None:
            return self.sampling_plain
        return self.sampling


class Catalog:
    """All entries, found by name, by alias, or by the file that somebody has."""

    def __init__(self, entries: Iterable[CatalogEntry]) -> None:
        """Raises ValueError when two entries claim one name, alias or repository."""
        self._entries = tuple(entries)
        self._by_name: dict[str, CatalogEntry] = {}
        self._by_repo: dict[str, CatalogEntry] = {}
        self._by_key: dict[str, CatalogEntry] | None = None
        for entry in self._entries:
            for name in (entry.name, *entry.aliases):
                if self._by_name.setdefault(name.lower(), entry) is not entry:
                    raise ValueError(f"two catalog entries are called {name!r}")
            if self._by_repo.setdefault(entry.repo.lower(), entry) is not entry:
                raise ValueError(f"two catalog entries use {entry.repo!r}")

    def entries(self) -> tuple[CatalogEntry, ...]:
        """All entries in the catalog's order."""
        return self._entries

    def names(self) -> tuple[str, ...]:
        """The main names, without aliases, in the catalog's order."""
        return tuple(entry.name for entry in self._entries)

    def all_names(self) -> tuple[str, ...]:
        """Names and aliases."""
        return tuple(name for e in self._entries for name in (e.name, *e.aliases))

    def get(self, name: str) -> CatalogEntry | None:
        """The entry with this name or alias, in any case."""
        return self._by_name.get(name.lower())

    def entry_for(self, repo: str | None, path: str | None) -> CatalogEntry | None:
        """The entry whose model this file is, whoever converted it and to whichever quant.

        Tried in turn: the very repository, the file's name, the repository's name; names are
        compared by `model_key`. `path` may be a path in a repository or a local file's name.
        """
        if repo is not None and (entry := self._by_repo.get(repo.lower())) is not None:
            return entry
        if self._by_key is None:
            self._by_key = {}
            for entry in self._entries:
                file_key = (model_key(entry.file),) if entry.file else ()
                for key in (*file_key, model_key(entry.repo), *map(model_key, entry.also)):
                    self._by_key.setdefault(key, entry)
        for name in (path, repo):
            if name is not None and (entry := self._by_key.get(model_key(name))) is not None:
                return entry
        return None
