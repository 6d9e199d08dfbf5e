"""The exact tier against real loads of real models: the log, and what a process takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmrun.fit.calibrate import calibrate
from llmrun.fit.exact import ChildAllocator
from llmrun.fit.formula import estimate
from llmrun.fit.types import MIB, Measurement, Setup
from llmrun.gguf.info import read_info
from tests.fakes.models import gemma3_path, smollm2_path
from tests.fakes.real_load import load_really
from tests.fakes.setups import REAL_SETUPS

MODELS = {"smollm2": smollm2_path, "gemma3": gemma3_path}
# Half of the last digit of each line that is summed.
LOG_STEP = 0.005 + 1e-9


def header_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(read_info([path]).header.n_header_bytes)


def of_header(path: Path, **more: object) -> ChildAllocator:
    return ChildAllocator.of_headers([(path.name, header_of(path), path.stat().st_size)], **more)


def measure(allocator: ChildAllocator, *setups: Setup) -> list[Measurement]:
    answers = allocator.measure(setups)
    assert allocator.problem is None
    assert None not in answers, [allocator.refusal(setup) for setup in setups]
    return list(answers)


@pytest.fixture(scope="module", params=MODELS)
def path(request: pytest.FixtureRequest) -> Path:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def answers(path: Path) -> dict[Setup, Measurement]:
    return dict(zip(REAL_SETUPS, measure(of_header(path), *REAL_SETUPS), strict=True))


@pytest.mark.parametrize("setup", REAL_SETUPS, ids=str)
def test_the_log_of_a_real_load_says_the_same(
    path: Path, answers: dict[Setup, Measurement], setup: Setup
) -> None:
    answer, real = answers[setup], load_really(path, setup, work=False)
    for kind in ("weights", "kv", "compute"):
        logged = getattr(real, kind)
        exact = getattr(answer, f"{kind}_bytes") / MIB
        assert logged and sum(logged.values()) == pytest.approx(
            exact, abs=LOG_STEP * real.n_lines[kind]
        ), kind
    # What is reordered lies in the buffer that the log names.
    assert answer.repack_bytes / MIB == pytest.approx(
        sum(size for name, size in real.weights.items() if name == "CPU_REPACK"), abs=LOG_STEP
    )


@pytest.mark.parametrize(
    "setup", [Setup(2048), Setup(8192, "q8_0", "q8_0"), Setup(8192, n_seq_max=4)], ids=str
)
def test_a_process_takes_that_much_memory(path: Path, setup: Setup) -> None:
    """Beside a process that allocates neither weights nor cache, but all else."""
    (answer,) = measure(of_header(path), setup)
    real, empty = (load_really(path, setup, is_real=flag, work=False) for flag in (True, False))
    taken = real.ready - empty.ready
    assert taken == pytest.approx(answer.weights_bytes + answer.kv_bytes, rel=0.03)


def test_a_header_alone_is_the_file(path: Path, answers: dict[Setup, Measurement]) -> None:
    setups = REAL_SETUPS[::3]
    assert measure(ChildAllocator([path]), *setups) == [answers[setup] for setup in setups]


def test_the_closed_form_agrees(path: Path, answers: dict[Setup, Measurement]) -> None:
    info = read_info([path])
    for setup, answer in answers.items():
        closed = estimate(info, setup)
        exact = calibrate(closed, answer)
        assert exact.source == "exact"
        assert exact.notes == closed.notes
        assert (exact.weights_bytes, exact.kv_bytes) == (answer.weights_bytes, answer.kv_bytes)
        assert exact.compute_bytes == answer.compute_bytes
        assert exact.repack_bytes == answer.repack_bytes


def test_without_reordering_nothing_is_reordered() -> None:
    with_it, without = measure(of_header(gemma3_path()), Setup(1024), Setup(1024, use_repack=False))
    assert without.repack_bytes == 0
    assert without.weights_bytes == pytest.approx(with_it.weights_bytes, rel=0.001)


def test_answers_are_kept_on_disk_and_found_by_others(tmp_path: Path) -> None:
    path = smollm2_path()
    info = read_info([path])
    setups = (Setup(512), Setup(1024, "q8_0", "q8_0"))
    first = of_header(path, info=info, cache=tmp_path).measure(setups)
    (file,) = tmp_path.iterdir()
    dead = ["/nonexistent/python"]
    # The file itself was measured by its header.
    again = ChildAllocator([path], info=info, cache=tmp_path, command=dead)
    assert again.measure(setups) == first
    assert again.problem is None
    more = ChildAllocator([path], info=info, cache=tmp_path, command=dead)
    assert more.measure([*setups, Setup(2048)]) == (*first, None)
    assert more.problem is not None
    other = replace(info, n_bytes=info.n_bytes + 1)
    assert ChildAllocator([path], info=other, cache=tmp_path, command=dead).measure(setups) == (
        None,
        None,
    )
    file.write_text('{"format": 1, "devices": [], "answers": {"[512')
    assert of_header(path, info=info, cache=tmp_path).measure(setups) == first
