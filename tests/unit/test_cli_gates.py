"""What `pull`, `run` and `chat` let through: which quant, what is refused, and what is tried when
the memory is not there after all."""

from __future__ import annotations

import contextlib
import json
from itertools import pairwise
from pathlib import Path

import pytest

from llmrun.cli import acquire as acquire_module
from llmrun.engine.types import EngineOptions
from llmrun.errors import EngineError, WillNotFitError
from llmrun.fit.types import BufferUse, Measurement, Setup
from llmrun.hardware.machine import Device
from tests.fakes.cli import GB, Cli
from tests.fakes.fake_engine import FakeEngine
from tests.fakes.header_hub import PROJECTOR, HeaderHub
from tests.fakes.model_shapes import write_sparse

ALL = ("q2_k", "q3_k_m", "q4_k_m", "q8_0")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Stands in for the download: what was fetched."""
    names: list[str] = []

    def fetch(invocation, resolved, events, projector, progress=None):
        names.extend(file.path for file in resolved.files)
        if projector:
            names.append(resolved.projector.path)
        hub = invocation.services.hub(offline=False)
        return tuple(hub.write(tmp_path, file.path) for file in resolved.files)

    monkeypatch.setattr(acquire_module, "fetch", fetch)
    return names


def make_cli(folder: Path, memory: float, shape: str = "llama-3.1-8b", **more) -> Cli:
    hub = HeaderHub(shape, more.pop("quants", ALL), projector_bytes=more.pop("projector", 0))
    return Cli(folder, memory=int(memory * GB), hub=hub, **more)


# ---- which quant


def test_the_usual_quant_is_taken_where_it_fits_and_no_other_is_looked_at(
    tmp_path: Path, fetched: list[str]
) -> None:
    cli = make_cli(tmp_path, 16)
    run = cli("pull", cli.hub.repo)
    assert run.code == 0 and fetched == ["tall-Q4_K_M.gguf"]
    assert "\nfits: " in "\n" + run.err and " of 16.0 GB free memory, context " in run.err
    assert cli.hub.opened == ["tall-Q4_K_M.gguf"] and cli.hub.n_listings == 1


def test_the_best_quant_that_fits_is_taken_when_none_was_named(
    tmp_path: Path, fetched: list[str]
) -> None:
    cli = make_cli(tmp_path, 6.2)
    run = cli("pull", cli.hub.repo, "--json")
    assert run.code == 0 and fetched == ["tall-Q3_K_M.gguf"]
    assert "Q3_K_M instead of Q4_K_M, which " in run.err
    (model,) = run.data["models"]
    assert model["model"] == f"{cli.hub.repo}:Q3_K_M" and model["fit"]["verdict"] == "fits"
    assert model["fit"]["needed_bytes"] < model["fit"]["available_bytes"] == 6_200_000_000
    # One listing, and each header once: those of the two that matter.
    assert cli.hub.n_listings == 1
    assert cli.hub.opened == ["tall-Q4_K_M.gguf", "tall-Q3_K_M.gguf"]


def test_headers_are_kept_and_not_read_again(tmp_path: Path, fetched: list[str]) -> None:
    cli = make_cli(tmp_path, 16)
    for _ in range(2):
        assert cli("pull", cli.hub.repo).code == 0
    assert cli.hub.opened == ["tall-Q4_K_M.gguf"]


def test_a_named_quant_is_never_replaced(tmp_path: Path, fetched: list[str]) -> None:
    cli = make_cli(tmp_path, 6.2)
    run = cli("pull", f"{cli.hub.repo}:q8_0")
    assert run.code == 5 and fetched == []
    assert cli("pull", f"{cli.hub.repo}:q8_0", "--force").code == 0
    assert fetched == ["tall-Q8_0.gguf"]


def test_with_force_the_usual_quant_comes_when_none_fits(
    tmp_path: Path, fetched: list[str]
) -> None:
    cli = make_cli(tmp_path, 1)
    run = cli("pull", cli.hub.repo, "--force", "--json")
    assert run.code == 0 and fetched == ["tall-Q4_K_M.gguf"]
    assert run.data["models"][0]["fit"]["verdict"] == "no" and "does not fit: " in run.err


def test_other_models_of_the_repository_are_no_quants(tmp_path: Path, fetched: list[str]) -> None:
    cli = make_cli(tmp_path, 6.2, quants=("q4_k_m",))
    cli.hub._quants["other-Q2_K.gguf"] = "q2_k"
    other = HeaderHub("llama-3.1-8b", ["q2_k"])._files[0]
    cli.hub._files += (type(other)("other-Q2_K.gguf", other.n_bytes, "cd" * 32),)
    run = cli("pull", f"{cli.hub.repo}", "--ctx", "32768")
    assert run.code == 5 and fetched == [] and "Q2_K" not in run.err


# ---- what is refused


def test_a_refusal_says_what_would_run(tmp_path: Path, fetched: list[str]) -> None:
    cli = make_cli(tmp_path, 6.2)
    run = cli("pull", f"{cli.hub.repo}:q8_0")
    lines = run.err.splitlines()
    assert run.code == 5 and run.out == "" and len(lines) == 4
    assert lines[0].startswith("error: this model needs ") and "6.20 GB are free" in lines[0]
    assert lines[1].startswith("weights 8.5")
    assert lines[2].startswith("what would run here: the quant Q3_K_M (3.92 GB), or the model ")
    assert lines[2].endswith("; --force tries it all the same")
    assert lines[3] == f"try: llmrun pull {cli.hub.repo}:Q3_K_M"
    (error,) = cli("pull", f"{cli.hub.repo}:q8_0", "--json").envelope["errors"]
    assert error["code"] == "will_not_fit" and "the quant Q3_K_M" in error["message"]
    assert error["hint"] == f"llmrun pull {cli.hub.repo}:Q3_K_M"


def test_a_shorter_context_is_the_first_way_out(tmp_path: Path, fetched: list[str]) -> None:
    cli = make_cli(tmp_path, 8)
    run = cli("pull", f"{cli.hub.repo}:q4_k_m", "--ctx", "131072", "--kv-type", "f16")
    assert run.code == 5 and fetched == []
    assert "what would run here: a context of " in run.err
    command = run.err.splitlines()[-1].removeprefix("try: llmrun ").split()
    assert command[:2] == ["pull", f"{cli.hub.repo}:Q4_K_M"]
    assert cli(*command, "--kv-type", "f16").code == 0


def test_a_flag_in_the_way_is_named(tmp_path: Path, fetched: list[str]) -> None:
    gpu = Device("CUDA0", "RTX 3060", "gpu", 3 * GB, 12 * GB, backend="CUDA")
    cli = make_cli(tmp_path, 32, devices=(gpu,))
    run = cli("pull", f"{cli.hub.repo}:q8_0", "--gpu-layers", "all", "--ctx", "4096")
    assert run.code == 5 and "the same without --gpu-layers" in run.err


def test_run_is_refused_like_pull_and_loads_nothing(tmp_path: Path, fetched: list[str]) -> None:
    cli = make_cli(tmp_path, 1)
    run = cli("run", cli.hub.repo, "Hi")
    assert run.code == 5 and fetched == [] and cli.services.opened == []
    assert run.err.splitlines()[-1].startswith("try: llmrun run ")


def test_a_model_on_disk_is_refused_too(tmp_path: Path) -> None:
    cli = Cli(tmp_path, memory=3 * GB)
    path = write_sparse(tmp_path / "tall-Q4_K_M.gguf", "llama-3.1-8b")
    run = cli("run", str(path), "Hi")
    assert run.code == 5 and cli.services.opened == []
    assert "what would run here: the model " in run.err


def test_the_projector_counts(tmp_path: Path, fetched: list[str]) -> None:
    cli = make_cli(tmp_path, 16, "gemma-3-4b", projector=2 * GB)
    without = cli("pull", cli.hub.repo, "--json").data["models"][0]["fit"]
    with_it = cli("pull", cli.hub.repo, "--projector", "--json").data["models"][0]["fit"]
    assert PROJECTOR in fetched
    assert with_it["needed_bytes"] - without["needed_bytes"] > 2 * GB
    small = make_cli(tmp_path, 5, "gemma-3-4b", projector=4 * GB)
    assert small("pull", f"{small.hub.repo}:q4_k_m").code == 0
    assert small("pull", f"{small.hub.repo}:q4_k_m", "--projector").code == 5


# ---- which tier


class ExactAllocator:
    """Implements `fit.types.Allocator`: weights as they are, a KV cache of `kv_bytes`."""

    devices = ()
    problem = None

    def __init__(self, weights_bytes: int, kv_bytes: int) -> None:
        self.sizes = weights_bytes, kv_bytes
        self.asked: list[Setup] = []

    def measure(self, setups):
        self.asked += setups
        use = BufferUse("CPU", "CPU", *self.sizes, 100_000_000)
        return tuple(Measurement(setup, (use,)) for setup in setups)


def test_a_download_is_judged_by_the_allocator(tmp_path: Path, fetched: list[str]) -> None:
    cli = make_cli(tmp_path, 16, allocator=ExactAllocator(4_900_000_000, 1_073_741_824))
    run = cli("pull", cli.hub.repo, "--ctx", "8192", "--json")
    assert run.data["models"][0]["fit"]["source"] == "exact"
    assert cli.services.judged == ["tall-Q4_K_M.gguf"] and cli.allocator.asked


def test_a_small_model_on_disk_starts_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the real services but for the engine."""
    import subprocess

    from llmrun.cli.services import Services
    from tests.fakes.cli import FakeServices

    class RealMachine(FakeServices):
        machine = Services.machine
        allocator_of_files = Services.allocator_of_files

    started: list[str] = []
    start = subprocess.Popen.__init__

    def note(self, command, *args, **kwargs):
        started.append(str(command))
        start(self, command, *args, **kwargs)

    monkeypatch.setattr(subprocess.Popen, "__init__", note)
    cli = Cli(tmp_path, FakeEngine(["Hello!"]), services=RealMachine)
    model = cli.model(chat_template="{{ messages[-1].content }}")
    assert cli("run", model, "Hi").code == 0
    assert cli("chat", model, stdin="Hi\n").code == 0
    # A template that is not known is rendered in a process of its own, today as before.
    assert [command for command in started if "template_child" not in command] == []


@pytest.mark.parametrize(
    ("memory", "devices", "asks"), [(16, 0, False), (6.5, 0, True), (16, 1, True)]
)
def test_on_disk_the_allocator_is_asked_where_it_matters(
    memory: float, devices: int, asks: bool, tmp_path: Path
) -> None:
    gpu = Device("CUDA0", "RTX 3060", "gpu", 11 * GB, 12 * GB, backend="CUDA")
    cli = Cli(tmp_path, memory=int(memory * GB), devices=(gpu,) * devices)
    path = write_sparse(tmp_path / "tall-Q4_K_M.gguf", "llama-3.1-8b")
    assert cli("run", str(path), "Hi").code == 0
    assert cli.services.judged == ([path.name] if asks else [])


# ---- free memory just before loading


def test_after_a_download_the_plan_is_made_anew(tmp_path: Path, fetched: list[str]) -> None:
    free = [30 * GB]
    cli = make_cli(tmp_path, 0)
    cli.memory = lambda: free[0] if not fetched else 7 * GB
    assert cli("run", f"{cli.hub.repo}:q4_k_m", "Hi").code == 0
    (_, options) = cli.services.opened[0]
    assert options.n_ctx < 32768 and cli.services.n_looks == 2
    cli.memory = lambda: 30 * GB if cli.services.n_looks < 2 else 2 * GB
    run = cli("run", f"{cli.hub.repo}:q8_0", "Hi")
    assert run.code == 5 and cli.services.opened == [] and "what would run" in run.err


def test_what_was_pulled_stays_pulled_when_memory_goes_meanwhile(
    tmp_path: Path, fetched: list[str]
) -> None:
    cli = make_cli(tmp_path, 0)
    cli.memory = lambda: 30 * GB if cli.services.n_looks < 2 else 2 * GB
    run = cli("pull", cli.hub.repo, "--json")
    assert run.code == 0 and run.data["models"][0]["fit"]["verdict"] == "no"


def test_a_switch_is_planned_when_the_old_model_is_gone(tmp_path: Path) -> None:
    engine = FakeEngine(["One.", "Two."])
    cli = Cli(tmp_path, engine)
    opened_at_look: list[bool] = []

    def look() -> int:
        opened_at_look.append(bool(cli.services.opened) and not engine.closed)
        return 16 * GB

    cli.memory = look
    one, two = cli.model("one.gguf"), cli.model("two.gguf")
    assert cli("chat", one, stdin=f"Hi\n/model {two}\nAgain\n").out.split() == ["One.", "Two."]
    assert len(opened_at_look) == 2 and not any(opened_at_look)


# ---- when the allocator fails all the same


class FailingLoads:
    """Opens an engine after `n` failures. `error` is what fails."""

    def __init__(self, n: int, error: Exception | None = None) -> None:
        self.n = n
        self.error = error or WillNotFitError(
            "not enough memory to load it", why="failed to allocate CPU buffer of size 4711"
        )
        self.engine = FakeEngine()

    def __call__(self) -> FakeEngine:
        self.n -= 1
        if self.n >= 0:
            raise self.error
        return self.engine


def options_of(cli: Cli) -> list[EngineOptions]:
    return [options for _, options in cli.services.opened]


@pytest.mark.parametrize("n_failures", [1, 2])
def test_a_failed_load_is_tried_again_with_less(n_failures: int, tmp_path: Path) -> None:
    cli = Cli(tmp_path, FailingLoads(n_failures))
    run = cli("run", cli.model(n_ctx_train=32768), "Hi")
    assert (run.code, run.out) == (0, "Hello!\n")
    contexts = [options.n_ctx for options in options_of(cli)]
    assert len(contexts) == n_failures + 1
    notes = run.err.splitlines()
    assert len(notes) == n_failures
    assert "failed to allocate CPU buffer of size 4711; trying again with " in notes[0]
    assert f"context {contexts[1]} instead of {contexts[0]}" in notes[0]
    smaller = [(o.n_ctx, o.type_k != "f16") for o in options_of(cli)]
    assert all(a != b for a, b in pairwise(smaller))


def test_after_three_failures_the_allocators_words_are_the_error(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FailingLoads(3))
    run = cli("run", cli.model(n_ctx_train=32768), "Hi", "--json")
    assert run.code == 5 and len(cli.services.opened) == 3
    (error,) = run.envelope["errors"]
    assert error["code"] == "will_not_fit"
    assert error["message"].endswith("failed to allocate CPU buffer of size 4711")


def test_what_the_user_fixed_is_not_shrunk(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FailingLoads(3))
    run = cli("run", cli.model(), "Hi", "--ctx", "1024", "--kv-type", "f16")
    assert run.code == 5 and len(cli.services.opened) == 1
    assert "failed to allocate" in run.err and "trying again" not in run.err


def test_other_failures_are_not_tried_again(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FailingLoads(1, EngineError("no such thing")))
    assert cli("run", cli.model(n_ctx_train=32768), "Hi").code == 1
    assert len(cli.services.opened) == 1


# ---- settings and speed


def test_placement_flags_reach_the_engine(tmp_path: Path) -> None:
    gpus = tuple(
        Device(f"CUDA{i}", "RTX 4090", "gpu", 23 * GB, 24 * GB, backend="CUDA") for i in range(2)
    )
    cli = Cli(tmp_path, devices=gpus, memory=64 * GB)
    path = str(write_sparse(tmp_path / "moe-Q4_K_M.gguf", "qwen3-30b-a3b"))
    words = ["--cpu-moe", "5", "--tensor-split", "3,1", "--ubatch", "256", "--ctx", "4096"]
    assert cli("run", path, "Hi", *words).code == 0
    (options,) = options_of(cli)
    assert (options.n_cpu_moe, options.tensor_split, options.n_ubatch) == (5, (3.0, 1.0), 256)
    cli.environ |= {"LLMRUN_CPU_MOE": "all"}
    assert cli("run", path, "Hi", "--ctx", "4096").code == 0
    assert options_of(cli)[0].n_cpu_moe >= 48


@pytest.mark.parametrize("command", ["run", "chat"])
def test_a_real_answers_speed_is_kept_and_forecast_from(
    command: str, tmp_path: Path, fetched: list[str]
) -> None:
    cli = make_cli(tmp_path, 16)
    cli.engine = FakeEngine(["x" * 40])
    fit = cli("pull", f"{cli.hub.repo}:q4_k_m", "--json").data["models"][0]["fit"]
    assert fit["tok_s"][0] < fit["tok_s"][1]
    path = str(tmp_path / "tall-Q4_K_M.gguf")
    words = ["Hi"] if command == "run" else []
    assert cli(command, path, *words, stdin="" if words else "Hi\n").code == 0
    fit = cli("pull", f"{cli.hub.repo}:q4_k_m", "--json").data["models"][0]["fit"]
    assert fit["tok_s"] == [50.0, 50.0]  # what the fake engine says it did


@pytest.mark.parametrize(("n_cores", "is_compared"), [(64.0, True), (0.3, False)])
def test_a_run_beside_other_programs_does_not_lower_other_forecasts(
    n_cores: float,
    is_compared: bool,
    tmp_path: Path,
    fetched: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sqlite3
    import time

    cli = make_cli(tmp_path, 16)
    cli.engine = FakeEngine(["x" * 40])
    assert cli("pull", f"{cli.hub.repo}:q4_k_m").code == 0  # measures the RAM
    monkeypatch.setattr(time, "process_time", lambda: n_cores * time.perf_counter())
    assert cli("run", str(tmp_path / "tall-Q4_K_M.gguf"), "Hi").code == 0
    (path,) = (tmp_path / "state").glob("**/speed.sqlite3")
    with contextlib.closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT tok_s, forecast_tok_s IS NOT NULL FROM runs").fetchall()
    assert rows == [(50.0, is_compared)]


def test_a_short_answer_says_nothing_about_speed(tmp_path: Path) -> None:
    cli = Cli(tmp_path, FakeEngine(["x" * 31]))
    assert cli("run", cli.model(), "Hi").code == 0
    assert not list((tmp_path / "state").glob("speed*"))


def test_a_state_folder_that_cannot_be_written_fails_no_run(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no folder")
    cli = Cli(tmp_path, FakeEngine(["x" * 100]))
    run = cli("run", cli.model(), "Hi", "--json")
    assert run.code == 0 and json.loads(run.out)["data"]["text"] == "x" * 100


def test_the_speed_of_ram_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrun.cli.measure import with_ram_bandwidth
    from llmrun.hardware import bandwidth
    from llmrun.hardware.machine import Cpu, Machine, Memory

    speeds = [2e10, 3e10]
    monkeypatch.setattr(bandwidth, "measure_ram_bandwidth", lambda **_: speeds.pop(0))
    machine = Machine(Cpu(4, 4, 4, name="A"), Memory(8 * GB, 4 * GB))
    assert with_ram_bandwidth(machine, tmp_path, may_measure=False) is machine
    for _ in range(2):
        assert with_ram_bandwidth(machine, tmp_path).memory.bandwidth_bytes_s == 2e10
    other = Machine(Cpu(4, 4, 4, name="B"), Memory(8 * GB, 4 * GB))
    assert with_ram_bandwidth(other, tmp_path).memory.bandwidth_bytes_s == 3e10
    (tmp_path / "memory.json").write_text("[[")
    speeds.append(0.0)  # it could not be measured
    assert with_ram_bandwidth(machine, tmp_path).memory.bandwidth_bytes_s is None
