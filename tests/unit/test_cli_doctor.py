"""`llmrun doctor`, each fault injected."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from llmrun.cli import checks
from llmrun.errors import AuthError, EngineError, HubUnreachableError
from llmrun.fit.types import BufferUse, Measurement
from llmrun.hardware.engine_devices import EngineReport
from llmrun.hardware.machine import Cpu, Device, Machine, Memory
from llmrun.hardware.problem import Problem
from tests.fakes.cli import GB, Cli, FakeServices, Run
from tests.fakes.header_hub import HeaderHub


class TinyAllocator:
    """Implements `fit.types.Allocator` for any model."""

    devices = ()
    problem = None

    def measure(self, setups):
        use = BufferUse("CPU", "CPU", 1000, 100, 10)
        return tuple(Measurement(setup, (use,)) for setup in setups)


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def make_cli(folder: Path, **more) -> Cli:
    more.setdefault("hub", HeaderHub("lfm2-1.2b", ["q8_0"]))
    more.setdefault("allocator", TinyAllocator())
    return Cli(folder, **more)


def check(run: Run, name: str, at: int = 0) -> dict[str, str]:
    return [found for found in run.data["checks"] if found["name"] == name][at]


def test_all_well(tmp_path: Path) -> None:
    cli = make_cli(tmp_path)
    run = cli("doctor")
    assert run.code == 0 and run.err == "nothing is wrong\n"
    for name in ("cpu", "memory", "gpu", "build", "allocator", "models", "config", "hub", "token"):
        assert f"✓ ok    {name} " in run.out
    assert "fail" not in run.out and "try:" not in run.out
    as_json = cli("doctor", "--json")
    assert as_json.code == 0 and as_json.err == ""
    assert {found["status"] for found in as_json.data["checks"]} == {"ok"}
    assert as_json.data["machine"]["memory"]["available"] == 16 * GB
    assert as_json.data["build"]["backends"] == ["CPU"]


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    make_cli(tmp_path)("doctor")
    assert list(tmp_path.iterdir()) == []


def test_a_warning_is_no_failure(tmp_path: Path) -> None:
    class UnusedGpu(FakeServices):
        def find_problems(self, machine: Machine, engine: EngineReport) -> tuple[Problem, ...]:
            assert machine.memory.is_known and engine.backends == ("CPU",)
            return (Problem("an RTX 4090 is not used", "it is a CPU build", "pip install x"),)

    cli = make_cli(tmp_path, services=UnusedGpu)
    run = cli("doctor")
    assert run.code == 0 and run.err == "1 warning, nothing failed\n"
    assert "! warn  hardware     an RTX 4090 is not used: it is a CPU build" in run.out
    assert "try: pip install x" in run.out


def test_a_failure_is_1_and_names_itself(tmp_path: Path) -> None:
    class NoLibrary(FakeServices):
        def describe_engine(self) -> EngineReport:
            return EngineReport(problem="llama-cpp-python is not installed")

        def find_problems(self, machine: Machine, engine: EngineReport) -> tuple[Problem, ...]:
            return (Problem("llama-cpp-python is not installed", "it computes", "pip install it"),)

    cli = make_cli(tmp_path, services=NoLibrary)
    run = cli("doctor")
    assert run.code == 1 and "error: 1 check failed: build\ntry: " in run.err
    as_json = cli("doctor", "--json")
    assert as_json.code == 1 and as_json.envelope["status"] == "error"
    assert "not installed" in check(as_json, "build")["detail"]
    assert "pip install" in check(as_json, "build")["hint"]
    # It is told once.
    assert [found["name"] for found in as_json.data["checks"]].count("hardware") == 0


def test_gpus_that_can_be_used(tmp_path: Path) -> None:
    gpu = Device("CUDA0", "NVIDIA RTX 4090", "gpu", 20 * GB, 24 * GB, backend="CUDA")
    run = make_cli(tmp_path, devices=(gpu,))("doctor", "--json")
    assert check(run, "gpu")["detail"] == "CUDA0: NVIDIA RTX 4090, 20.0 GB of 24.0 GB free"
    (device,) = run.data["machine"]["devices"]
    assert (device["name"], device["free"], device["shared"]) == ("CUDA0", 20 * GB, False)


def test_notes_about_the_machine_are_shown(tmp_path: Path) -> None:
    class Contained(FakeServices):
        def machine(self) -> Machine:
            memory = Memory(4 * GB, 3 * GB, "cgroup /")
            return Machine(Cpu(8, 8, 4), memory, notes=("a limit gives it 4 GB",))

    run = make_cli(tmp_path, services=Contained)("doctor", "--json")
    assert check(run, "memory")["detail"] == "3.00 GB of 4.00 GB available, by cgroup /"
    assert check(run, "machine")["detail"] == "a limit gives it 4 GB"


def test_an_allocator_that_does_not_answer_is_a_warning(tmp_path: Path) -> None:
    run = make_cli(tmp_path, allocator=None)("doctor", "--json")
    found = check(run, "allocator")
    assert run.code == 0 and found["status"] == "warn" and "this one is a fake" in found["detail"]


def test_a_check_that_hangs_costs_its_limit_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    class Sick(FakeServices):
        def describe_engine(self) -> EngineReport:
            released.wait(60)
            return super().describe_engine()

    monkeypatch.setattr(checks, "LIMITS_S", checks.LIMITS_S | {"build": 0.2, "hardware": 0.2})
    started = time.monotonic()
    run = make_cli(tmp_path, services=Sick)("doctor", "--json")
    released.set()
    assert time.monotonic() - started < 30
    assert check(run, "build")["status"] == "fail"
    assert "no answer within" in check(run, "build")["detail"]
    assert check(run, "cpu")["status"] == "ok" and run.code == 1


@pytest.mark.parametrize("error", [EngineError("it broke", hint="mend it"), ZeroDivisionError("x")])
def test_a_check_that_breaks_is_a_failed_check(error: Exception, tmp_path: Path) -> None:
    class Broken(FakeServices):
        def machine(self) -> Machine:
            raise error

    run = make_cli(tmp_path, services=Broken)("doctor", "--json")
    found = check(run, "machine")
    assert run.code == 1 and found["status"] == "fail" and str(error) in found["detail"]
    assert run.data["machine"] is None and check(run, "hub")["status"] == "ok"


def test_a_broken_config_file_is_told_and_does_not_stop_it(tmp_path: Path) -> None:
    cli = make_cli(tmp_path)
    cli.write_config("ctx = \n")
    run = cli("doctor", "--json")
    assert run.code == 1 and check(run, "config")["status"] == "fail"
    assert "not valid TOML" in check(run, "config")["detail"]
    cli.write_config("nonsense = 1\n")
    assert check(cli("doctor", "--json"), "config")["hint"] == "llmrun config unset nonsense"


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = make_cli(tmp_path)

    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", refuse)
    run = cli("doctor", "--json")
    assert run.code == 1
    for name, variable in (("models", "HF_HUB_CACHE"), ("state", "XDG_STATE_HOME")):
        found = check(run, name)
        assert found["status"] == "fail" and "Permission denied" in found["detail"]
        assert found["hint"].startswith(f"export {variable}=")


def test_little_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "LITTLE_DISK_BYTES", 1 << 60)
    found = check(make_cli(tmp_path)("doctor", "--json"), "models")
    assert found["status"] == "warn" and found["hint"] == "llmrun prune"


class FailingHub(HeaderHub):
    error: Exception

    def commit_of(self, repo: str, revision: str) -> str:
        raise self.error


def test_a_hub_that_is_not_reached_or_refuses(tmp_path: Path) -> None:
    hub = FailingHub("lfm2-1.2b", ["q8_0"])
    cli = make_cli(tmp_path, hub=hub)
    hub.error = HubUnreachableError("no", why="no route to host")
    found = check(cli("doctor", "--json"), "hub")
    assert found["status"] == "fail" and "no route to host" in found["detail"]
    assert found["hint"].startswith("curl -I ")
    hub.error = AuthError("the token is not valid", hint="hf auth login")
    found = check(cli("doctor", "--json"), "hub")
    assert found["status"] == "fail" and found["hint"] == "hf auth login"


def test_offline_says_so_and_asks_nobody(tmp_path: Path) -> None:
    hub = FailingHub("lfm2-1.2b", ["q8_0"])
    hub.error = AssertionError("it was asked")
    cli = make_cli(tmp_path, hub=hub)
    run = cli("doctor", "--offline", "--json")
    assert run.code == 0 and "--offline" in check(run, "hub")["detail"]
    cli.write_config("offline = true\n")
    run = cli("doctor", "--json")
    assert run.code == 0 and "offline" in check(run, "hub")["detail"]


def test_no_secret_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_SecretSecretSecret"
    monkeypatch.setenv("HF_TOKEN", secret)
    cli = make_cli(tmp_path)
    cli.environ |= {
        "HF_TOKEN": secret,
        "HTTPS_PROXY": "http://user:password@proxy:3128",
        "LLMRUN_SYSTEM": f"my key is {secret}",
        "HF_HOME": "/somewhere/else",
        "UNRELATED": "unrelated",
    }
    for flags in ([], ["--json"], ["-vv"]):
        run = cli("doctor", *flags)
        text = run.out + run.err
        assert secret not in text and "password" not in text and "unrelated" not in text
        assert "HF_HOME = /somewhere/else" in text and "HF_TOKEN is set" in text
    assert check(cli("doctor", "--json"), "token")["detail"] == "present, in HF_TOKEN"


def test_names_of_the_home_folder_are_left_out(tmp_path: Path) -> None:
    home = str(Path.home())
    assert checks.redact(f"{home}/models and Bearer abc", home) == "~/models and …"


def test_control_characters_of_names_are_escaped(tmp_path: Path) -> None:
    gpu = Device("CUDA0", "evil\x1b[2J\nline", "gpu", 1, 2, backend="CUDA")
    run = make_cli(tmp_path, devices=(gpu,))("doctor")
    assert "\x1b" not in run.out and "evil\\x1b[2J\\nline" in run.out
