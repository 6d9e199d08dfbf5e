"""Rows of logits read with numpy: the best, the likeliest, and their probabilities."""

from __future__ import annotations

import ctypes
import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.engine import logits as logits_module
from llmrun.engine.binding import import_binding
from llmrun.engine.logits import LogitRows
from llmrun.engine.types import NO_LOGPROB
from llmrun.errors import EngineError

INF, NAN = math.inf, math.nan


class FakeLibrary:
    """Its rows are numpy arrays; a row that is not there has no address, as in llama.cpp."""

    def __init__(self) -> None:
        self.rows: dict[int, Any] = {}
        kind = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
        self._lib = SimpleNamespace(llama_get_logits_ith=kind(self._address))

    def _address(self, _ctx: int, row: int) -> int | None:
        return self.rows[row].ctypes.data if row in self.rows else None


def rows_of(*values: Any) -> LogitRows:
    library = FakeLibrary()
    for row, row_values in enumerate(values):
        library.rows[row] = np.array(row_values, np.float32)
    rows = LogitRows(library, ctypes.c_void_p(1), len(values[0]))
    rows.library = library  # type: ignore[attr-defined]  # kept alive
    return rows


def random_row(n: int, seed: int = 0, scale: float = 4.0) -> Any:
    return np.random.default_rng(seed).normal(0, scale, n).astype(np.float32)


def greedy_in_c(values: Any) -> int:
    """By llama.cpp's own sampler."""
    C = import_binding()
    data = (C.llama_token_data * len(values))()
    for token, value in enumerate(values):
        data[token].id, data[token].logit = token, value
    array = C.llama_token_data_array(data, len(values), -1, False)
    sampler = C.llama_sampler_init_greedy()
    C.llama_sampler_apply(sampler, ctypes.byref(array))
    C.llama_sampler_free(sampler)
    return int(array.data[array.selected].id)


# ---- rows


def test_rows_are_read_where_they_are_now() -> None:
    """The buffer may be moved between two steps, and filled anew in place."""
    rows = rows_of([1.0, 2.0], [4.0, 3.0])
    assert (list(rows.read(0)), list(rows.read(1))) == ([1, 2], [4, 3])
    library: FakeLibrary = rows.library  # type: ignore[attr-defined]
    library.rows[0][:] = [9, 8]
    assert (list(rows.read(0)), rows.find_best(0)) == ([9, 8], 0)
    library.rows[0], old = np.array([5, 6], np.float32), library.rows[0]
    old[:] = 0
    assert (list(rows.read(0)), rows.find_best(0)) == ([5, 6], 1)


@pytest.mark.parametrize("call", ["read", "find_best"])
def test_a_row_without_logits_is_an_error(call: str) -> None:
    with pytest.raises(EngineError, match="row 7"):
        getattr(rows_of([1.0]), call)(7)


# ---- the best

CASES = {
    "one": [3.0],
    "a tie": [1.0, 7.0, 7.0, 7.0],
    "all the same": [0.0] * 40,
    "zeros of both signs": [-0.0, 0.0],
    "zeros of both signs, turned": [0.0, -0.0],
    "nothing possible": [-INF] * 5,
    "one possible": [-INF, -INF, -9.0],
    "infinite": [1.0, INF, INF],
    "NaN first": [NAN, 1.0, 2.0],
    "NaN last": [1.0, 2.0, NAN],
    "NaN before the best": [1.0, NAN, 2.0, NAN, 2.0],
    "NaN only": [NAN, NAN],
    "NaN and nothing possible": [-INF, NAN, -INF],
}


@pytest.mark.parametrize("name", CASES)
def test_the_best_is_what_the_library_takes(name: str) -> None:
    assert rows_of(CASES[name]).find_best(0) == greedy_in_c(CASES[name])


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.5, 2.0, -3.0, INF, -INF, NAN]), min_size=1, max_size=80)
)
def test_the_best_of_any_row(values: list[float]) -> None:
    assert rows_of(values).find_best(0) == greedy_in_c(values)


@pytest.mark.parametrize("n", [300, 4099, 20_001])
def test_the_first_of_equal_ones_in_long_rows(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(30):
        values = rng.integers(0, 50, n).astype(np.float32)
        assert rows_of(values).find_best(0) == greedy_in_c(values)


def test_numpy_is_not_imported_for_a_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_module, "_NUMPY_PAYS_AFTER", 1000)
    rows = rows_of([0.0] * 100)
    assert rows.pays()  # it is there already
    monkeypatch.delitem(sys.modules, "numpy")
    rows = LogitRows(FakeLibrary(), ctypes.c_void_p(1), 100)
    assert [rows.pays() for _ in range(12)] == [False] * 10 + [True] * 2


# ---- probabilities


def exact(values: Any, n_top: int) -> tuple[Any, list[int]]:
    wide = np.asarray(values, np.float64)
    best = wide.max()
    logprobs = wide - (best + np.log(np.exp(wide - best).sum()))
    order = sorted(range(len(wide)), key=lambda token: (-wide[token], token))
    return logprobs, [token for token in order if wide[token] > -INF][:n_top]


@pytest.mark.parametrize("n", [1, 2, 19, 255, 256, 257, 5119, 5120, 5121, 49_152])
@pytest.mark.parametrize("n_top", [0, 1, 2, 5, 20])
def test_probabilities_of_any_row(n: int, n_top: int) -> None:
    values = random_row(n, seed=n)
    logprobs, order = exact(values, n_top)
    rows = rows_of(values)
    for token in {0, n // 2, n - 1, order[0] if order else 0}:
        logprob, top = rows.logprobs(0, token, n_top)
        assert logprob == pytest.approx(logprobs[token], abs=1e-5)
        assert [other for other, _ in top] == order
        assert [chance for _, chance in top] == pytest.approx(list(logprobs[order]), abs=1e-5)


def test_many_small_ones_beside_a_large_one_count() -> None:
    values = np.full(262_144, -14.0, np.float32)
    values[7] = 0.0
    logprobs, _ = exact(values, 0)
    assert rows_of(values).logprobs(0, 7, 0)[0] == pytest.approx(logprobs[7], abs=1e-6)


@pytest.mark.parametrize("shift", [-3e4, 0.0, 3e4])
def test_large_logits_do_not_overflow(shift: float) -> None:
    logprob, top = rows_of([shift, shift, shift - 1000]).logprobs(0, 0, 3)
    assert logprob == pytest.approx(math.log(0.5))
    assert [token for token, _ in top] == [0, 1, 2]
    assert top[2][1] == pytest.approx(math.log(0.5) - 1000)


@pytest.mark.parametrize("n", [30, 9000])
@pytest.mark.parametrize("n_top", [1, 5, 20])
def test_equal_ones_come_in_their_order(n: int, n_top: int) -> None:
    values = np.random.default_rng(n).integers(0, 6, n).astype(np.float32)
    top = rows_of(values).logprobs(0, 0, n_top)[1]
    assert [token for token, _ in top] == exact(values, n_top)[1]
    assert top[0][0] == rows_of(values).find_best(0)


def test_what_cannot_come_is_not_among_the_likely() -> None:
    values = np.full(9000, -INF, np.float32)
    values[[5000, 8999]] = 1.0, 2.0
    logprob, top = rows_of(values).logprobs(0, 3, 20)
    assert logprob == NO_LOGPROB
    assert [token for token, _ in top] == [8999, 5000]
    far = rows_of([0.0, -3e38]).logprobs(0, 1, 2)
    assert far == (NO_LOGPROB, [(0, 0.0), (1, NO_LOGPROB)])


@pytest.mark.parametrize(
    "values", [[NAN, 1.0], [1.0, NAN], [INF, 1.0], [-INF, -INF]], ids=lambda values: str(values)
)
def test_a_broken_row_has_no_probabilities_but_harms_nobody(values: list[float]) -> None:
    assert rows_of(values).logprobs(0, 0, 5) == (NO_LOGPROB, [])


def test_the_row_is_left_as_it_is() -> None:
    """The sampler reads it afterwards."""
    values = random_row(6000)
    rows = rows_of(values)
    rows.logprobs(0, 0, 20)
    assert np.array_equal(rows.read(0), values)
