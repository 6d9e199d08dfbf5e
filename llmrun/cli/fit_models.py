"""What `llmrun fit` looks at: the quants of a model, their headers, and llama.cpp's own figures.

The header of the usual quant is read, and those of others as long as all of them are small; the
rest are derived from it. The recommended one is read in any case, so that it is exact.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmrun.cli.acquire import (
    HEADERS_FOLDER,
    read_model_info,
    read_remote_model,
    resolve_model,
    wishes_of,
)
from llmrun.cli.judge import is_unknown
from llmrun.cli.list import format_age
from llmrun.cli.options import Invocation
from llmrun.errors import GgufError, HubUnreachableError, LlmrunError, NotFoundError, UsageError
from llmrun.text import escape_line

if TYPE_CHECKING:
    from llmrun.catalog.choose import QuantChoice
    from llmrun.catalog.entries import Catalog
    from llmrun.catalog.types import Resolved
    from llmrun.fit.plan import Wishes
    from llmrun.fit.quants import QuantOption
    from llmrun.fit.table import Table
    from llmrun.gguf.types import ModelInfo
    from llmrun.hardware.machine import Machine
    from llmrun.hub.listing_cache import RememberingLister
    from llmrun.hub.types import RepoListing

LISTINGS_FOLDER = "listings"
"""Where in the cache folder the hub's listings are kept."""

# Headers of one repository that are read unasked, in all; parsing them takes time as well.
_MAX_HEADER_BYTES = 32 << 20
# A read may bring more than the header (see `gguf.header`).
_READ_PERCENT = 140
_N_READERS = 6
# After so long the allocator is not asked about further quants, which may not be recommended.
_EXACT_S = 1.0
_MAX_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Examined:
    """A model's table. `like` is the header that derived rows come from; `references` are what to
    type for each quant, by its label. `instead` is a quant that would run where the named one does
    not, with what to type for it. `is_unknown`: this build of llama.cpp has no code for the
    model."""

    resolved: Resolved
    like: ModelInfo
    table: Table
    references: Mapping[str, str]
    notes: tuple[str, ...]
    instead: tuple[QuantChoice, str] | None = None
    is_unknown: bool = False


def examine(
    invocation: Invocation,
    text: str,
    quant: str | None,
    *,
    here: Machine,
    target: Machine,
    is_here: bool = True,
    with_projector: bool = False,
) -> Examined | Resolved:
    """The table of the model `text` for `target`, which is this machine (`is_here`) or not; `here`
    is what this machine is in any case. With a tag or a `quant` it has no other quants.

    What was resolved alone where no header can be had without a download. Raises NotFoundError,
    UsageError, AuthError, HubUnreachableError (no header is kept either) and GgufError.
    """
    lister = _make_lister(invocation)
    resolved = resolve_model(invocation, text, prefer_cache=False, hub=lister)
    notes = list(target.notes)
    if lister.age_s:
        age = format_age(lister.age_s)
        notes.append(f"the hub cannot be reached: the list of its files is from {age}")
    wanted = _named_choice(resolved, quant)
    if wanted is not None:
        choices = {wanted.label: wanted}
        preferred = wanted.label
    else:
        choices, preferred = _list_quants(resolved)
    readers = _Readers(invocation, resolved, choices, here)
    if not readers.read_first(preferred):
        return resolved
    readers.read_others(preferred)
    wishes = wishes_of(invocation.settings)
    if with_projector:
        wishes = _count_projector(resolved, wishes, notes)
    table = _make_table(readers, wishes, target, preferred)
    notes += readers.notes
    if any(row.is_derived for row in table.rows):
        notes.append(f"~ derived from the header of {readers.like_label} and the files' sizes")
    elif any(row.plan.source != "exact" for row in table.rows):
        notes.append("~ calculated, not measured by llama.cpp's own allocator")
    if is_here:
        table = _improve_speeds(invocation, table, readers, target)
    references = {label: _reference(resolved, choice) for label, choice in choices.items()}
    instead = None
    if wanted is not None and not table.pick.plan.runs:
        instead = _smaller_quant(resolved, wanted, readers.like, wishes, target)
    allocators = [option.allocator for option in readers.options()]
    return Examined(
        resolved,
        readers.like,
        table,
        references,
        tuple(dict.fromkeys(notes)),
        instead,
        is_unknown=any(each is not None and is_unknown(each) for each in allocators),
    )


def kept_headers(invocation: Invocation, catalog: Catalog) -> dict[str, ModelInfo]:
    """The headers that earlier calls left, of catalog models in their default quant, by name."""
    from llmrun.catalog.choose import list_choices, pick_default
    from llmrun.gguf.info import build_info
    from llmrun.hub.header_cache import HeaderCache
    from llmrun.hub.listing_cache import ListingCache

    listings = ListingCache(invocation.environment.cache_dir / LISTINGS_FOLDER)
    headers = HeaderCache(invocation.environment.cache_dir / HEADERS_FOLDER)
    found = {}
    for entry in catalog.entries():
        kept = listings.load(entry.repo)
        choice = pick_default(list_choices(kept.listing.files), entry) if kept else None
        if kept is None or choice is None or not choice.complete:
            continue
        raws = [headers.load(entry.repo, kept.listing.commit, file) for file in choice.files]
        whole = [raw.header for raw in raws if raw is not None]
        if len(whole) == len(choice.files):
            try:
                found[entry.name] = build_info(whole, choice.n_bytes)
            except GgufError:
                continue
    return found


@dataclass(frozen=True, slots=True)
class _Hub:
    """The invocation's hub, made when it is asked."""

    invocation: Invocation

    def listing(self, repo: str, revision: str = "main") -> RepoListing:
        hub = self.invocation.services.hub(offline=self.invocation.settings.offline)
        return hub.listing(repo, revision)


def _make_lister(invocation: Invocation) -> RememberingLister:
    from llmrun.hub.listing_cache import ListingCache, RememberingLister

    cache = ListingCache(invocation.environment.cache_dir / LISTINGS_FOLDER)
    return RememberingLister(_Hub(invocation), cache, invocation.services.now)


def _named_choice(resolved: Resolved, quant: str | None) -> QuantChoice | None:
    """The quant that the user named with `--quant` or in the reference."""
    from llmrun.catalog.choose import match_tag

    if quant is None:
        return _own_choice(resolved) if resolved.tag is not None else None
    found = match_tag(resolved.alternatives, quant, resolved.entry)
    if found is not None and resolved.tag is not None and found is not _own_choice(resolved):
        raise UsageError(
            f"two quants are named: {escape_line(resolved.tag)} and {escape_line(quant)}",
            hint=f"llmrun fit {shlex.quote(resolved.base or resolved.reference)}",
        )
    if found is None or not found.complete:
        labels = dict.fromkeys(c.label for c in resolved.alternatives if c.complete)
        shown = ", ".join(escape_line(label) for label in labels)
        raise NotFoundError(
            f"no file of {escape_line(resolved.base or resolved.reference)} is the quant "
            f"{escape_line(quant)}",
            why=f"available: {shown}",
            hint=f"llmrun fit {shlex.quote(resolved.base or resolved.reference)}",
        )
    return found


def _own_choice(resolved: Resolved) -> QuantChoice:
    return next(choice for choice in resolved.alternatives if choice.files == resolved.files)


def _list_quants(resolved: Resolved) -> tuple[dict[str, QuantChoice], str]:
    """The quants of the resolved model by label, smallest first, and the label of its own. Other
    models in the same repository are left out."""
    from llmrun.catalog.choose import match_tag
    from llmrun.catalog.keys import model_key

    own = _own_choice(resolved)
    key = model_key(own.path)
    found: dict[str, QuantChoice] = {}
    for choice in sorted(resolved.alternatives, key=lambda choice: choice.n_bytes):
        is_meant = match_tag(resolved.alternatives, choice.label, resolved.entry) is choice
        is_one = choice.complete and is_meant and model_key(choice.path) == key
        if choice is own or (is_one and choice.label != own.label):
            found[choice.label] = choice
    return found, own.label


def _smaller_quant(
    resolved: Resolved,
    wanted: QuantChoice,
    like: ModelInfo,
    wishes: Wishes,
    target: Machine,
) -> tuple[QuantChoice, str] | None:
    """The best of the model's smaller quants that would run."""
    from llmrun.fit.quants import QuantOption, choose_quant

    choices = {
        label: choice
        for label, choice in _list_quants(resolved)[0].items()
        if choice.n_bytes < wanted.n_bytes
    }
    if not choices:
        return None
    options = [QuantOption(label, choice.n_bytes) for label, choice in choices.items()]
    pick = choose_quant(target, options, wishes, preferred=options[-1].label, like=like)
    choice = choices[pick.option.label]
    return (choice, _reference(resolved, choice)) if pick.plan.runs else None


def _reference(resolved: Resolved, choice: QuantChoice) -> str:
    if choice.files == resolved.files or not resolved.base:
        return resolved.reference
    return resolved.reference_to(choice)


class _Readers:
    """Headers of a model's quants, and those who can measure them. `like` is the first one read,
    of the quant `like_label`."""

    like: ModelInfo
    like_label: str

    def __init__(
        self,
        invocation: Invocation,
        resolved: Resolved,
        choices: Mapping[str, QuantChoice],
        here: Machine,
    ) -> None:
        self._invocation, self._resolved, self._here = invocation, resolved, here
        self._choices = dict(choices)
        self._read: dict[str, QuantOption] = {}
        self.notes: list[str] = []

    def options(self) -> list[QuantOption]:
        from llmrun.fit.quants import QuantOption

        return [
            self._read.get(label) or QuantOption(label, choice.n_bytes)
            for label, choice in self._choices.items()
        ]

    def info(self, label: str) -> ModelInfo | None:
        option = self._read.get(label)
        return option.info if option is not None else None

    def read_first(self, preferred: str) -> bool:
        """Read one header, the preferred one where it can be had. False when there is none without
        a download. Raises what the preferred one raised."""
        first: LlmrunError | None = None
        others = [label for label in self._choices if label != preferred]
        for label in (preferred, *others):
            try:
                option = self._open(label)
            except HubUnreachableError as error:
                first = first or error
                continue
            if option is None:
                return False
            assert option.info is not None
            self._read[label] = option
            self.like, self.like_label = option.info, label
            return True
        assert first is not None
        raise first

    def read_others(self, preferred: str) -> None:
        """Read more headers, those nearest in size first, as long as they are small together."""
        header_bytes = self.like.header.data_offset
        left = _MAX_HEADER_BYTES - header_bytes
        n = max(0, left * 100 // (header_bytes * _READ_PERCENT))
        size = self._choices[preferred].n_bytes
        missing = [label for label in self._choices if label not in self._read]
        missing.sort(key=lambda label: abs(self._choices[label].n_bytes - size))
        with ThreadPoolExecutor(_N_READERS) as pool:
            for label, option in zip(missing, pool.map(self._try, missing[:n]), strict=False):
                if option is not None:
                    self._read[label] = option

    def read(self, label: str) -> bool:
        """Read this very header; False when it cannot be had."""
        option = self._try(label)
        if option is None:
            return False
        self._read[label] = option
        return True

    def _try(self, label: str) -> QuantOption | None:
        try:
            return self._open(label)
        except GgufError as error:
            self.notes.append(f"{label}: {error.message}: {error.why}")
        except LlmrunError as error:
            self.notes.append(f"{label} was not looked into: {error.message}")
        return None

    def _open(self, label: str) -> QuantOption | None:
        """Read the header; None for a model inside a package that is not here. Raises GgufError
        and the hub's errors."""
        from llmrun.fit.quants import QuantOption

        services, choice = self._invocation.services, self._choices[label]
        own = replace(
            self._resolved,
            files=choice.files,
            quant=choice.quant,
            local_paths=self._paths(choice),
        )
        if own.local_paths:
            info = read_model_info(self._invocation, own)
            assert info is not None
            allocator = services.allocator_of_files(own.local_paths, info, self._here)
            return QuantOption(label, choice.n_bytes, info, allocator)
        model = read_remote_model(self._invocation, own)
        if model is None:
            return None
        allocator = services.allocator_of_headers(model.headers, model.info, self._here)
        return QuantOption(label, choice.n_bytes, model.info, allocator)

    def _paths(self, choice: QuantChoice) -> tuple[Path, ...]:
        """Where the files of `choice` lie on this machine; empty when not all of them do."""
        from llmrun.hub.layout import RepoPaths

        resolved = self._resolved
        if choice.files == resolved.files:
            return resolved.local_paths
        if resolved.repo is None or resolved.commit is None or resolved.origin == "local":
            return ()
        places = RepoPaths(self._invocation.services.hub_cache, resolved.repo)
        paths = tuple(places.pointer(resolved.commit, file.path) for file in choice.files)
        for path, file in zip(paths, choice.files, strict=True):
            try:
                if path.stat().st_size != file.n_bytes:
                    return ()
            except OSError:
                return ()
        return paths


def _make_table(readers: _Readers, wishes: Wishes, target: Machine, preferred: str) -> Table:
    """The table, with the recommended quant measured if that can be."""
    from llmrun.fit.table import ask_at_once, build_rows

    options = _measure(readers.options(), wishes, target, preferred)
    table = build_rows(target, options, wishes, preferred=preferred, like=readers.like)
    for _ in range(_MAX_ROUNDS):
        picked = table.pick.option
        if picked.allocator is not None:
            break
        if readers.info(picked.label) is None and not readers.read(picked.label):
            break
        fresh = next(one for one in readers.options() if one.label == picked.label)
        ask_at_once(target, fresh, wishes)
        options = [fresh if one.label == fresh.label else one for one in options]
        table = build_rows(target, options, wishes, preferred=preferred, like=readers.like)
    return table


def _measure(
    options: Sequence[QuantOption], wishes: Wishes, target: Machine, preferred: str
) -> list[QuantOption]:
    """Have the allocators of the preferred quant and, while there is time, of the others answer.
    Options whose allocator was not asked are given back without it."""
    from llmrun.fit.table import ask_at_once

    until = time.monotonic() + _EXACT_S
    first = next(option for option in options if option.label == preferred)
    ask_at_once(target, first, wishes)

    def ask(option: QuantOption) -> QuantOption:
        if option is first or option.allocator is None:
            return option
        is_late = time.monotonic() > until
        if is_late or (first.allocator is not None and first.allocator.problem is not None):
            return replace(option, allocator=None)
        ask_at_once(target, option, wishes)
        return option

    with ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, _N_READERS))) as pool:
        return list(pool.map(ask, options))


def _count_projector(resolved: Resolved, wishes: Wishes, notes: list[str]) -> Wishes:
    from llmrun.fit.companions import companion_bytes, projector_need

    if resolved.projector is None:
        raise UsageError(
            f"no projector belongs to {escape_line(resolved.reference)}",
            hint=f"llmrun fit {shlex.quote(resolved.reference)}",
        )
    notes.append(f"with the projector {escape_line(resolved.projector.path)}")
    need = projector_need(resolved.projector.n_bytes)
    return replace(wishes, companions_bytes=companion_bytes([need]))


def _improve_speeds(
    invocation: Invocation, table: Table, readers: _Readers, machine: Machine
) -> Table:
    """The table with speeds that were measured on this machine."""
    from llmrun.cli.measure import build_name
    from llmrun.fit.speed_log import SpeedLog

    log = SpeedLog(invocation.environment.state_dir)
    if not log.path.exists():
        return table
    build, rows = build_name(), []
    for row in table.rows:
        info = readers.info(row.option.label)
        made = row.plan if info is None else log.improve(row.plan, machine, build, info)
        rows.append(replace(row, plan=made))
    return replace(table, rows=tuple(rows))
