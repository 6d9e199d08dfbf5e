"""Kept answers: what they depend on, how many there are, damage and many writers."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import llmrun.fit.exact_cache as module
from llmrun.fit.exact_cache import AnswerFile, make_key
from llmrun.fit.types import BufferUse, Measurement, Setup
from llmrun.gguf.types import ModelInfo
from tests.unit.test_fit_formula import LLAMA, make_info, tensor


def model(*shape: int, type_id: int = 12, **keys: object) -> ModelInfo:
    output = replace(tensor("output.weight", *(shape or (256, 32))), type_id=type_id)
    return make_info("llama", (output,), **(LLAMA | keys))


BUFFERS = (BufferUse("CPU", "CPU", 10, 20, 30),)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "libllama.so").write_bytes(b"1")
    return folder


def measurement(n_ctx: int) -> Measurement:
    return Measurement(Setup(n_ctx), (replace(BUFFERS[0], kv_bytes=n_ctx),))


class TestKey:
    info: ModelInfo = model()

    def key(self, library: Path, info: ModelInfo | None = None, devices: str = "") -> str:
        found = make_key(info or self.info, library, devices)
        assert found is not None
        return found

    def test_the_same_is_the_same(self, library: Path) -> None:
        assert self.key(library) == self.key(library, model())

    def test_another_build(self, library: Path) -> None:
        before = self.key(library)
        os.utime(library / "libllama.so", ns=(1, 1))
        touched = self.key(library)
        (library / "libggml-cuda.so").touch()
        assert len({before, touched, self.key(library)}) == 3

    def test_another_machine(self, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = self.key(library)
        assert self.key(library, devices="CUDA0=RTX/1") != before
        monkeypatch.setattr(module, "_read_processor", lambda: "another")
        assert self.key(library) != before

    def test_another_model(self, library: Path) -> None:
        others = [
            replace(self.info, n_bytes=self.info.n_bytes + 1),
            model(type_id=14),
            model(32, 256),
            model(attention__sliding_window=512),
        ]
        keys = {self.key(library), *(self.key(library, info) for info in others)}
        assert len(keys) == 5

    def test_another_way_to_ask(
        self, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An update of the program can set other parameters for the same setup."""
        assert all(path.is_file() for path in module._find_engine_code())
        code = tmp_path / "params.py"
        keys = set()
        monkeypatch.setattr(module, "_find_engine_code", lambda: [code])
        for text in ("n_batch = 512", "n_batch = 256"):
            code.write_text(text)
            keys.add(self.key(library))
        assert len(keys) == 2
        code.unlink()
        assert make_key(self.info, library, "") is None

    def test_without_a_library_nothing_is_kept(self, tmp_path: Path) -> None:
        assert make_key(self.info, None, "") is None
        assert make_key(self.info, tmp_path / "none", "") is None


def test_what_is_added_is_found(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "new", "k")
    assert file.load([Setup(512)]).measurements == {}
    file.add(("CUDA0",), [measurement(512)])
    file.add(("CUDA0",), [measurement(1024)])
    known = AnswerFile(tmp_path / "new", "k").load([Setup(512), Setup(1024), Setup(2048)])
    assert known.devices == ("CUDA0",)
    assert known.measurements == {Setup(n): measurement(n) for n in (512, 1024)}
    # With other devices all is different.
    file.add((), [measurement(2048)])
    assert set(file.load([Setup(512), Setup(2048)]).measurements) == {Setup(2048)}


def test_old_answers_and_old_files_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_ANSWERS", 5)
    monkeypatch.setattr(module, "_MAX_FILES", 3)
    file = AnswerFile(tmp_path, "k")
    for n in range(1, 9):
        file.add((), [measurement(n)])
    assert set(file.load([Setup(n) for n in range(1, 9)]).measurements) == {
        Setup(n) for n in range(4, 9)
    }
    for age in range(5):
        AnswerFile(tmp_path, f"k{age}").add((), [measurement(1)])
        os.utime(tmp_path / f"k{age}.json", (age, age))
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 3
    assert "k4.json" in names


def test_many_writers_leave_a_whole_file(tmp_path: Path) -> None:
    def write(n: int) -> None:
        AnswerFile(tmp_path, "k").add((), [measurement(n)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(1, 60)))
    (path,) = tmp_path.iterdir()
    answers = json.loads(path.read_text())["answers"]
    assert answers
    found = AnswerFile(tmp_path, "k").load([Setup(n) for n in range(1, 60)]).measurements
    assert len(found) == len(answers)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"format": 0, "devices": [], "answers": {}}',
        '{"format": 1, "devices": "CUDA0", "answers": {}}',
        '{"format": 1, "devices": [], "answers": {"[512',
        "[" * 100_000,
        " " * (1 << 20) + "{}",
    ],
    ids=range(7),
)
def test_damage_is_as_if_it_were_not_there(tmp_path: Path, text: str) -> None:
    (tmp_path / "k.json").write_text(text)
    file = AnswerFile(tmp_path, "k")
    assert file.load([Setup(512)]).measurements == {}
    file.add((), [measurement(512)])
    assert Setup(512) in file.load([Setup(512)]).measurements


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = AnswerFile(tmp_path / "file", "k")
    file.add((), [measurement(512)])
    assert file.load([Setup(512)]).measurements == {}
