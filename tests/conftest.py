"""What holds for every test: nothing of the user's own is read or written, nothing but loopback
is reached.

It happens when this file is imported, before any test module: huggingface_hub and others read the
environment once, at import.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from hypothesis import settings

# A shared machine stalls now and then, so no example has a deadline. CI repeats the same examples:
# whether a change lands must not depend on luck; new examples are found by the runs of people.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

_HF_VARIABLES = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_")
# What tells the tests what to do, not llmrun.
_OUR_VARIABLES = ("LLMRUN_TEST_MODELS", "LLMRUN_REQUIRE_CHROMIUM")
_LOOK_VARIABLES = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES")


def _keep_pip_settings() -> None:
    """The test models come through the user's own pip: its config file and cache stay in use."""
    home = Path.home()
    config_home = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    candidates = [
        config_home / "pip" / "pip.conf",
        home / "Library" / "Application Support" / "pip" / "pip.conf",
        home / ".pip" / "pip.conf",
        Path(os.environ.get("APPDATA") or home) / "pip" / "pip.ini",
    ]
    for path in candidates:
        if path.is_file():
            os.environ.setdefault("PIP_CONFIG_FILE", str(path))
            break
    os.environ.setdefault("PIP_CACHE_DIR", str(platformdirs.user_cache_path("pip")))


def _isolate(home: Path) -> None:
    models = str(platformdirs.user_cache_path("llmrun-tests"))
    os.environ.setdefault("LLMRUN_TEST_MODELS", models)
    _keep_pip_settings()
    for name in list(os.environ):
        foreign = name.startswith("LLMRUN_") and name not in _OUR_VARIABLES
        if foreign or name.startswith(_HF_VARIABLES) or name in _LOOK_VARIABLES:
            del os.environ[name]
    for name, folder in {
        "HOME": home,
        "USERPROFILE": home,
        "XDG_CONFIG_HOME": home / "config",
        "XDG_DATA_HOME": home / "data",
        "XDG_STATE_HOME": home / "state",
        "XDG_CACHE_HOME": home / "cache",
        "APPDATA": home / "appdata",
        "LOCALAPPDATA": home / "localappdata",
        "HF_HOME": home / "hf",
        "HF_HUB_CACHE": home / "hf" / "hub",
    }.items():
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(folder)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # Port 9 is the discard service, which nobody runs: a test that forgets its own hub finds none,
    # in child processes too.
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))


def _is_loopback(host: object) -> bool:
    text = host.decode() if isinstance(host, bytes) else host
    if text in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(text).partition("%")[0]).is_loopback
    except ValueError:
        return False


def _guard_sockets() -> None:
    def guarded(method: Callable[..., object]) -> Callable[..., object]:
        def call(self: socket.socket, *args: object) -> object:
            address = args[-1]
            is_internet = self.family in (socket.AF_INET, socket.AF_INET6)
            if is_internet and isinstance(address, tuple) and not _is_loopback(address[0]):
                raise OSError(errno.ENETUNREACH, f"tests reach 127.0.0.1 only, not {address[0]}")
            return method(self, *args)

        return call

    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
    real_getaddrinfo = socket.getaddrinfo

    def getaddrinfo(host: object, *args: object, **kwargs: object) -> object:
        if not _is_loopback(host):
            raise socket.gaierror(socket.EAI_NONAME, f"tests look up no names: {host!r}")
        return real_getaddrinfo(host, *args, **kwargs)  # type: ignore[arg-type]

    socket.getaddrinfo = getaddrinfo  # type: ignore[assignment]


_home = Path(tempfile.mkdtemp(prefix="llmrun-tests-"))
_isolate(_home)
_guard_sockets()
# A failed assertion in llama.cpp must not fork a debugger under a test.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
assert "huggingface_hub" not in sys.modules


def pytest_unconfigure() -> None:
    shutil.rmtree(_home, ignore_errors=True)
