"""The one place that imports llama-cpp-python: its low-level binding, and llama.cpp's log.

Pointers are ctypes values of the binding and typed Any, here and wherever they are used.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from typing import Any

from llmrun.engine.ggml import Ggml
from llmrun.engine.logs import LogSink
from llmrun.errors import EngineError

MIN_BINDING = "0.3.36"

# The log is global in llama.cpp, so the sink and the C callback object are too: the library calls
# them until the process ends.
_log_sink = LogSink()
_log_callback: Any = None


def import_binding(module: str = "llama_cpp") -> Any:
    """A module of the llama_cpp package without running the package's `__init__`.

    The `__init__` imports the high-level class with numpy and jinja2 (0.1 s at every start), and
    installs a logger that prints. What the process imported already is used as it is.
    """
    _limit_spinning()
    # A failed assertion must not fork a debugger.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    if "llama_cpp" not in sys.modules:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.submodule_search_locations is None:
            raise EngineError(
                "llama-cpp-python is not installed",
                hint=f"pip install 'llama-cpp-python>={MIN_BINDING}'",
            )
        package = types.ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["llama_cpp"] = package
    try:
        return importlib.import_module(f"llama_cpp.{module}")
    except (OSError, RuntimeError, AttributeError, ImportError) as error:
        raise EngineError(
            "the llama.cpp library cannot be loaded",
            why=str(error),
            hint=f"pip install --force-reinstall --no-cache-dir 'llama-cpp-python>={MIN_BINDING}'",
        ) from error


def _limit_spinning() -> None:
    """How long threads of OpenMP spin for each other before they sleep; read when it loads.

    GNU's 300,000 turns make two busy programs on one machine stop each other. But once a process
    has more threads than cores, as with a second model, it spins 100 times instead, and one token
    took 1.5 times as long: with the policy "active" that is 1000, too.
    """
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ["GOMP_SPINCOUNT"] = "1000"
    if sys.platform == "linux":
        os.environ["OMP_WAIT_POLICY"] = "active"
        # LLVM's OpenMP would spin for ever. This is its own figure, in milliseconds.
        os.environ.setdefault("KMP_BLOCKTIME", "200")


def load_library() -> Any:
    """The binding, initialised, with its log routed to ours."""
    global _log_callback
    C = import_binding()
    if _log_callback is None:
        _log_callback = C.llama_log_callback(_log_sink.write)
        C.llama_log_set(_log_callback, None)
        C.llama_backend_init()
        Ggml(C).load_backends()
    return C


def recent_log() -> list[str]:
    """The last warnings and errors in llama.cpp's log since `forget_log`, the newest last."""
    return list(_log_sink.recent)


def last_reason() -> str | None:
    """The most recent of them in one line, for the `why` of an error."""
    return _log_sink.last_reason()


def forget_log() -> None:
    _log_sink.recent.clear()
