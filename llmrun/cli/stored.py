"""Which of the stored models a user means: for `rm`, `verify` and shell completion."""

from __future__ import annotations

import shlex
from pathlib import Path

from llmrun.cli.options import Invocation
from llmrun.errors import NotFoundError, UsageError
from llmrun.hub.types import StoredModel
from llmrun.text import close_names, escape_line


def find_stored(invocation: Invocation, text: str) -> tuple[StoredModel, ...]:
    """The stored models that `text` means, unfinished ones too; never empty.

    A catalog name means the repository of its entry: with a tag that quant, without one the
    default quant if it is here, else all. Raises NotFoundError and UsageError.
    """
    from llmrun.catalog.names import (
        CatalogRef,
        PathRef,
        RepoRef,
        is_local_model,
        parse_reference,
    )

    store = invocation.services.store()
    # Not resolved: what a user names is the snapshot's link, not the blob behind it.
    is_path = is_local_model(text)
    found = store.find(text) or (store.find(str(Path.cwd() / text)) if is_path else ())
    if found:
        return found
    reference = parse_reference(text)
    if isinstance(reference, PathRef):
        raise NotFoundError(
            f"{text} is not one of the stored models",
            why="files of your own are used in place and stay yours",
            hint="llmrun list",
        )
    models = store.models()
    if isinstance(reference, CatalogRef):
        found = _of_catalog_name(invocation, reference.name, reference.tag, models)
    elif isinstance(reference, RepoRef):
        found = tuple(
            model
            for model in models
            if model.repo.lower() == reference.repo.lower() and _matches(model, reference.tag)
        )
    if not found:
        raise _not_stored(text, models)
    return found


def _of_catalog_name(
    invocation: Invocation, name: str, tag: str | None, models: tuple[StoredModel, ...]
) -> tuple[StoredModel, ...]:
    catalog = invocation.services.catalog()
    entry = catalog.get(f"{name}:{tag}") if tag else None
    if entry is not None:
        tag = None
    else:
        entry = catalog.get(name)
    if entry is None:
        return ()
    places = (entry.repo.lower(), entry.name.lower())
    ours = tuple(m for m in models if m.repo.lower() in places and _matches(m, tag))
    default = tuple(m for m in ours if tag is None and _matches(m, entry.quant))
    return default or ours


def _matches(model: StoredModel, tag: str | None) -> bool:
    from llmrun.catalog.choose import normal_quant

    if tag is None:
        return True
    if model.quant is not None and normal_quant(model.quant) == normal_quant(tag):
        return True
    return any(tag.lower() in _names(file.path.lower()) for file in model.files)


def _names(path: str) -> tuple[str, str, str]:
    base = path.rpartition("/")[2]
    return path, base, base.removesuffix(".gguf")


def get_again(reference: str) -> str:
    """The command that mends a damaged model."""
    name = shlex.quote(reference)
    return f"llmrun rm {name} --yes && llmrun pull {name}"


def _not_stored(text: str, models: tuple[StoredModel, ...]) -> NotFoundError:
    near = close_names(text, [model.reference for model in models])
    return NotFoundError(
        f"no stored model is called {escape_line(text)}",
        why=f"did you mean {', '.join(near)}?" if near else None,
        hint="llmrun list",
    )


def require_one(text: str, found: tuple[StoredModel, ...], command: str) -> None:
    """Raise UsageError, naming them, when `text` means several models."""
    names = list(dict.fromkeys(model.reference for model in found))
    if len(names) > 1:
        shown = [*names[:6], *(["…"] if len(names) > 6 else [])]
        raise UsageError(
            f"{escape_line(text)} means {len(names)} models",
            why=f"{', '.join(shown)}; --all means all of them",
            hint=f"{command} {shlex.quote(names[0])}",
        )
