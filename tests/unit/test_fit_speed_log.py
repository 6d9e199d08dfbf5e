"""The log of measured speeds: look-up, correction by other models, damage, many writers."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import llmrun.fit.speed_log as module
from llmrun.fit.plan import Wishes, plan
from llmrun.fit.speed_log import SpeedKey, SpeedLog
from tests.fakes.model_shapes import shape_info
from tests.unit.test_fit_speed import card

KEY = SpeedKey("machine", "build", "model", "settings", "gpu")


def test_what_was_recorded_is_found(tmp_path: Path):
    log = SpeedLog(tmp_path / "state")
    assert log.lookup(KEY) is None
    assert not log.path.exists()
    assert log.record(KEY, tok_s=40.0, n_tokens=100)
    assert SpeedLog(tmp_path / "state").lookup(KEY) == 40.0
    for field in ("machine", "build", "model", "settings"):
        assert log.lookup(replace(KEY, **{field: "other"})) is None


def test_the_median_of_the_last_runs_counts(tmp_path: Path):
    log = SpeedLog(tmp_path)
    for tok_s in (1.0, 1.0, 1.0, 1.0, *(10.0, 50.0, 11.0, 12.0, 9.0, 10.0, 10.0, 2.0)):
        log.record(KEY, tok_s=tok_s, n_tokens=100)
    assert log.lookup(KEY) == 10.0


@pytest.mark.parametrize(
    ("tok_s", "n_tokens"), [(5.0, 3), (0.0, 100), (-1.0, 100), (float("nan"), 99), (1e400, 99)]
)
def test_what_means_nothing_is_not_kept(tmp_path: Path, tok_s, n_tokens):
    log = SpeedLog(tmp_path)
    assert not log.record(KEY, tok_s=tok_s, n_tokens=n_tokens)
    assert log.lookup(KEY) is None


def test_other_models_in_the_same_place_tell_how_forecasts_miss(tmp_path: Path):
    log = SpeedLog(tmp_path)
    assert log.machine_efficiency(KEY) is None
    for model, tok_s in (("a", 8.0), ("a", 8.2), ("b", 9.0), ("c", 20.0), ("model", 1.0)):
        key = replace(KEY, model=model, settings=f"of {model}")
        log.record(key, tok_s=tok_s, n_tokens=100, forecast_tok_s=10.0)
    log.record(replace(KEY, model="d"), tok_s=3.0, n_tokens=100)
    assert log.machine_efficiency(KEY) == pytest.approx(0.9)
    assert log.machine_efficiency(replace(KEY, place="cpu")) is None
    assert log.machine_efficiency(replace(KEY, machine="other")) is None


def test_a_plan_gets_the_better_forecast(tmp_path: Path):
    log, target = SpeedLog(tmp_path), card(500e9)
    info, other = shape_info("llama-3.1-8b"), shape_info("gemma-3-4b")
    made = plan(target, info)
    assert log.improve(made, target, "b1", info) == made
    theirs = plan(target, other)
    assert theirs.forecast is not None
    middle = theirs.forecast.middle
    key = SpeedKey.of(target, "b1", other, theirs)
    log.record(key, tok_s=0.8 * middle, n_tokens=99, forecast_tok_s=middle)
    better = log.improve(made, target, "b1", info).forecast
    assert better is not None
    assert made.forecast is not None
    assert better.source == "calibrated"
    assert better.middle == pytest.approx(0.8 * made.forecast.middle)
    log.record(SpeedKey.of(target, "b1", info, made), tok_s=61.0, n_tokens=99)
    measured = log.improve(made, target, "b1", info).forecast
    assert measured is not None
    assert (measured.low, measured.high, measured.source) == (61.0, 61.0, "measured")
    assert log.improve(made, target, "b2", info) == made


def test_the_key_tells_settings_apart_but_not_contexts():
    info, target = shape_info("llama-3.1-8b"), card(500e9)

    def key(wishes: Wishes, target=target, info=info) -> SpeedKey:
        return SpeedKey.of(target, "b", info, plan(target, info, wishes))

    usual = key(Wishes())
    assert usual.place == "gpu"
    assert key(Wishes(n_ctx=4096)) == usual
    assert key(Wishes(type_k="q8_0")) != usual
    assert key(Wishes(n_gpu_layers=9)).place == "mixed"
    assert key(Wishes(n_gpu_layers=0)).place == "cpu"
    free = target.devices[0].free_bytes // 2
    busy = target.with_devices((replace(target.devices[0], free_bytes=free),))
    assert key(Wishes(), target=busy) == usual
    assert key(Wishes(), info=shape_info("llama-3.1-8b", "q8_0")).model != usual.model


@pytest.mark.parametrize(
    "damage", [b"not a database, but long enough " * 64, b"", b"SQLite format"]
)
def test_a_damaged_file_is_replaced(tmp_path: Path, damage: bytes):
    log = SpeedLog(tmp_path)
    log.path.write_bytes(damage)
    assert log.lookup(KEY) is None
    assert log.record(KEY, tok_s=7.0, n_tokens=50)
    assert log.lookup(KEY) == 7.0


def test_a_file_that_is_torn_in_the_middle_is_replaced(tmp_path: Path):
    log = SpeedLog(tmp_path)
    for _ in range(200):
        log.record(KEY, tok_s=7.0, n_tokens=50)
    data = bytearray(log.path.read_bytes())
    data[2000:] = b"\xff" * (len(data) - 2000)
    log.path.write_bytes(data)
    log.record(KEY, tok_s=7.0, n_tokens=50)
    assert log.record(KEY, tok_s=7.0, n_tokens=50)
    assert log.lookup(KEY) == 7.0


def test_another_programs_table_is_replaced(tmp_path: Path):
    log = SpeedLog(tmp_path)
    connection = sqlite3.connect(log.path)
    connection.execute("CREATE TABLE runs (id INTEGER PRIMARY KEY, speed REAL)")
    connection.commit()
    connection.close()
    assert log.record(KEY, tok_s=7.0, n_tokens=50)
    assert log.lookup(KEY) == 7.0


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path):
    (tmp_path / "state").write_text("a file where the folder should be")
    log = SpeedLog(tmp_path / "state")
    assert not log.record(KEY, tok_s=7.0, n_tokens=50)
    assert log.lookup(KEY) is None
    assert log.machine_efficiency(KEY) is None
    SpeedLog(tmp_path / "other").path.mkdir(parents=True)
    assert not SpeedLog(tmp_path / "other").record(KEY, tok_s=7.0, n_tokens=50)


def test_the_log_does_not_grow_for_ever(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 20)
    log = SpeedLog(tmp_path)
    for number in range(50):
        log.record(replace(KEY, model=str(number)), tok_s=7.0, n_tokens=50)
    assert log.lookup(replace(KEY, model="10")) is None
    assert log.lookup(replace(KEY, model="49")) == 7.0
    connection = sqlite3.connect(log.path)
    assert connection.execute("SELECT COUNT(*) FROM runs").fetchone() == (20,)
    connection.close()
    monkeypatch.setattr(module, "_MAX_FILE_BYTES", 100)
    log.record(KEY, tok_s=8.0, n_tokens=50)
    assert log.lookup(replace(KEY, model="49")) is None


def test_many_processes_may_write_at_once(tmp_path: Path):
    program = (
        "import sys; from pathlib import Path\n"
        "from llmrun.fit.speed_log import SpeedKey, SpeedLog\n"
        "log = SpeedLog(Path(sys.argv[1]))\n"
        "key = SpeedKey('m', 'b', sys.argv[2], 's', 'cpu')\n"
        "sys.exit(not all(log.record(key, tok_s=5.0, n_tokens=50) for _ in range(25)))\n"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(number)])
        for number in range(4)
    ]
    assert [child.wait(60) for child in children] == [0, 0, 0, 0]
    connection = sqlite3.connect(SpeedLog(tmp_path).path)
    assert connection.execute("SELECT COUNT(*) FROM runs").fetchone() == (100,)
    connection.close()


def test_nothing_heavy_is_imported_with_it():
    program = "import sys, llmrun.fit.speed_log; sys.exit('sqlite3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
