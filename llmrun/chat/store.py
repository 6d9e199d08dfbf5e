"""Saved conversations: one JSON file each, below the state folder, for the user's eyes only.

A file is replaced in one step, so a kill leaves the old or the new state. A file that cannot be
read is reported and stays where it is.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmrun.chat.messages import Message, ToolCall
from llmrun.errors import DamagedFileError, LlmrunError, NotFoundError, UsageError
from llmrun.text import close_names

FORMAT_VERSION = 1
MAX_FILE_BYTES = 256 * 1024 * 1024

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NEW_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")
# Names that Windows gives to devices, with any ending.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as it is saved.

    `model` is the reference as the user wrote it; `settings` holds what JSON can. Times are UTC.
    `stamp` tells the version of the file that it was read from or written to (see
    `SessionStore.stamp`).
    """

    id: str
    model: str
    messages: tuple[Message, ...]
    settings: Mapping[str, object] = field(default_factory=dict)
    created: datetime.datetime | None = None
    updated: datetime.datetime | None = None
    stamp: int | None = field(default=None, compare=False)

    @property
    def title(self) -> str:
        """The first question's first line, at most 60 characters; may hold control characters."""
        question = next((m.content for m in self.messages if m.role == "user"), "")
        line = question.strip().partition("\n")[0]
        return line if len(line) <= 60 else line[:59] + "…"


@dataclass(frozen=True, slots=True)
class Saved:
    """One line of `SessionStore.list`. `is_damaged`: the other fields but `id` say nothing."""

    id: str
    path: Path
    model: str = ""
    title: str = ""
    n_messages: int = 0
    updated: datetime.datetime | None = None
    is_damaged: bool = False


def new_id(now: datetime.datetime | None = None) -> str:
    """A name that sorts by time: `20260131-142501-3fa9`."""
    now = now or datetime.datetime.now(datetime.UTC)
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def is_new_id(name: str) -> bool:
    """Whether `name` was made by `new_id`, not chosen by the user."""
    return _NEW_ID.fullmatch(name) is not None


def check_name(name: str) -> str:
    """`name` if it can be a session's name. Raises UsageError."""
    if not _NAME.fullmatch(name) or _RESERVED.fullmatch(name) or name.endswith("."):
        raise UsageError(
            f"{name!r} cannot be a session's name",
            why="a name has letters, digits, dots, dashes and underscores, at most 64 of them, "
            "and begins with a letter or digit",
            hint="/save my-session",
        )
    return name


class SessionStore:
    """The saved conversations below `<state>/sessions`."""

    def __init__(
        self, state_dir: Path, on_delete: Callable[[str], None] = lambda session_id: None
    ) -> None:
        """`on_delete` is told of every conversation that goes: what else is kept of it must go."""
        self.folder = state_dir / "sessions"
        self._on_delete = on_delete

    def path_of(self, session_id: str) -> Path:
        """Where this session is or would be. Raises UsageError for a name that is not one."""
        return self.folder / f"{check_name(session_id)}.json"

    def save(self, conversation: Conversation) -> Conversation:
        """Write it, and return it with its times set. Raises UsageError, or LlmrunError when the
        folder cannot be written."""
        path = self.path_of(conversation.id)
        now = datetime.datetime.now(datetime.UTC)
        saved = replace(conversation, created=conversation.created or now, updated=now)
        data = json.dumps(_to_json(saved), ensure_ascii=False, indent=1)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_atomically(path, data.encode("utf-8", "replace"))
        except OSError as error:
            raise LlmrunError(
                f"the conversation could not be saved to {path}", why=error.strerror or str(error)
            ) from error
        return replace(saved, stamp=self.stamp(saved.id))

    def stamp(self, session_id: str) -> int | None:
        """Changes whenever the file is written; None when there is none."""
        try:
            return self.path_of(session_id).stat().st_mtime_ns
        except OSError:
            return None

    def load(self, session_id: str) -> Conversation:
        """Raises NotFoundError, DamagedFileError (the file stays) or UsageError."""
        path = self.path_of(session_id)
        stamp = self.stamp(session_id)
        try:
            if path.is_symlink() or path.stat().st_size > MAX_FILE_BYTES:
                raise ValueError("it is a link or too long")
            raw = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise self._not_found(session_id) from None
        except OSError as error:
            raise LlmrunError(
                f"the saved session {session_id} cannot be read", why=error.strerror or str(error)
            ) from error
        except (ValueError, RecursionError) as error:
            raise _damaged(session_id, path, str(error)) from error
        version = raw.get("version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise DamagedFileError(
                f"the saved session {session_id} is of a newer llmrun",
                why=f"its format is {version}, this program knows {FORMAT_VERSION}",
                hint="update llmrun",
            )
        try:
            return replace(_from_json(raw), id=session_id, stamp=stamp)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(session_id, path, str(error)) from error

    def list(self) -> tuple[Saved, ...]:
        """All sessions, the last used first; damaged ones too, at the end."""
        found = []
        for path in sorted(self.folder.glob("*.json")) if self.folder.is_dir() else ():
            try:
                conversation = self.load(path.stem)
            except UsageError:
                continue  # not one of ours
            except LlmrunError:
                found.append(Saved(path.stem, path, is_damaged=True))
                continue
            found.append(
                Saved(
                    conversation.id,
                    path,
                    conversation.model,
                    conversation.title,
                    len(conversation.messages),
                    conversation.updated,
                )
            )
        never = datetime.datetime.min.replace(tzinfo=datetime.UTC)
        found.sort(key=lambda saved: (not saved.is_damaged, saved.updated or never), reverse=True)
        return tuple(found)

    def latest(self) -> Conversation:
        """The last used one that can be read. Raises NotFoundError when there is none."""
        for saved in self.list():
            if not saved.is_damaged:
                return self.load(saved.id)
        raise NotFoundError("there is no saved session yet", hint="llmrun chat")

    def resume(self, session_id: str) -> Conversation:
        """The session with this name, or the only one whose name begins so. Raises like `load`."""
        check_name(session_id)
        if self.path_of(session_id).exists():
            return self.load(session_id)
        names = [saved.id for saved in self.list() if saved.id.startswith(session_id)]
        if len(names) > 1:
            raise UsageError(
                f"{len(names)} sessions begin with {session_id}",
                hint=f"llmrun chat --resume {names[0]}",
            )
        if not names:
            raise self._not_found(session_id)
        return self.load(names[0])

    def delete(self, session_id: str) -> None:
        """Raises NotFoundError."""
        path = self.path_of(session_id)
        self._on_delete(session_id)
        try:
            path.unlink()
        except FileNotFoundError:
            raise self._not_found(session_id) from None

    def _not_found(self, session_id: str) -> NotFoundError:
        names = [path.stem for path in self.folder.glob("*.json")] if self.folder.is_dir() else []
        near = close_names(session_id, names)
        return NotFoundError(
            f"there is no saved session {session_id}",
            why=f"did you mean {', '.join(near)}?" if near else None,
            hint=f"llmrun chat --resume {near[0]}" if near else "llmrun chat --continue",
        )


def _damaged(session_id: str, path: Path, why: str) -> DamagedFileError:
    return DamagedFileError(
        f"the saved session {session_id} is damaged",
        why=f"{why[:200]} ({path})",
        hint="it was left in place; mend or remove the file",
    )


def _write_atomically(path: Path, data: bytes) -> None:
    # mkstemp makes the file 0600, and os.replace keeps that.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108 - the name is mkstemp's
        raise


def _to_json(conversation: Conversation) -> dict[str, Any]:
    return {
        "version": FORMAT_VERSION,
        "model": conversation.model,
        "created": conversation.created.isoformat() if conversation.created else None,
        "updated": conversation.updated.isoformat() if conversation.updated else None,
        "settings": dict(conversation.settings),
        "messages": [_message_to_json(message) for message in conversation.messages],
    }


def _message_to_json(message: Message) -> dict[str, Any]:
    result: dict[str, Any] = {"role": message.role, "content": message.content}
    for name in ("thinking", "tool_name", "name", "tool_call_id"):
        if getattr(message, name) is not None:
            result[name] = getattr(message, name)
    if message.interrupted:
        result["interrupted"] = True
    if message.tool_calls:
        result["tool_calls"] = [
            {"name": call.name, "arguments": dict(call.arguments), "id": call.id}
            for call in message.tool_calls
        ]
    return result


def _from_json(raw: Mapping[str, Any]) -> Conversation:
    if raw["version"] != FORMAT_VERSION:
        raise ValueError(f"unknown format {raw['version']!r}")
    return Conversation(
        id="",
        model=_text(raw["model"]),
        messages=tuple(_message_from_json(item) for item in _sequence(raw["messages"])),
        settings=dict(raw.get("settings") or {}),
        created=_time(raw.get("created")),
        updated=_time(raw.get("updated")),
    )


def _message_from_json(raw: Mapping[str, Any]) -> Message:
    optional = {
        name: _text(raw[name])
        for name in ("thinking", "tool_name", "name", "tool_call_id")
        if raw.get(name) is not None
    }
    calls = tuple(
        ToolCall(_text(call["name"]), dict(call["arguments"]), call.get("id"))
        for call in _sequence(raw.get("tool_calls", []))
    )
    return Message(
        raw["role"],
        _text(raw["content"]),
        tool_calls=calls,
        interrupted=raw.get("interrupted") is True,
        **optional,
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is not text")
    return value


def _sequence(value: object) -> Sequence[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.60} is not a list")
    return value


def _time(value: object) -> datetime.datetime | None:
    if value is None:
        return None
    time = datetime.datetime.fromisoformat(_text(value))
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
