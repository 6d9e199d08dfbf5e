"""Saved conversations: what goes in comes out, names stay below the folder, damage is reported."""

from __future__ import annotations

import datetime
import json
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrun.chat.messages import Message, ToolCall
from llmrun.chat.store import Conversation, SessionStore, check_name, new_id
from llmrun.errors import DamagedFileError, LlmrunError, NotFoundError, UsageError

TALK = Conversation(
    id="talk",
    model="smollm2-135m",
    messages=(
        Message("system", "S"),
        Message("user", "What is é?\nTell."),
        Message("assistant", "A\tletter \x1b[0m", thinking="hm", interrupted=True),
        Message("assistant", "", tool_calls=(ToolCall("f", {"a": [1, None]}, "c1"),)),
        Message("tool", "42", tool_name="f", tool_call_id="c1"),
        Message("user", "ok", name="Ann"),
    ),
    settings={"temperature": 0.5, "think": None},
)


@pytest.fixture
def store(tmp_path):
    return SessionStore(tmp_path / "state")


def test_what_is_saved_is_loaded(store):
    saved = store.save(TALK)
    assert store.load("talk") == saved
    assert saved.messages == TALK.messages
    assert saved.settings == TALK.settings
    assert saved.created is not None
    assert saved.title == "What is é?"


def test_saving_again_keeps_when_it_was_created(store):
    first = store.save(TALK)
    second = store.save(first)
    assert second.created == first.created
    assert second.updated >= first.updated


def test_only_the_user_can_read_it(store):
    store.save(TALK)
    assert stat.S_IMODE(store.path_of("talk").stat().st_mode) == 0o600
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_a_save_that_fails_leaves_the_old_file_and_no_rest(store, monkeypatch):
    store.save(TALK)
    before = store.path_of("talk").read_bytes()

    def fail(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmrun.chat.store.os.replace", fail)
    with pytest.raises(LlmrunError, match="could not be saved"):
        store.save(Conversation("talk", "other", ()))
    assert store.path_of("talk").read_bytes() == before
    assert [path.name for path in store.folder.iterdir()] == ["talk.json"]


@pytest.mark.parametrize(
    "name",
    [
        "../../x", "..", ".", "", "a/b", "a\\b", "/etc/passwd", ".hidden", "a\0b", "a b", "a\n",
        "x" * 65, "CON", "nul.txt", "com1", "-x", "é", "a.", "C:x", "~",
    ],
)  # fmt: skip
def test_names_that_could_leave_the_folder_are_refused(store, name):
    for use in (
        lambda: store.save(Conversation(name, "m", ())),
        lambda: store.load(name),
        lambda: store.resume(name),
        lambda: store.delete(name),
    ):
        with pytest.raises(UsageError):
            use()
    assert not store.folder.exists()


@settings(deadline=None)
@given(st.text(max_size=70))
def test_every_name_that_is_accepted_is_a_plain_file_name(name):
    try:
        check_name(name)
    except UsageError:
        return
    assert name == os.path.basename(name)
    assert name.isascii()
    assert name.strip(". ") == name.strip(".") or name[0] != "."


def test_new_names_are_names_and_sort_by_time():
    early = new_id(datetime.datetime(2026, 1, 31, 9, 0))
    late = new_id(datetime.datetime(2026, 2, 1, 8, 0))
    assert check_name(early) < check_name(late)


DAMAGED = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[]",
    b"null",
    b'{"version": 1}',
    b'{"version": 0, "model": "m", "messages": []}',
    b'{"version": "1", "model": "m", "messages": []}',
    b'{"version": 1, "model": 5, "messages": []}',
    b'{"version": 1, "model": "m", "messages": {}}',
    b'{"version": 1, "model": "m", "messages": [5]}',
    b'{"version": 1, "model": "m", "messages": [{"role": "root", "content": "x"}]}',
    b'{"version": 1, "model": "m", "messages": [{"role": [], "content": "x"}]}',
    b'{"version": 1, "model": "m", "messages": [{"role": "user", "content": null}]}',
    b'{"version": 1, "model": "m", "messages": [{"role": "user"}]}',
    b'{"version": 1, "model": "m", "messages": [], "settings": [1]}',
    b'{"version": 1, "model": "m", "messages": [], "created": "yesterday"}',
    b'{"version": 1, "model": "m", "messages": [{"role": "tool", "content": "", "tool_calls": 1}]}',
    b"[" * 200_000,
]


@pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_reported_and_left_in_place(store, data):
    store.save(TALK)
    path = store.folder / "bad.json"
    path.write_bytes(data)
    with pytest.raises(DamagedFileError) as caught:
        store.load("bad")
    assert str(path) in (caught.value.why or "")
    assert path.read_bytes() == data
    assert [(s.id, s.is_damaged) for s in store.list()] == [("talk", False), ("bad", True)]
    assert store.latest().id == "talk"


def test_a_file_of_a_newer_program_is_not_called_broken(store):
    store.save(TALK)
    path = store.path_of("talk")
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(DamagedFileError, match="newer"):
        store.load("talk")


def test_a_link_out_of_the_folder_is_not_followed(store, tmp_path):
    store.save(TALK)
    outside = tmp_path / "outside.json"
    store.path_of("talk").rename(outside)
    store.path_of("talk").symlink_to(outside)
    with pytest.raises(DamagedFileError):
        store.load("talk")
    text = outside.read_text()
    store.save(Conversation("talk", "new", ()))
    assert outside.read_text() == text
    assert store.load("talk").model == "new"


def test_list_latest_and_resume(store):
    assert store.list() == ()
    with pytest.raises(NotFoundError):
        store.latest()
    for name in ("20260101-100000-aaaa", "20260102-100000-bbbb", "other"):
        store.save(Conversation(name, "m", (Message("user", name),)))
    store.save(store.load("20260101-100000-aaaa"))
    assert [saved.id for saved in store.list()] == [
        "20260101-100000-aaaa", "other", "20260102-100000-bbbb",
    ]  # fmt: skip
    assert store.latest().id == "20260101-100000-aaaa"
    assert store.resume("20260102").id == "20260102-100000-bbbb"
    assert store.resume("other").id == "other"
    with pytest.raises(UsageError):
        store.resume("2026")
    with pytest.raises(NotFoundError) as caught:
        store.resume("othre")
    assert "other" in (caught.value.why or "")
    store.delete("other")
    with pytest.raises(NotFoundError):
        store.load("other")
