"""Asks the engine's library about devices and memory: the code of a short-lived child process.

    python -m llmrun.engine.probe

Reads one JSON object in the first line of stdin and answers with one JSON object on stdout.
Nothing else is written there; stderr is left to the library. A child, because the library ends the
process where it is misused, drivers can hang, and what a driver takes of a GPU's memory is given
back only at the end.

    {"task": "devices"}
      -> {"devices": [{"name", "description", "backend", "type", "free", "total"}],
          "features": ["AVX2"], "backends": ["CPU"], "version", "supports_gpu_offload"}

    {"task": "measure", "files": [...], "setups": [...], "folder"?, "limit_s"?}
      files   the shards in order: {"path"} of a real file; or {"name", "n_bytes"} with "header"
              (path of a file with its first bytes) or "n_header_bytes" (so many bytes of stdin
              behind the first line, one file's after the other's)
      setups  objects with the fields of `fit.types.Setup`
      folder  an empty folder for stand-ins of the files, deleted at the end here too, should the
              parent have been killed; made here without one
      keep_vocabulary?  true: load the model with all its tokens, which takes longer
      -> {"answers": [{"buffers": [[buffer, device, weights, kv, compute]]} | {"error"}],
          "devices": ["CUDA0"], "source": "breakdown" | "log", "version"}

A request that fails as a whole is answered with {"error": sentence} and exit code 0.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from llmrun.engine.binding import forget_log, load_library, recent_log
from llmrun.engine.ggml import BreakdownUnavailableError, BufferBytes, Ggml
from llmrun.engine.params import check_options, fill_context_params, fill_model_params
from llmrun.engine.stubs import StubSource, drop_vocabulary, write_stubs
from llmrun.engine.types import EngineOptions
from llmrun.errors import EngineError, LlmrunError, UsageError

Json = dict[str, Any]

_MAX_REQUEST_BYTES = 1 << 24
_MAX_N_CTX = 1 << 24  # the bookkeeping of the cells is really allocated, 52 bytes each
# Address space beyond what is there at the start, where no driver reserves any.
_SPARE_BYTES = 4 << 30
_DEFAULT_LIMIT_S = 60
_MIB = 1 << 20


def main() -> None:
    """Serve one request."""
    # An interrupt is the parent's to report; an orphan ends by itself.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _limit_time(_DEFAULT_LIMIT_S)
    _volunteer_for_oom()
    stdin = sys.stdin.buffer
    # Drivers greet on stdout.
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        answer = _answer(json.loads(stdin.readline(_MAX_REQUEST_BYTES)), stdin)
    except LlmrunError as error:
        answer = {"error": _sentence(error)}
    except Exception as error:  # noqa: BLE001 - the parent is told, whatever it is
        answer = {"error": f"{type(error).__name__}: {error}"}
    # The parent may have gone.
    with suppress(OSError), os.fdopen(stdout, "wb") as file:
        file.write(json.dumps(answer).encode() + b"\n")
    # What drivers do at a regular exit takes time, and can hang.
    os._exit(0)


def _answer(request: Json, stdin: BinaryIO) -> Json:
    if "limit_s" in request:
        _limit_time(request["limit_s"])
    if request.get("task") == "devices":
        return describe_devices()
    if request.get("task") == "measure":
        return _measure(request, stdin)
    return {"error": f"there is no task {request.get('task')!r}"}


def describe_devices() -> Json:
    """The answer to "devices", as this process sees them."""
    C = load_library()
    ggml = Ggml(C)
    devices = [
        {
            "name": device.name,
            "description": device.description,
            "backend": device.backend,
            "type": device.type,
            "free": device.free_bytes,
            "total": device.total_bytes,
        }
        for device in ggml.devices()
        if device.type != "meta"  # a view of the others
    ]
    return {
        "devices": devices,
        "features": ggml.features(),
        "backends": ggml.backends(),
        "version": _version(C),
        "supports_gpu_offload": bool(C.llama_supports_gpu_offload()),
    }


def _measure(request: Json, stdin: BinaryIO) -> Json:
    folder = Path(request.get("folder") or tempfile.mkdtemp(prefix="llmrun-"))
    try:
        sources = _read_sources(request["files"], stdin)
        C = load_library()
        meter = Meter(C, _list_ways(C, sources, folder, request))
        return {
            "answers": meter.measure(request["setups"]),
            "devices": meter.gpu_names,
            "source": meter.source,
            "version": _version(C),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read_sources(files: list[Json], stdin: BinaryIO) -> list[StubSource]:
    sources = []
    for file in files:
        if "path" in file:
            sources.append(StubSource(path=Path(file["path"])))
            continue
        if "header" in file:
            header = Path(file["header"]).read_bytes()
        else:
            header = stdin.read(file["n_header_bytes"])
        sources.append(StubSource(header, file["n_bytes"]))
    if not sources:
        raise EngineError("there is no file to measure")
    return sources


def _list_ways(
    C: Any, sources: list[StubSource], folder: Path, request: Json
) -> list[Callable[[], Path]]:
    """Functions that make a path to load from, the best first."""

    def whole() -> Path:
        return sources[0].path or write_stubs(sources, folder / "whole")

    slim = None if request.get("keep_vocabulary") else drop_vocabulary(Ggml(C), sources)
    if slim is None:
        return [whole]
    return [lambda: write_stubs(slim, folder / "slim"), whole]


class Meter:
    """Measures settings of one model, without allocating it.

    `ways` make a path to load from; the first one from which the model can be loaded is used.
    `source` is "breakdown", or "log" where the library tells its memory only there.
    """

    def __init__(self, C: Any, ways: Sequence[Callable[[], Path]]) -> None:
        self.source = "breakdown"
        self._C = C
        self._ways = list(ways)
        self._path: Path | None = None
        self._ggml = Ggml(C)
        self.gpu_names = self._ggml.gpu_names()
        self._log: _LogLines | None = None
        if not self.gpu_names:
            _limit_address_space()

    def measure(self, setups: list[Json]) -> list[Json]:
        """{"buffers"} or {"error"} of each setup, in order. The model is loaded once for all that
        place its weights alike. Raises EngineError when llama.cpp cannot read it."""
        answers: list[Json] = [{} for _ in setups]
        groups: dict[tuple[object, ...], list[tuple[int, Json, EngineOptions]]] = {}
        for i, setup in enumerate(setups):
            try:
                options = _to_options(setup)
                check_options(options)
                if options.n_ctx > _MAX_N_CTX:
                    raise EngineError(f"a context of {options.n_ctx} is too long to measure")
            except LlmrunError as error:
                answers[i] = {"error": _sentence(error)}
                continue
            key = (
                options.n_gpu_layers,
                options.n_cpu_moe,
                options.tensor_split,
                options.use_repack,
            )
            groups.setdefault(key, []).append((i, setup, options))
        for group in groups.values():
            try:
                model = self._load(group[0][2])
            except UsageError as error:
                for i, _, _ in group:
                    answers[i] = {"error": _sentence(error)}
                continue
            for i, setup, options in group:
                answers[i] = self._answer(model, setup, options)
            self._C.llama_model_free(model)
        return answers

    def _load(self, options: EngineOptions) -> Any:
        while True:
            try:
                path = self._path or self._ways[0]()
                model = self._load_from(path, options)
            except EngineError:
                if len(self._ways) == 1 or self._path is not None:
                    raise
                del self._ways[0]
            else:
                self._path = path
                return model

    def _load_from(self, path: Path, options: EngineOptions) -> Any:
        params, keep = fill_model_params(self._C, options)
        params.no_alloc = True
        # The library aborts the process in any other mode, the default included.
        params.load_mode = self._C.LLAMA_LOAD_MODE_NONE
        forget_log()
        model = self._C.llama_model_load_from_file(os.fsencode(path), params)
        del keep
        if not model:
            raise EngineError("llama.cpp cannot read this model", why=_find_reason(recent_log()))
        return model

    def _answer(self, model: Any, setup: Json, options: EngineOptions) -> Json:
        try:
            buffers = self._read(model, setup, options)
        except LlmrunError as error:
            return {"error": _sentence(error)}
        return {
            "buffers": [
                [use.buffer, use.device, use.weights_bytes, use.kv_bytes, use.compute_bytes]
                for use in buffers
            ]
        }

    def _read(self, model: Any, setup: Json, options: EngineOptions) -> list[BufferBytes]:
        if self._log is None:
            try:
                return self._with_context(model, setup, options, self._ggml.read_breakdown)
            except (BreakdownUnavailableError, AttributeError):
                self._log = _LogLines()
                self.source = "log"
        log = self._log
        log.lines.clear()
        if self.gpu_names and options.n_gpu_layers:
            raise EngineError("this build does not tell which device holds what")
        return self._with_context(
            model, setup, options, lambda _: [log.sum_up(self._C.llama_model_size(model))]
        )

    def _with_context(
        self,
        model: Any,
        setup: Json,
        options: EngineOptions,
        read: Callable[[Any], list[BufferBytes]],
    ) -> list[BufferBytes]:
        n_outputs_max = setup.get("n_outputs_max", 1)
        params = fill_context_params(self._C, options, n_outputs_max=n_outputs_max)
        forget_log()
        ctx = self._C.llama_init_from_model(model, params)
        if not ctx:
            raise EngineError("llama.cpp refuses these settings", why=_find_reason(recent_log()))
        try:
            return read(ctx)
        finally:
            self._C.llama_free(ctx)


class _LogLines(logging.Handler):
    """What llama.cpp logs while a context is created, for builds that tell their memory nowhere
    else. Without allocation its sizes of KV buffers are 0, but those of whole caches are right."""

    _CACHE = re.compile(r"\bsize =\s*([\d.]+) MiB \(")
    _COMPUTE = re.compile(r"(\S+) compute buffer size =\s*([\d.]+) MiB")

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logger = logging.getLogger("llmrun.llama")
        logger.addHandler(self)
        logger.setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def sum_up(self, weights_bytes: int) -> BufferBytes:
        """All of it as RAM; what is repacked is not told. Good to 0.01 MiB a buffer."""
        caches = 0.0
        compute: dict[str, float] = {}
        for line in self.lines:
            if match := self._CACHE.search(line):
                caches += float(match[1])
            if match := self._COMPUTE.search(line):
                compute[match[1]] = float(match[2])
        if not compute:
            raise EngineError("this build does not tell its memory")
        return BufferBytes(
            "CPU",
            "CPU",
            weights_bytes,
            round(caches * _MIB),
            round(sum(compute.values()) * _MIB),
        )


def _to_options(setup: Json) -> EngineOptions:
    return EngineOptions(
        n_ctx=setup["n_ctx"],
        n_seq_max=setup.get("n_seq_max", 1),
        kv_unified=setup.get("kv_unified", True),
        n_ubatch=setup.get("n_ubatch", 512),
        n_gpu_layers=setup.get("n_gpu_layers", -1),
        n_threads=1,
        type_k=setup.get("type_k", "f16"),
        type_v=setup.get("type_v", "f16"),
        flash_attn=setup.get("flash_attn", "auto"),
        use_mmap=False,
        use_repack=setup.get("use_repack", True),
        n_cpu_moe=setup.get("n_cpu_moe", 0),
        tensor_split=tuple(setup.get("tensor_split", ())),
    )


def _sentence(error: LlmrunError) -> str:
    return f"{error.message}: {error.why}" if error.why else error.message


def _find_reason(lines: list[str]) -> str | None:
    """The first cause among the log's last warnings and errors, without the names of functions."""
    words = [re.sub(r"^\w+: (error loading model: )?", "", line) for line in lines]
    if not words:
        return None
    # What follows only says that the above failed.
    echoes = ("llama_model_loader: failed to load model", "failed to load model")
    causes = [line for line in words if not line.startswith(echoes)]
    return (causes or words)[-1]


def _version(C: Any) -> str:
    return str(C.llama_version().decode("utf-8", "replace"))


def _limit_time(seconds: float) -> None:
    """End the process after `seconds` more, whatever it does then."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _volunteer_for_oom() -> None:
    """When memory runs out all the same, this process is the one to end (Linux)."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _limit_address_space() -> None:
    """A recurrent state is really allocated, and a header can claim any size of it."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        n_pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = n_pages * resource.getpagesize() + _SPARE_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    main()
