"""Local paths: files, shards, folders, and everything that is not what it says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmrun.catalog.load import load_catalog
from llmrun.catalog.resolve import resolve
from llmrun.errors import DamagedFileError, LlmrunError, NotFoundError, UsageError
from llmrun.text import escape_line

CATALOG = load_catalog()
GGUF = b"GGUF\x03\x00\x00\x00"


class NoNetwork:
    def listing(self, repo: str, revision: str = "main"):
        raise AssertionError(f"{repo} was asked of the network")

    def models(self):
        return ()


def find(text: str, cwd: Path):
    return resolve(text, catalog=CATALOG, hub=NoNetwork(), store=NoNetwork(), cwd=cwd, cache=cwd)


def put(folder: Path, *names: str, content: bytes = GGUF) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_a_file_is_used_in_place(tmp_path: Path) -> None:
    put(tmp_path, "Qwen3-8B-Q4_K_M.gguf", "mmproj-F16.gguf")
    found = find("./Qwen3-8B-Q4_K_M.gguf", tmp_path)
    path = tmp_path / "Qwen3-8B-Q4_K_M.gguf"
    assert found.local_paths == (path,)
    assert (found.origin, found.quant, found.reference) == ("local", "Q4_K_M", str(path))
    assert (found.entry.name, found.title) == ("qwen3-8b", "Qwen3 8B")
    assert (found.repo, found.commit, found.revision) == (None, None, None)
    assert found.files[0].n_bytes == len(GGUF)
    assert found.projector.path == "mmproj-F16.gguf"
    assert find("Qwen3-8B-Q4_K_M.gguf", tmp_path) == found
    assert find(found.reference, tmp_path / "elsewhere") == found


def test_any_name_will_do_when_the_content_is_gguf(tmp_path: Path) -> None:
    put(tmp_path, "sha256-abc", "mmproj-x.gguf")
    found = find("sha256-abc", tmp_path)
    assert (found.quant, found.entry, found.title) == (None, None, "sha256-abc")
    assert find("./mmproj-x.gguf", tmp_path).files[0].path == "mmproj-x.gguf"


def test_any_shard_names_all_of_them(tmp_path: Path) -> None:
    names = [f"x-Q4_0-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    put(tmp_path, *names, "x-Q8_0.gguf")
    for name in names:
        found = find(name, tmp_path)
        assert [path.name for path in found.local_paths] == names
        assert found.reference == str(tmp_path / names[0])
    (tmp_path / names[1]).unlink()
    with pytest.raises(NotFoundError) as caught:
        find(names[2], tmp_path)
    assert caught.value.message == "1 of 3 parts of the model are missing"
    assert names[1] in caught.value.why


def test_every_shard_must_be_gguf(tmp_path: Path) -> None:
    put(tmp_path, "x-00001-of-00002.gguf")
    put(tmp_path, "x-00002-of-00002.gguf", content=b"<html>")
    with pytest.raises(DamagedFileError, match="00002"):
        find("x-00001-of-00002.gguf", tmp_path)


def test_a_folder_with_one_model(tmp_path: Path) -> None:
    put(tmp_path, "m/Phi-4-Q4_0.gguf", "m/mmproj-F16.gguf", "m/mtp-x.gguf", "m/README.md")
    found = find("m", tmp_path)
    assert found.local_paths == (tmp_path / "m" / "Phi-4-Q4_0.gguf",)
    assert (found.entry.name, found.drafter.path) == ("phi-4", "mtp-x.gguf")
    put(tmp_path, *(f"s/x-{n:05}-of-00002.gguf" for n in (1, 2)))
    assert len(find("./s", tmp_path).local_paths) == 2


def test_a_folder_with_several_models_or_none(tmp_path: Path) -> None:
    put(tmp_path, "m/a-Q4_0.gguf", "m/b b-Q8_0.gguf", "torn/x-00001-of-00002.gguf", "e/readme")
    with pytest.raises(UsageError) as caught:
        find("./m", tmp_path)
    assert "a-Q4_0.gguf 8 B, b b-Q8_0.gguf 8 B" in caught.value.why
    assert caught.value.hint == f"llmrun run {tmp_path}/m/a-Q4_0.gguf"
    with pytest.raises(NotFoundError, match="holds no GGUF model"):
        find("./e", tmp_path)
    with pytest.raises(NotFoundError, match="1 of 2 parts"):
        find("./torn", tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    put(tmp_path, "Qwen3-8B-Q4_K_M.gguf")
    with pytest.raises(NotFoundError) as caught:
        find("./Qwen3-8B-Q4_KM.gguf", tmp_path)
    assert caught.value.exit_code == 3
    assert caught.value.why == "did you mean Qwen3-8B-Q4_K_M.gguf?"
    assert caught.value.hint == "llmrun run ./Qwen3-8B-Q4_K_M.gguf"
    with pytest.raises(NotFoundError) as caught:
        find("org/name/x-Q4_0.gguf", tmp_path)
    assert caught.value.hint == "llmrun pull org/name:x-Q4_0.gguf"
    with pytest.raises(NotFoundError) as caught:
        find("/no/such/thing", tmp_path)
    assert caught.value.hint == "llmrun list"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b'{"error": "x"}', "JSON"),
        (b"PK\x03\x04", "zip"),
        (b"\x40\x00\x00\x00\x00\x00\x00\x00" + b'{"a":{}}', "safetensors"),
        (b"lmgg\x01", "GGML"),
        (b"\0" * 4096, "zeros"),
        (b"GGU", "first bytes"),
        (b"FUGG\x03\x00\x00\x00", "first bytes"),
        (os.urandom(8).replace(b"G", b"g") * 4, None),
    ],
)
def test_a_file_that_is_not_gguf(tmp_path: Path, content: bytes, why: str | None) -> None:
    put(tmp_path, "x.gguf", content=content)
    with pytest.raises(DamagedFileError) as caught:
        find("./x.gguf", tmp_path)
    assert caught.value.exit_code == 7
    assert why is None or why in caught.value.why


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(UsageError, match="regular file"):
        find("./pipe.gguf", tmp_path)


def test_an_unreadable_file_is_an_error_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "x.gguf")

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(LlmrunError) as caught:
        find("./x.gguf", tmp_path)
    assert caught.value.why == "Permission denied"


@pytest.mark.parametrize("name", ["a\x1b]0;pwned\x07.gguf", "b\u202efug.gguf", "c\nd.gguf"])
def test_hostile_names_are_shown_escaped(tmp_path: Path, name: str) -> None:
    put(tmp_path, name, content=b"no")
    with pytest.raises(DamagedFileError) as caught:
        find(name, tmp_path)
    assert escape_line(caught.value.message) == caught.value.message
    put(tmp_path, name)
    assert escape_line(find(name, tmp_path).title) == find(name, tmp_path).title


def test_a_broken_link_and_names_that_no_system_can_hold(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").symlink_to(tmp_path / "gone")
    for text in ("./x.gguf", "./" + "x" * 300 + ".gguf", "/" + "d/" * 2000 + "x.gguf"):
        with pytest.raises(NotFoundError):
            find(text, tmp_path)


def test_a_path_into_the_shared_cache_knows_its_repository(tmp_path: Path) -> None:
    commit = "a" * 40
    folder = f"models--unsloth--gemma-4-E4B-it-GGUF/snapshots/{commit}"
    put(tmp_path, f"{folder}/weights.gguf")
    found = find(f"./{folder}/weights.gguf", tmp_path)
    assert (found.repo, found.commit) == ("unsloth/gemma-4-E4B-it-GGUF", commit)
    assert found.entry.name == "gemma-4-e4b"
