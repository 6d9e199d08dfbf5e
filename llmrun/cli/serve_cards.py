"""Which models a server answers for, under which names, and which of them a request means.

A request's text is only ever compared with what is listed here: no text of a stranger becomes a
path, not even to see whether something is there.
"""

from __future__ import annotations

import shlex
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmrun.cli.options import Invocation
from llmrun.errors import LlmrunError, NotFoundError
from llmrun.server.types import ModelCard
from llmrun.text import close_names, escape_line

if TYPE_CHECKING:
    from llmrun.catalog.entries import Catalog, CatalogEntry
    from llmrun.catalog.types import Resolved
    from llmrun.gguf.types import ModelInfo
    from llmrun.hub.types import StoredModel

MAX_NAME_CHARS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A model on this machine that can be asked for. `text` is what resolves to it, `names` are
    what it is called as a whole, in lower case; `repo`, `tag` and `entry` serve for the rest."""

    card: ModelCard
    text: str
    paths: tuple[Path, ...]
    names: frozenset[str]
    repo: str | None = None
    quant: str | None = None
    files: tuple[str, ...] = ()
    commit: str | None = None
    entry: CatalogEntry | None = None


class CardList:
    """The models of the store or, where `names` were given on the command line, these only (with
    `all_stored` both). Headers are read once for each state of a file. Safe from any thread."""

    def __init__(
        self, invocation: Invocation, names: Sequence[str] = (), *, all_stored: bool = False
    ) -> None:
        self._invocation = invocation
        self._typed = tuple(names)
        self._all_stored = all_stored or not names
        self._catalog: Catalog = invocation.services.catalog()
        self._named: tuple[Served, ...] = ()
        self._facts: dict[tuple[object, ...], ModelCard | None] = {}
        self._lock = threading.Lock()

    def resolve_named(self, resolved: Iterable[Resolved]) -> tuple[str, ...]:
        """Take in what the names of the command line resolved to, in their order and all on disk;
        the names of their cards, each once. Raises the errors of headers that cannot be read."""
        found: list[Served] = []
        for typed, each in zip(self._typed, resolved, strict=True):
            served = self._of_resolved(typed, each, {other.card.name for other in found})
            if all(served.paths != other.paths for other in found):
                found.append(served)
        self._named = tuple(found)
        return tuple(served.card.name for served in found)

    def served(self) -> tuple[Served, ...]:
        """What there is now: first what was named, then the store's, each file once."""
        found = list(self._named)
        if self._all_stored:
            paths = {served.paths for served in found}
            stored = self._stored({served.card.name for served in found})
            found += [served for served in stored if served.paths not in paths]
        return tuple(found)

    def _stored(self, taken: set[str]) -> list[Served]:
        """What the store holds, under other names than those `taken`."""
        found = []
        for model in self._invocation.services.store().models():
            served = self._of_stored(model, taken)
            if served is not None:
                found.append(served)
                taken.add(served.card.name)
        return found

    def find(self, name: str) -> Served:
        """What a request calls `name`. Raises NotFoundError."""
        listed = self.served()
        found = _match(name, listed, self._catalog)
        if found is None:
            raise self._not_found(name, listed)
        return found

    # ---- from files to cards

    def _of_resolved(self, typed: str, resolved: Resolved, taken: set[str]) -> Served:
        paths = resolved.local_paths
        card = self._card(paths, resolved.title, resolved.entry, must=True)
        assert card is not None
        is_file = resolved.origin == "local"
        # The path itself is nobody's business but the user's.
        name = name_of_file(paths[0]) if is_file else _safe_name(resolved.reference)
        names = {name, typed, *((paths[0].name,) if is_file else (resolved.reference,))}
        if not is_file and resolved.entry is not None and resolved.tag is None:
            names |= {resolved.entry.name, *resolved.entry.aliases}
        return Served(
            replace(
                card,
                name=_unused(name, taken),
                repo=resolved.repo or "",
                license=resolved.licence or card.license,
                digest=resolved.files[0].sha256 or "",
            ),
            resolved.reference,
            paths,
            frozenset(map(_normal, names)),
            None if is_file else resolved.repo,
            resolved.quant,
            tuple(file.path for file in resolved.files),
            resolved.commit,
            resolved.entry,
        )

    def _of_stored(self, model: StoredModel, taken: set[str]) -> Served | None:
        if model.state != "complete" or not model.files:
            return None
        from llmrun.gguf.naming import shard_of

        first = model.files[0]
        shard = shard_of(first.path)
        own = model.files[: shard.count if shard is not None else 1]
        paths = tuple(file.local_path for file in own)
        entry = self._catalog.entry_for(model.repo, first.path)
        if model.origin == "bundled":
            entry = self._catalog.get(model.repo) or entry
        card = self._card(paths, model.reference, entry)
        if card is None:
            return None
        name, is_default = model.reference, False
        if entry is not None and model.repo.lower() in (entry.repo.lower(), entry.name.lower()):
            is_default = _is_default(entry, model.quant, first.path)
            if is_default:
                name = entry.name
            elif model.quant and model.reference == f"{model.repo}:{model.quant}":
                name = f"{entry.name}:{model.quant.lower()}"
        if name in taken:
            name, is_default = model.reference, False
        if name in taken:
            return None
        names = {name, model.reference}
        if is_default and entry is not None:
            names |= {entry.name, *entry.aliases}
        return Served(
            replace(card, name=name, repo=model.repo, digest=first.sha256 or ""),
            model.reference,
            paths,
            frozenset(map(_normal, names)),
            model.repo,
            model.quant,
            tuple(file.path for file in own),
            model.commit,
            entry,
        )

    def _card(
        self,
        paths: tuple[Path, ...],
        name: str,
        entry: CatalogEntry | None,
        *,
        must: bool = False,
    ) -> ModelCard | None:
        """What the header says; None for what is no model to be asked, and, unless it `must` be
        one, for what cannot be read."""
        from llmrun.gguf.info import read_info

        try:
            status = [path.stat() for path in paths]
        except OSError as error:
            if must:
                raise NotFoundError(f"{name} is gone", why=error.strerror) from error
            return None
        key = (*paths, *((each.st_size, each.st_mtime_ns) for each in status))
        with self._lock:
            if key in self._facts and not must:
                return self._facts[key]
        try:
            card: ModelCard | None = card_of(name, read_info(paths), entry)
        except LlmrunError:
            if must:
                raise
            card = None
        if card is not None:
            card = replace(card, modified_s=status[0].st_mtime)
            if not (card.can_chat or card.can_embed or card.can_rerank):
                card = None
        if must and card is None:
            raise LlmrunError(f"{name} is not a model of its own")
        with self._lock:
            self._facts[key] = card
        return card

    def _not_found(self, name: str, listed: Sequence[Served]) -> NotFoundError:
        from llmrun.catalog.names import CatalogRef, RepoRef

        shown = escape_line(name[:MAX_NAME_CHARS])
        if not self._all_stored and _match(name, self._stored(set()), self._catalog) is not None:
            return NotFoundError(
                f"the model '{shown}' is not served here",
                why="the server was started for the models that were named then",
            )
        words = f"the model '{shown}' is not on this machine"
        reference = _parse(name)
        if isinstance(reference, CatalogRef):
            known = self._catalog.get(f"{reference.name}:{reference.tag}") or self._catalog.get(
                reference.name
            )
            if known is not None:
                return NotFoundError(words, hint=f"llmrun pull {shlex.quote(shown)}")
            near = close_names(
                name, [*(each.card.name for each in listed), *self._catalog.all_names()]
            )
            return NotFoundError(
                f"no model is called '{shown}'",
                why=f"did you mean {', '.join(near)}?" if near else None,
                hint=f"llmrun search {shlex.quote(shown)}" if not near else None,
            )
        if isinstance(reference, RepoRef):
            return NotFoundError(words, hint=f"llmrun pull {shlex.quote(shown)}")
        return NotFoundError(f"no model is called '{shown}'")


def card_of(name: str, info: ModelInfo, entry: CatalogEntry | None = None) -> ModelCard:
    """The card of a model with this header, of a kind that `entry` may know more about."""
    from llmrun.engine.embed_shape import embedding_kind

    kind = embedding_kind(info)
    is_model = info.kind in ("model", "embedder", "reranker")
    template = info.chat_template
    known = entry.capabilities if entry is not None else ()
    return ModelCard(
        name=name,
        n_bytes=info.n_bytes,
        n_params=info.n_params,
        quant=info.quant or "",
        architecture=info.architecture,
        n_ctx=info.n_ctx_train or 0,
        can_chat=is_model and kind == "chat",
        can_think="thinking" in known or _mentions(template, "enable_thinking", "<think>"),
        can_call_tools="tools" in known or _mentions(template, "tools", "tool_calls"),
        can_embed=is_model and kind == "embedding",
        can_rerank=is_model and kind == "reranker",
        chat_template=template,
        license=info.licence or (entry.licence if entry is not None else ""),
    )


def _mentions(template: str | None, *words: str) -> bool:
    return template is not None and any(word in template for word in words)


# ---- names


def _match(name: str, listed: Sequence[Served], catalog: Catalog) -> Served | None:
    """The one that is called so as a whole, else the best one that the reference takes in."""
    from llmrun.catalog.names import CatalogRef, RepoRef

    normal = _normal(name)
    for served in listed:
        if normal in served.names:
            return served
    reference = _parse(name)
    if isinstance(reference, CatalogRef):
        tag = reference.tag
        entry = catalog.get(f"{reference.name}:{tag}") if tag else None
        tag = None if entry is not None else _real_tag(tag)
        entry = entry or catalog.get(reference.name)
        if entry is None:
            return None
        found = [served for served in listed if served.entry is entry]
    elif isinstance(reference, RepoRef):
        tag, entry = _real_tag(reference.tag), None
        repo = reference.repo.lower()
        found = [served for served in listed if served.repo and served.repo.lower() == repo]
    else:
        return None
    return _best(found, tag, reference.revision, entry)


def _best(
    found: Sequence[Served], tag: str | None, revision: str | None, entry: CatalogEntry | None
) -> Served | None:
    from llmrun.catalog.choose import QuantChoice, match_tag, pick_default
    from llmrun.hub.types import RemoteFile

    choices: list[tuple[QuantChoice, Served]] = []
    for served in found:
        if revision is None or (served.commit or "").startswith(revision.lower()):
            files = tuple(RemoteFile(path, 0, None) for path in served.files)
            choice = QuantChoice(served.quant, served.card.n_bytes, files, len(files))
            choices.append((choice, served))
    listed = [choice for choice, _ in choices]
    best = pick_default(listed, entry) if tag is None else match_tag(listed, tag, entry)
    return next((served for choice, served in choices if choice is best), None)


def _parse(name: str) -> object:
    """The reference, or None for what is none. Looks at no file."""
    from llmrun.catalog.names import parse_reference
    from llmrun.errors import UsageError

    try:
        return parse_reference(name, exists=lambda _text: False)
    except UsageError:
        return None


def _normal(name: str) -> str:
    return name.strip().lower().removesuffix(":latest")


def _real_tag(tag: str | None) -> str | None:
    return None if tag is None or tag.lower() == "latest" else tag


def _is_default(entry: CatalogEntry, quant: str | None, path: str) -> bool:
    from llmrun.catalog.choose import normal_quant

    if entry.file is not None and path == entry.file:
        return True
    return quant is not None and normal_quant(quant) == normal_quant(entry.quant)


def name_of_file(path: Path) -> str:
    """What a model that was given as a file is called."""
    return _safe_name(path.name)


def _safe_name(name: str) -> str:
    """A file's name without folder and suffix, or a reference, as one printable word."""
    base = name.removesuffix(".gguf") if "/" not in name else name
    return escape_line(base)[:MAX_NAME_CHARS] or "model"


def _unused(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    return next(each for n in range(2, 1 << 20) if (each := f"{name}-{n}") not in taken)
