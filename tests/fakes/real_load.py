"""A real load of a model in a process of its own: what llama.cpp logs and what the system counts.

    python -m tests.fakes.real_load '{"path": …, "setup": {…}, "is_real": true}'

prints {"weights", "kv", "compute"} in MiB as logged (0.01 MiB a buffer), by buffer, and
{"before", "ready", "worked"}: bytes of the process's anonymous memory before the load, with the
context there, and after one full micro-batch. `is_real` false allocates neither weights nor cache,
which leaves what is not in any buffer: vocabulary, graph, log.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmrun.fit.types import Setup

ROOT = Path(__file__).resolve().parents[2]
_SIZE = re.compile(r"(\S+)\s+(model|KV|RS|compute) buffer size =\s*([\d.]+) MiB")
_KINDS = {"model": "weights", "KV": "kv", "RS": "kv", "compute": "compute"}


@dataclass(frozen=True)
class RealLoad:
    """MiB of each buffer as logged; bytes of anonymous memory."""

    weights: dict[str, float]
    kv: dict[str, float]
    compute: dict[str, float]
    n_lines: dict[str, int]
    before: int
    ready: int
    worked: int


def load_really(path: Path, setup: Setup, *, is_real: bool = True, work: bool = True) -> RealLoad:
    request = {"path": str(path), "setup": asdict(setup), "is_real": is_real, "work": work}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.real_load", json.dumps(request)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return RealLoad(**json.loads(done.stdout))


def _anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", text)[1]) * 1024


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, dict[str, float]] = {kind: {} for kind in _KINDS.values()}
        self.n_lines: dict[str, int] = defaultdict(int)

    def emit(self, record: logging.LogRecord) -> None:
        if match := _SIZE.search(record.getMessage()):
            buffer, kind = match[1], _KINDS[match[2]]
            self.n_lines[kind] += 1
            sizes = self.sizes[kind]
            # A cache of windows and a full one have a line each.
            sizes[buffer] = sizes.get(buffer, 0.0) + float(match[3])


def _main(request: dict[str, Any]) -> None:
    from llmrun.engine.binding import load_library
    from llmrun.engine.params import fill_context_params, fill_model_params
    from llmrun.engine.types import EngineOptions

    lines = _Lines()
    logger = logging.getLogger("llmrun.llama")
    logger.addHandler(lines)
    logger.setLevel(logging.DEBUG)
    setup = request["setup"]
    C = load_library()
    options = EngineOptions(
        n_ctx=setup["n_ctx"],
        n_seq_max=setup["n_seq_max"],
        kv_unified=setup["kv_unified"],
        n_ubatch=setup["n_ubatch"],
        n_threads=2,
        type_k=setup["type_k"],
        type_v=setup["type_v"],
        flash_attn=setup["flash_attn"],
        use_mmap=False,
        use_repack=setup["use_repack"],
    )
    before = _anonymous_bytes()
    params, _keep = fill_model_params(C, options)
    params.no_alloc = not request["is_real"]
    model = C.llama_model_load_from_file(os.fsencode(request["path"]), params)
    ctx = C.llama_init_from_model(
        model,
        fill_context_params(C, options, n_outputs_max=setup["n_outputs_max"]),
    )
    ready = worked = _anonymous_bytes()
    if request["is_real"] and request["work"]:
        # A prompt that fills the cache, so that attention is as wide as it gets.
        n, n_ubatch = min(setup["n_ctx"] // setup["n_seq_max"], 2048), setup["n_ubatch"]
        tokens = (C.llama_token * n_ubatch)(*[5] * n_ubatch)
        for _ in range(max(1, n // n_ubatch)):
            assert C.llama_decode(ctx, C.llama_batch_get_one(tokens, min(n, n_ubatch))) == 0
        worked = _anonymous_bytes()
    print(
        json.dumps(
            {
                **lines.sizes,
                "n_lines": lines.n_lines,
                "before": before,
                "ready": ready,
                "worked": worked,
            }
        )
    )
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
