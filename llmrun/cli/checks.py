"""What `doctor` looks at. Each check runs beside the others and under a time limit, so that a sick
driver, a dead mount or a silent network costs seconds, never the report."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmrun import __version__
from llmrun.cli.doctor import (
    BuildData,
    Check,
    CpuData,
    DeviceData,
    DoctorResult,
    MachineData,
    MemoryData,
)
from llmrun.cli.options import Invocation
from llmrun.errors import AuthError, HubUnreachableError, LlmrunError, NotFoundError
from llmrun.text import escape_line, format_bytes, format_duration

if TYPE_CHECKING:
    from llmrun.hardware.engine_devices import EngineReport
    from llmrun.hardware.machine import Machine

# Variables that change what llmrun or the libraries below it do.
_VARIABLES = re.compile(
    r"(LLMRUN|HF|GGML|LLAMA|OMP|GOMP|CUDA|HIP|ROCR|HSA|GPU|VK|SYCL|ONEAPI|METAL)_\w+"
    r"|TRANSFORMERS_OFFLINE|HUGGINGFACE_HUB_CACHE|XDG_\w+_HOME|NO_COLOR"
    r"|(HTTP|HTTPS|ALL|NO)_PROXY",
    re.IGNORECASE,
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
_TOKEN_TEXT = re.compile(r"hf_\w+|Bearer\s+\S+")
_USER_IN_URL = re.compile(r"://[^/@\s]*@")
# Seconds. Those that start a process are above that process's own limit.
LIMITS_S = {
    "machine": 40.0,
    "build": 25.0,
    "hardware": 70.0,
    "allocator": 30.0,
    "models": 15.0,
    "folders": 10.0,
    "hub": 20.0,
    "environment": 5.0,
}
LITTLE_DISK_BYTES = 2 * 10**9
_BINDING = "llama-cpp-python"
_SPARE = "/path/with/room"


class _Report:
    """What the checks found out beside their verdicts."""

    def __init__(self) -> None:
        self.machine: Machine | None = None
        self.engine: EngineReport | None = None
        self._looked_at = threading.Semaphore(0)

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._looked_at.release()

    def wait(self, limit_s: float) -> None:
        """Until machine and engine were looked at, whatever came of it."""
        deadline = time.monotonic() + limit_s
        for _ in range(2):
            self._looked_at.acquire(timeout=max(0.0, deadline - time.monotonic()))


def examine(invocation: Invocation) -> DoctorResult:
    """Run every check. Never raises for what it finds; returns after the longest limit at most."""
    report = _Report()
    looks: dict[str, Callable[[], list[Check]]] = {
        "machine": lambda: _check_machine(invocation, report),
        "build": lambda: _check_build(invocation, report),
        "hardware": lambda: _check_hardware(invocation, report),
        "allocator": lambda: _check_allocator(invocation),
        "models": lambda: _check_models(invocation),
        "folders": lambda: _check_folders(invocation),
        "hub": lambda: _check_hub(invocation),
        "environment": lambda: _check_environment(invocation),
    }
    jobs = [_Job(name, LIMITS_S[name], look) for name, look in looks.items()]
    home = str(Path.home())
    checks = tuple(
        Check(
            check.name,
            check.status,
            redact(check.detail, home),
            None if check.hint is None else redact(check.hint, home),
        )
        for job in jobs
        for check in job.checks()
    )
    return DoctorResult(checks, _machine_data(report.machine), _build_data(report.engine, home))


class _Job:
    """One group of checks in a thread of its own. A thread that does not come back is left behind:
    it is a daemon, so the process can end without it."""

    def __init__(self, name: str, limit_s: float, run: Callable[[], list[Check]]) -> None:
        self._name = name
        self._limit_s = limit_s
        self._run = run
        self._found: list[Check] | None = None
        self._done = threading.Event()
        self._deadline = time.monotonic() + limit_s
        threading.Thread(target=self._work, name=f"doctor-{name}", daemon=True).start()

    def _work(self) -> None:
        try:
            self._found = self._run()
        except LlmrunError as error:
            why = f": {error.why}" if error.why else ""
            self._found = [Check(self._name, "fail", error.message + why, error.hint)]
        except Exception as error:  # noqa: BLE001 - one broken check must not hide the others
            self._found = [Check(self._name, "fail", f"{type(error).__name__}: {error}")]
        finally:
            self._done.set()

    def checks(self) -> list[Check]:
        """What it found, at the latest when its time is up."""
        if self._done.wait(max(0.0, self._deadline - time.monotonic())) and self._found is not None:
            return self._found
        return [Check(self._name, "fail", f"no answer within {self._limit_s:g} s")]


def redact(text: str, home: str) -> str:
    """`text` without tokens, passwords in addresses, and the name of the home folder."""
    text = _USER_IN_URL.sub("://…@", _TOKEN_TEXT.sub("…", text))
    return text.replace(home, "~") if len(home) > 1 else text


# ---- machine


def _check_machine(invocation: Invocation, report: _Report) -> list[Check]:
    from llmrun.hardware.threads import choose_threads

    with report.looking():
        machine = report.machine = invocation.services.machine()
    cpu, memory = machine.cpu, machine.memory
    reasons = "; ".join(choose_threads(cpu).reasons)
    name = cpu.name or machine.name or machine.arch
    features = f"\n{' '.join(cpu.features)}" if cpu.features else ""
    checks = [Check("cpu", "ok", f"{escape_line(name)}: {reasons}{features}")]
    if memory.is_known:
        free = f"{format_bytes(memory.available_bytes)} of {format_bytes(memory.total_bytes)}"
        source = "" if memory.limit_source == "system" else f", by {memory.limit_source}"
        checks.append(Check("memory", "ok", f"{free} available{source}"))
    for device in machine.devices:
        shared = ", shared with the CPU" if device.shares_host_memory else ""
        free = f"{format_bytes(device.free_bytes)} of {format_bytes(device.total_bytes)} free"
        what = f"{device.name}: {escape_line(device.description)}, {free}{shared}"
        checks.append(Check("gpu", "ok", what))
    if not machine.devices:
        checks.append(Check("gpu", "ok", "none that the engine can use: models run on the CPU"))
    return checks + [Check("machine", "ok", note) for note in machine.notes]


def _check_hardware(invocation: Invocation, report: _Report) -> list[Check]:
    """What is there and not used. Waits for the two checks that look at machine and engine."""
    report.wait(LIMITS_S["machine"])
    machine, engine = report.machine, report.engine
    if machine is None or engine is None:
        return []  # told by those checks
    return [
        Check("hardware", "warn", f"{problem.what}: {problem.why}", problem.hint)
        for problem in invocation.services.find_problems(machine, engine)
        # An engine that does not load is told, as a failure, by the check of the build.
        if engine.problem is None or engine.problem not in (problem.what, problem.why)
    ]


def _machine_data(machine: Machine | None) -> MachineData | None:
    from llmrun.hardware.threads import choose_threads

    if machine is None:
        return None
    cpu, memory = machine.cpu, machine.memory
    return MachineData(
        name=machine.name,
        platform=machine.platform,
        arch=machine.arch,
        cpu=CpuData(
            name=cpu.name,
            logical=cpu.n_logical,
            usable=cpu.n_affinity,
            cores=cpu.n_physical,
            quota=cpu.quota,
            threads=choose_threads(cpu).n_threads,
            features=cpu.features,
        ),
        memory=MemoryData(memory.total_bytes, memory.available_bytes, memory.limit_source),
        devices=tuple(
            DeviceData(
                name=device.name,
                description=device.description,
                backend=device.backend,
                free=device.free_bytes,
                total=device.total_bytes,
                shared=device.shares_host_memory,
            )
            for device in machine.devices
        ),
    )


# ---- build


def _check_build(invocation: Invocation, report: _Report) -> list[Check]:
    version = _binding_version()
    what = f"llmrun {__version__}, Python {platform.python_version()}, {_BINDING} {version or '?'}"
    started = time.perf_counter()
    with report.looking():
        engine = report.engine = invocation.services.describe_engine()
    took = format_duration(time.perf_counter() - started)
    if engine.problem is not None:
        return [Check("build", "fail", f"{what}: {engine.problem}", _reinstall())]
    backends = ", ".join(engine.backends) or "none"
    features = " ".join(engine.features)
    detail = f"{what}, llama.cpp {engine.version or '?'} (loads in {took})"
    return [Check("build", "ok", f"{detail}\nbackends: {backends}\n{features}".rstrip())]


def _build_data(engine: EngineReport | None, home: str) -> BuildData:
    path = _binding_path()
    return BuildData(
        llmrun=__version__,
        python=platform.python_version(),
        binding=_binding_version(),
        llama_cpp=engine.version if engine else None,
        backends=engine.backends if engine else (),
        features=engine.features if engine else (),
        path=None if path is None else redact(str(path), home),
    )


def _binding_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(_BINDING)
    except PackageNotFoundError:
        return None


def _binding_path() -> Path | None:
    from importlib.util import find_spec

    spec = find_spec("llama_cpp")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


def _reinstall() -> str:
    from llmrun.engine.binding import MIN_BINDING

    return f"{sys.executable} -m pip install --force-reinstall '{_BINDING}>={MIN_BINDING}'"


def _check_allocator(invocation: Invocation) -> list[Check]:
    """Ask llama.cpp's allocator about the smallest model there is, as every download does."""
    from llmrun.cli.tiny_model import tiny_header
    from llmrun.fit.types import Setup
    from llmrun.hardware.machine import Cpu, Machine, Memory

    header, n_bytes = tiny_header()
    started = time.perf_counter()
    allocator = invocation.services.allocator_of_headers(
        [("tiny.gguf", header, n_bytes)], None, Machine(Cpu(1, 1, 1), Memory(0, 0))
    )
    (answer,) = allocator.measure([Setup(n_ctx=256)])
    took = format_duration(time.perf_counter() - started)
    if answer is None or answer.weights_bytes <= 0:
        why = allocator.problem or "it gave no answer"
        detail = f"llama.cpp's allocator cannot be asked: {why}\nmemory is computed instead"
        return [Check("allocator", "warn", detail, "llmrun doctor -vv")]
    return [Check("allocator", "ok", f"llama.cpp says what a model needs (asked in {took})")]


# ---- folders


def _check_models(invocation: Invocation) -> list[Check]:
    cache = invocation.services.hub_cache
    stored = invocation.services.store().models()
    size = format_bytes(sum(model.n_bytes for model in stored))
    n_models = sum(model.state == "complete" for model in stored)
    place = _existing(cache)
    free = shutil.disk_usage(place).free
    what = f"{cache}: {n_models} model{'s' * (n_models != 1)}, {size}; {format_bytes(free)} free"
    problem = _why_not_writable(place)
    if problem is not None:
        return [Check("models", "fail", f"{what}\n{problem}", f"export HF_HUB_CACHE={_SPARE}")]
    if free < LITTLE_DISK_BYTES:
        return [Check("models", "warn", f"{what}: little room for models", "llmrun prune")]
    return [Check("models", "ok", what)]


def _check_folders(invocation: Invocation) -> list[Check]:
    from llmrun.config import read_config_file

    environment = invocation.environment
    path = environment.config_path
    checks = []
    try:
        n_set = len(read_config_file(path))
        what = f"{path}: {n_set} setting{'s' * (n_set != 1)}" if path.exists() else f"{path}: none"
        checks.append(Check("config", "ok", what))
    except LlmrunError as error:
        why = f": {error.why}" if error.why else ""
        checks.append(Check("config", "fail", error.message + why, error.hint))
    for name in ("state", "data", "cache"):
        folder: Path = getattr(environment, f"{name}_dir")
        problem = _why_not_writable(_existing(folder))
        if problem is None:
            checks.append(Check(name, "ok", str(folder)))
        else:
            hint = f"export XDG_{name.upper()}_HOME={_SPARE}"
            checks.append(Check(name, "fail", f"{folder}: {problem}", hint))
    return checks


def _existing(folder: Path) -> Path:
    """`folder`, or the closest folder above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def _why_not_writable(folder: Path) -> str | None:
    """What keeps files from being made in `folder`; None when they can be."""
    path = folder / f".llmrun-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        path.touch(exist_ok=False)
        path.unlink()
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None


# ---- hub and environment


def _check_hub(invocation: Invocation) -> list[Check]:
    environ = invocation.environment.environ
    token = _check_token()
    offline = _why_offline(invocation)
    if offline is not None:
        return [Check("hub", "ok", f"not asked: {offline}"), token]
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    hub = invocation.services.hub(offline=False)
    (repo,) = [e.repo for e in invocation.services.catalog().entries()][:1] or ["gpt2"]
    started = time.perf_counter()
    try:
        hub.commit_of(repo, "main")
    except NotFoundError:
        pass  # a mirror need not have this very repository
    except AuthError as error:
        why = f"{endpoint} refuses the login: {error.message}"
        return [Check("hub", "fail", why, error.hint or "hf auth login"), token]
    except HubUnreachableError as error:
        why = f"{endpoint} cannot be reached" + (f": {error.why}" if error.why else "")
        proxied = any(name in environ for name in ("HTTPS_PROXY", "https_proxy"))
        hint = "check HTTPS_PROXY" if proxied else f"curl -I {endpoint}"
        return [Check("hub", "fail", why, hint), token]
    took = format_duration(time.perf_counter() - started)
    return [Check("hub", "ok", f"{endpoint} answers in {took}"), token]


def _why_offline(invocation: Invocation) -> str | None:
    from llmrun.config import read_config_file

    if invocation.settings.offline:
        return f"--offline is in force ({invocation.settings.sources['offline']})"
    try:
        if read_config_file(invocation.environment.config_path).get("offline") is True:
            return "the config file says offline"
    except LlmrunError:
        pass  # told by the check of the file
    if invocation.services.hub(offline=False).offline:
        return "HF_HUB_OFFLINE is in force"
    return None


def _check_token() -> Check:
    """Whether there is a token. Its text never leaves this function."""
    from huggingface_hub import constants, get_token

    token = get_token()
    if not token:
        return Check("token", "ok", "none: only gated repositories ask for one")
    host = constants.ENDPOINT.partition("://")[2].partition(":")[0].partition("/")[0]
    if constants.ENDPOINT.startswith("http://") and host not in ("localhost", "127.0.0.1"):
        what = f"it would be sent to {constants.ENDPOINT} without encryption"
        return Check("token", "warn", what, f"export HF_ENDPOINT=https://{host}")
    where = "in HF_TOKEN" if os.environ.get("HF_TOKEN") else "stored by hf auth login"
    return Check("token", "ok", f"present, {where}")


def _check_environment(invocation: Invocation) -> list[Check]:
    found = {
        name: value
        for name, value in sorted(invocation.environment.environ.items())
        if _VARIABLES.fullmatch(name)
    }
    if not found:
        return [Check("environment", "ok", "no variable changes what llmrun does")]
    lines = [
        f"{escape_line(name)} {'is set' if _SECRET.search(name) else '= ' + escape_line(value)}"
        for name, value in found.items()
    ]
    return [Check("environment", "ok", "\n".join(lines))]
