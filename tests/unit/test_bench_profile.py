"""Profiles in the state folder: what was kept comes back, anything else counts as not there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmrun.bench.profile import Profile, load_profile, remove_profile, save_profile
from llmrun.fit.plan import plan
from llmrun.gguf.info import read_info
from llmrun.hardware.machine import Cpu, Machine, Memory
from tests.fakes.cli import model_bytes

MACHINE = Machine(Cpu(8, 8, 4), Memory(16 << 30, 16 << 30))
PROFILE = Profile(3, 4, 256, "q8_0", "off", "build 1", 1.25, 1_700_000_000.0)


@pytest.fixture
def model(tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(model_bytes())
    info = read_info([path])
    return info, plan(MACHINE, info)


def load(state: Path, model, machine: Machine = MACHINE, build: str = "build 1"):
    return load_profile(state, machine, *model, lambda: build)


def test_what_was_saved_comes_back(tmp_path: Path, model) -> None:
    state = tmp_path / "state"
    assert load(state, model) is None
    path = save_profile(state, MACHINE, *model, PROFILE)
    assert load(state, model) == PROFILE
    assert path.parent.stat().st_mode & 0o077 == 0
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    save_profile(state, MACHINE, *model, replace(PROFILE, n_threads=1))
    assert load(state, model).n_threads == 1
    remove_profile(state, MACHINE, *model)
    remove_profile(state, MACHINE, *model)
    assert load(state, model) is None


def test_not_for_another_machine_model_or_build(tmp_path: Path, model) -> None:
    save_profile(tmp_path, MACHINE, *model, PROFILE)
    assert load(tmp_path, model, replace(MACHINE, cpu=Cpu(8, 8, 2))) is None
    assert load(tmp_path, (replace(model[0], n_bytes=1), model[1])) is None
    assert load(tmp_path, model, build="build 2") is None
    # Free memory is no other machine.
    assert load(tmp_path, model, replace(MACHINE, memory=Memory(16 << 30, 1 << 30))) == PROFILE


@pytest.mark.parametrize(
    "change",
    [
        {"n_threads": 0}, {"n_threads": 10**6}, {"n_threads": True}, {"n_threads_batch": "2"},
        {"n_ubatch": -1}, {"n_ubatch": None}, {"kv_type": "q9"}, {"kv_type": []},
        {"speculative": "draft!"}, {"gain": "much"}, {"tuned_at": None}, {"build": 7},
        {"format": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_bounds_is_no_profile(tmp_path: Path, model, change) -> None:
    path = save_profile(tmp_path, MACHINE, *model, PROFILE)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert load(tmp_path, model) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b" " * 100_000])
def test_a_damaged_file_is_no_profile(tmp_path: Path, model, content: bytes) -> None:
    save_profile(tmp_path, MACHINE, *model, PROFILE).write_bytes(content)
    assert load(tmp_path, model) is None
