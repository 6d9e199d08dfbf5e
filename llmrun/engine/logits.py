"""The rows of logits of the last step, read in place with numpy."""

from __future__ import annotations

import ctypes
import math
import sys
from typing import Any

from llmrun.engine.types import NO_LOGPROB
from llmrun.errors import EngineError

# To choose the best of a row, numpy takes 1 ns a candidate less than llama.cpp, which copies the
# row into an array of candidates first; to import numpy takes 0.13 s.
_NUMPY_PAYS_AFTER = 100_000_000

_BLOCK = 256


class LogitRows:
    """Rows are numbered as in the batch. An array stands for a row until the next decode, and must
    not be written to. Lives in the engine's thread."""

    def __init__(self, C: Any, ctx: Any, n_vocab: int) -> None:
        self._row_type = ctypes.c_float * n_vocab
        # The binding's own function makes a pointer object for each row. The lock is released all
        # the same: on a GPU this is where the step is waited for.
        prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
        address = ctypes.cast(C._lib.llama_get_logits_ith, ctypes.c_void_p).value
        assert address is not None
        self._address_of = prototype(address)
        self._ctx = ctypes.cast(ctx, ctypes.c_void_p)
        # By address, since the library moves the rows where it needs more of them.
        self._arrays: dict[int, Any] = {}
        self._scratch: Any = None
        self._n_before_numpy = _NUMPY_PAYS_AFTER // n_vocab

    def read(self, row: int) -> Any:
        """The row's float32 logits. Raises EngineError for a row that has none."""
        address = self._address_of(self._ctx, row)
        array = self._arrays.get(address)
        return self._find_array(address, row) if array is None else array

    def find_best(self, row: int) -> int:
        """The token that llama.cpp's greedy sampler takes: the first of the largest."""
        array = self._arrays.get(self._address_of(self._ctx, row))
        if array is None:
            array = self.read(row)
        token = int(array.argmax())
        value = array.item(token)
        return token if value == value else _find_best_beside_nan(array)

    def pays(self) -> bool:
        """Whether the next token is cheaper chosen here than in C; to be asked once a token.

        A process that makes a few tokens never imports numpy for it, a long answer does.
        """
        self._n_before_numpy -= 1
        return self._n_before_numpy < 0 or "numpy" in sys.modules

    def logprobs(self, row: int, token: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
        """See `engine.backend.Backend.logprobs`."""
        import numpy as np

        logits = self.read(row)
        best = float(logits.max())
        if not math.isfinite(best):
            return NO_LOGPROB, []
        if self._scratch is None:
            self._scratch = np.empty_like(logits)
        np.subtract(logits, np.float32(best), out=self._scratch)
        np.exp(self._scratch, out=self._scratch)
        # log(sum(exp(logits))), safe from overflow; a sum of 262,144 is too long for float32.
        total = best + math.log(float(self._scratch.sum(dtype=np.float64)))
        top = [
            (int(other), max(float(logits[other]) - total, NO_LOGPROB))
            for other in (_find_top(np, logits, n_top) if n_top > 0 else ())
        ]
        return max(float(logits[token]) - total, NO_LOGPROB), top

    def _find_array(self, address: int | None, row: int) -> Any:
        import numpy as np

        if not address:
            raise EngineError(f"row {row} of the last batch has no logits")
        array = np.ctypeslib.as_array(self._row_type.from_address(address))
        self._arrays[address] = array
        return array


def _find_best_beside_nan(logits: Any) -> int:
    """As llama.cpp: a NaN is not larger than anything, nor anything larger than a NaN in the first
    place. numpy takes it for the largest."""
    import numpy as np

    return 0 if math.isnan(logits[0]) else int(np.nanargmax(logits))


def _find_top(np: Any, logits: Any, n: int) -> Any:
    """The `n` largest that are possible at all, the largest first, then the first.

    None of them is below the n-th largest maximum of blocks: that leaves few to be sorted, in a
    tenth of the time that a partition of all takes.
    """
    n_blocks = len(logits) // _BLOCK
    least = np.float32(-np.inf)
    if n_blocks >= n:
        maxima = logits[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).max(axis=1)
        least = np.partition(maxima, n_blocks - n)[n_blocks - n]
    found = np.flatnonzero((logits >= least) & (logits > -np.inf))
    return found[np.lexsort((found, -logits[found]))][:n]
