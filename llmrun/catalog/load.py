"""Reading `catalog.toml`. Strict: a key or value that is not understood is an error, so that a slip
in the file fails a test and never reaches a user.

    [sources]        id = "who published it"
    [family.NAME]    thinking, tool_format, sampling, sampling_plain, sampling_tools, note,
                     unverified
    [model.NAME]     the fields of CatalogEntry; what a family gives, all its models have
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any, NoReturn, TypeVar, get_args

from llmrun.catalog.entries import (
    Capability,
    Catalog,
    CatalogEntry,
    Companion,
    Pooling,
    PublishedMemory,
    Sampling,
    Thinking,
)
from llmrun.hub.types import BundledSpec

T = TypeVar("T")

_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_ALIAS = re.compile(r"[a-z0-9][a-z0-9.+-]*(?::[a-z0-9.-]+)?")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HEX = re.compile(r"[0-9a-f]{8,64}")


@lru_cache(maxsize=1)
def load_catalog() -> Catalog:
    """The catalog that ships with llmrun, read once. Raises ValueError when the file is wrong."""
    return parse_catalog((files("llmrun.catalog") / "catalog.toml").read_text(encoding="utf-8"))


def parse_catalog(text: str) -> Catalog:
    """A catalog from TOML text. Raises ValueError that names the table and key at fault."""
    document = _Table("the catalog", tomllib.loads(text))
    sources = document.take("sources", dict, {})
    families = document.take("family", dict, {})
    models = document.take("model", dict, {})
    document.end()
    family_fields = {name: _read_family(name, table) for name, table in families.items()}
    return Catalog(_read_model(name, t, family_fields, sources) for name, t in models.items())


class _Table:
    """A TOML table of which every key must be taken once."""

    def __init__(self, where: str, values: object) -> None:
        self._where = where
        if not isinstance(values, dict):
            self.fail("is not a table")
        self._values: dict[str, Any] = dict(values)

    def fail(self, what: str) -> NoReturn:
        raise ValueError(f"{self._where}: {what}")

    def take(self, key: str, kind: type[T], default: T) -> T:
        value = self._values.pop(key, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.fail(f"{key} should be of type {kind.__name__}")
        return value

    def optional(self, key: str, kind: type[T]) -> T | None:
        return self.take(key, kind, None) if key in self._values else None

    def need(self, key: str, kind: type[T]) -> T:
        value = self.optional(key, kind)
        if value is None:
            self.fail(f"{key} is missing")
        return value

    def number(self, key: str) -> float | None:
        if key not in self._values:
            return None
        value = self._values.pop(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            self.fail(f"{key} should be a number that is not negative")
        return float(value)

    def count(self, key: str) -> int | None:
        value = self.optional(key, int)
        if value is not None and value <= 0:
            self.fail(f"{key} should be above zero")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        values = self.take(key, list, [])
        if not all(isinstance(value, str) for value in values):
            self.fail(f"{key} should hold strings")
        return tuple(values)

    def matching(self, key: str, pattern: re.Pattern[str]) -> str | None:
        value = self.optional(key, str)
        if value is not None and pattern.fullmatch(value) is None:
            self.fail(f"{key} is malformed")
        return value

    def child(self, key: str) -> _Table | None:
        if key not in self._values:
            return None
        return _Table(f"{self._where}, {key}", self._values.pop(key))

    def end(self) -> None:
        if self._values:
            self.fail(f"unknown key {sorted(self._values)[0]!r}")


def _read_family(name: str, values: object) -> dict[str, Any]:
    table = _Table(f"family {name}", values)
    note = table.optional("note", str)
    fields = {
        "family": name,
        "thinking": _read_thinking(table.child("thinking")),
        "tool_format": table.optional("tool_format", str),
        "sampling": _read_sampling(table.child("sampling")),
        "sampling_plain": _read_sampling(table.child("sampling_plain")),
        "sampling_tools": _read_sampling(table.child("sampling_tools")),
        "unverified": frozenset(table.strings("unverified")),
        "notes": () if note is None else (note,),
    }
    table.end()
    return fields


def _read_model(
    name: str, values: object, families: Mapping[str, Mapping[str, Any]], sources: Mapping[str, str]
) -> CatalogEntry:
    table = _Table(f"model {name}", values)
    if _NAME.fullmatch(name) is None:
        table.fail("malformed name")
    family = families.get(table.need("family", str))
    if family is None:
        table.fail("unknown family")
    shared = dict(family)
    note = table.optional("note", str)
    notes = shared.pop("notes") + (() if note is None else (note,))
    unverified = shared.pop("unverified") | frozenset(table.strings("unverified"))

    if stray := unverified - set(_VERIFIABLE):
        table.fail(f"unverified names no field: {sorted(stray)[0]!r}")

    capabilities = table.strings("capabilities")
    if unknown := set(capabilities) - set(get_args(Capability)):
        table.fail(f"unknown capability {sorted(unknown)[0]!r}")
    if "thinking" in capabilities and shared["thinking"] is None:
        table.fail("a thinking model needs thinking tags")
    pooling = table.optional("pooling", str)
    if pooling is not None and pooling not in get_args(Pooling):
        table.fail("unknown pooling")
    aliases = table.strings("aliases")
    if not all(_ALIAS.fullmatch(alias) for alias in aliases):
        table.fail("malformed alias")
    memory = []
    for row in table.take("memory", list, []):
        match row:
            case [str(quant), int(gb) | float(gb), str(source)] if source in sources:
                memory.append(PublishedMemory(quant, float(gb), sources[source]))
            case _:
                table.fail(f"malformed memory row {row!r}")
    min_memory_gb = table.number("min_memory_gb")
    min_memory_source = table.optional("min_memory_source", str)
    if (min_memory_gb is None) != (min_memory_source is None):
        table.fail("min_memory_gb and min_memory_source belong together")
    if min_memory_source is not None and min_memory_source not in sources:
        table.fail("unknown min_memory_source")
    sizes = table.take("sizes", dict, {})
    if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        table.fail("malformed sizes")

    entry = CatalogEntry(
        **shared,
        name=name,
        title=table.need("title", str),
        aliases=aliases,
        also=table.strings("also"),
        repo=table.matching("repo", _REPO) or table.fail("repo is missing"),
        file=table.optional("file", str),
        quant=table.need("quant", str),
        n_bytes=table.count("n_bytes"),
        approximate=table.take("approximate", bool, False),
        sizes=sizes,
        revision=table.matching("revision", _HEX),
        sha256=table.matching("sha256", _HEX),
        n_params=table.count("params"),
        n_params_active=table.count("active"),
        n_ctx=table.count("context"),
        licence=table.need("licence", str),
        capabilities=capabilities,  # type: ignore[arg-type]  # checked against the Literal above
        min_memory_gb=min_memory_gb,
        min_memory_source=None if min_memory_source is None else sources[min_memory_source],
        memory_note=table.optional("memory_note", str),
        memory=tuple(memory),
        pooling=pooling,  # type: ignore[arg-type]  # checked against the Literal above
        n_embd=table.count("n_embd"),
        query_prefix=table.optional("query_prefix", str),
        document_prefix=table.optional("document_prefix", str),
        projector=_read_companion(table.child("projector")),
        drafter=_read_companion(table.child("drafter")),
        bundled=_read_bundled(name, table.child("bundled")),
        unverified=frozenset(_VERIFIABLE[field] for field in unverified),
        source=table.optional("source", str),
        notes=notes,
    )
    table.end()
    return entry


# What `unverified` may name in the file, and the field of CatalogEntry that it means.
_VERIFIABLE = {
    "file": "file",
    "n_bytes": "n_bytes",
    "params": "n_params",
    "active": "n_params_active",
    "context": "n_ctx",
    "licence": "licence",
    "pooling": "pooling",
    "n_embd": "n_embd",
    "thinking": "thinking",
    "tool_format": "tool_format",
    "min_memory_gb": "min_memory_gb",
    "drafter": "drafter",
}


def _read_sampling(table: _Table | None) -> Sampling | None:
    if table is None:
        return None
    sampling = Sampling(
        temperature=table.number("temperature"),
        top_p=table.number("top_p"),
        top_k=table.optional("top_k", int),
        min_p=table.number("min_p"),
        repeat_penalty=table.number("repeat_penalty"),
        source=table.optional("source", str),
        unverified=table.take("unverified", bool, False),
    )
    if sampling.source is None and not sampling.unverified:
        table.fail("sampling needs a source, or the mark unverified")
    table.end()
    return sampling


def _read_thinking(table: _Table | None) -> Thinking | None:
    if table is None:
        return None
    default = table.take("default", str, "on")
    if default not in ("on", "off"):
        table.fail("default should be on or off")
    thinking = Thinking(
        start=table.need("start", str),
        end=table.need("end", str),
        kwarg=table.optional("kwarg", str),
        levels=table.strings("levels"),
        default_on=default == "on",
    )
    table.end()
    return thinking


def _read_companion(table: _Table | None) -> Companion | None:
    if table is None:
        return None
    companion = Companion(
        repo=table.matching("repo", _REPO) or table.fail("repo is missing"),
        file=table.need("file", str),
        n_bytes=table.count("n_bytes"),
        approximate=table.take("approximate", bool, False),
        sha256=table.matching("sha256", _HEX),
        kind=table.optional("kind", str),
    )
    table.end()
    return companion


def _read_bundled(name: str, table: _Table | None) -> BundledSpec | None:
    if table is None:
        return None
    spec = BundledSpec(
        requirement=table.need("requirement", str),
        member=table.need("member", str),
        sha256=table.matching("sha256", re.compile(r"[0-9a-f]{64}")) or table.fail("no sha256"),
        n_bytes=table.count("n_bytes") or table.fail("no n_bytes"),
        name=name,
    )
    table.end()
    return spec
