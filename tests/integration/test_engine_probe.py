"""The child that asks the engine's library, on headers of all kinds."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmrun.engine import stubs
from llmrun.engine.binding import load_library
from llmrun.engine.ggml import Ggml
from llmrun.engine.llama import open_backend
from llmrun.engine.params import check_options, fill_model_params
from llmrun.engine.stubs import StubSource, drop_vocabulary, write_stubs
from llmrun.engine.types import EngineOptions
from llmrun.errors import EngineError, UsageError
from llmrun.fit.exact import ChildAllocator
from llmrun.fit.types import MIB, Measurement, Setup
from llmrun.gguf.info import read_info
from llmrun.hardware.engine_devices import MODULE
from llmrun.hardware.processes import module_command
from tests.fakes.gguf_builder import CHATML, split_builder, tiny_llama, tiny_llama_builder
from tests.fakes.model_shapes import build_shape
from tests.fakes.models import gemma3_path, smollm2_path

ROOT = Path(__file__).resolve().parents[2]
SETUPS = (Setup(1024), Setup(4096, "q8_0", "q8_0", n_seq_max=2), Setup(2048, flash_attn="off"))


def ask(request: object, data: bytes = b"", *, command: list[str] | None = None) -> dict:
    done = subprocess.run(
        command or [sys.executable, "-m", "llmrun.engine.probe"],
        input=json.dumps(request).encode() + b"\n" + data,
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == 1
    return json.loads(done.stdout)


def measure(allocator: ChildAllocator, *setups: Setup) -> list[Measurement]:
    answers = allocator.measure(setups)
    assert allocator.problem is None
    assert None not in answers, [allocator.refusal(setup) for setup in setups]
    return list(answers)


def first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(read_info([path]).header.n_header_bytes)


def run_probe_with(change: str) -> list[str]:
    """The child with a part of it replaced."""
    _, *rest = module_command(MODULE)
    start = rest.index("-c") + 1
    rest[start] = rest[start].replace(
        "importlib.import_module",
        f"from llmrun.engine import ggml; {change}; importlib.import_module",
    )
    return [sys.executable, *rest]


def test_devices() -> None:
    answer = ask({"task": "devices"})
    cpus = [device for device in answer["devices"] if device["type"] == "cpu"]
    assert [device["backend"] for device in cpus] == ["CPU"]
    assert cpus[0]["name"] == "CPU" and cpus[0]["total"] > 0 and cpus[0]["free"] > 0
    assert "CPU" in answer["backends"]
    assert answer["version"]
    has_gpu = any(device["type"] in ("gpu", "igpu") for device in answer["devices"])
    assert answer["supports_gpu_offload"] is has_gpu


def test_the_features_are_those_of_this_processor() -> None:
    answer = ask({"task": "devices"})
    info = load_library().llama_print_system_info().decode()
    on = {part.split(" = ")[0].split(":")[-1].strip() for part in info.split("|") if "= 1" in part}
    assert set(answer["features"]) == on


@pytest.mark.parametrize("request_", [{}, {"task": "fly"}, {"task": "measure", "files": []}])
def test_a_wrong_request_is_an_error(request_: dict) -> None:
    assert list(ask(request_)) == ["error"]


def test_what_is_no_json_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmrun.engine.probe"],
        input=b"}{",
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "JSON" in json.loads(done.stdout)["error"]


def test_headers_may_lie_in_files(tmp_path: Path) -> None:
    path = smollm2_path()
    header = tmp_path / "header"
    header.write_bytes(first_bytes(path))
    answer = ask(
        {
            "task": "measure",
            "files": [{"name": "x", "header": str(header), "n_bytes": path.stat().st_size}],
            "setups": [{"n_ctx": 512}],
        }
    )
    ((buffer, device, weights, _, _),) = answer["answers"][0]["buffers"]
    assert (buffer, device, weights) == ("CPU", "CPU", 96_576_768)


def test_two_shards_are_the_single_file(tmp_path: Path) -> None:
    builder = tiny_llama_builder(n_layers=3)  # its heads are too small for quantised caches
    setups = (Setup(1024), Setup(4096, "bf16", "f32", n_seq_max=2), Setup(512, flash_attn="off"))
    single = builder.write(tmp_path / "tiny.gguf")
    shards = [shard.build() for shard in split_builder(builder, 2)]
    files = [
        tmp_path / f"tiny-0000{number}-of-00002.gguf" for number, _ in enumerate(shards, start=1)
    ]
    headers = []
    for file, content in zip(files, shards, strict=True):
        file.write_bytes(content)
        # Only the description of the tensors: some of its bytes more are weights.
        headers.append((file.name, content[: len(content) // 2], len(content)))
    expected = measure(ChildAllocator([single]), *setups)
    assert measure(ChildAllocator(files), *setups) == expected
    named_otherwise = [(f"part{i}", header, n) for i, (_, header, n) in enumerate(headers)]
    assert measure(ChildAllocator.of_headers(named_otherwise), *setups) == expected
    swapped = ChildAllocator.of_headers(headers[::-1])
    assert swapped.measure(setups[:1]) == (None,)
    assert "split" in (swapped.problem or "")
    lacking = ChildAllocator.of_headers(headers[:1])
    assert lacking.measure(setups[:1]) == (None,)
    assert lacking.problem is not None


def test_stubs_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    path = smollm2_path()
    source = StubSource(first_bytes(path), path.stat().st_size)
    stub = write_stubs([source], tmp_path / "stub", in_memory=False)
    assert stub.stat().st_size == source.n_bytes
    assert stub.stat().st_blocks * 512 < len(source.header) + MIB
    assert measure(ChildAllocator([stub]), *SETUPS) == measure(ChildAllocator([path]), *SETUPS)


def test_a_disk_without_holes_is_not_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stubs, "_disk_bytes", lambda path, _: path.stat().st_size)
    with pytest.raises(EngineError, match="cannot leave holes"):
        write_stubs([StubSource(b"GGUF", 1 << 40)], tmp_path / "stub", in_memory=False)
    assert max(file.stat().st_size for file in (tmp_path / "stub").iterdir()) < 32 * MIB


@pytest.mark.parametrize("find", [smollm2_path, gemma3_path])
def test_the_words_of_the_vocabulary_do_not_matter(find: object, tmp_path: Path) -> None:
    path = find()
    sources = [StubSource(first_bytes(path), path.stat().st_size)]
    slim = drop_vocabulary(Ggml(load_library()), sources)
    assert slim is not None
    assert len(slim[0].header) < 100_000 < len(sources[0].header)
    assert slim == drop_vocabulary(Ggml(load_library()), [StubSource(path=path)])
    files = [{"path": str(path)}]
    setups = [{"n_ctx": 4096, "n_outputs_max": 16}, {"n_ctx": 512, "n_seq_max": 3}]
    request = {"task": "measure", "files": files, "setups": setups}
    assert ask(request)["answers"] == ask({**request, "keep_vocabulary": True})["answers"]


def test_a_header_with_tokens_that_are_no_list_is_measured_as_it_is() -> None:
    builder = tiny_llama_builder()
    odd = tiny_llama_builder(metadata={"odd": 1})
    odd.pairs = [pair for pair in builder.pairs if b"tokenizer.ggml.tokens" not in pair]
    odd.add("tokenizer.ggml.tokens", "none")
    content = odd.build()
    assert drop_vocabulary(Ggml(load_library()), [StubSource(content, len(content))]) is None
    allocator = ChildAllocator.of_headers([("x", content, len(content))])
    assert allocator.measure(SETUPS[:1]) == (None,)
    assert allocator.problem is not None


def test_a_build_that_tells_its_memory_only_in_the_log() -> None:
    exact = measure(ChildAllocator([gemma3_path()]), *SETUPS)
    allocator = ChildAllocator(
        [gemma3_path()], command=run_probe_with("ggml._BREAKDOWN = 'renamed'")
    )
    rough = measure(allocator, *SETUPS)
    for answer, one in zip(rough, exact, strict=True):
        assert answer.is_rough and not one.is_rough
        assert answer.kv_bytes == pytest.approx(one.kv_bytes, abs=0.011 * MIB)
        assert answer.compute_bytes == pytest.approx(one.compute_bytes, abs=0.006 * MIB)
        assert answer.weights_bytes == pytest.approx(one.weights_bytes, rel=0.001)


def stall(started: Path, seconds: float) -> list[str]:
    """A child that says in a file that it is about to measure, and then takes long."""
    return run_probe_with(
        f"from llmrun.engine import probe; import time; from pathlib import Path; "
        f"probe.Meter.measure = lambda *_: "
        f"(Path({str(started)!r}).write_text(str(probe.os.getpid())), time.sleep({seconds}), [])[2]"
    )


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_time_out_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    header = first_bytes(smollm2_path())
    for limit_s in (3.0, 10.0, 30.0):  # long enough for the child to start
        started = tmp_path / "started"
        allocator = ChildAllocator.of_headers(
            [("x", header, smollm2_path().stat().st_size)],
            limit_s=limit_s,
            command=stall(started, 600),
        )
        assert allocator.measure(SETUPS[:1]) == (None,)
        assert "was not done after" in (allocator.problem or "")
        if started.exists():
            break
    assert started.exists()
    assert list(temporary.iterdir()) == []


def test_an_orphan_ends_and_cleans_up(tmp_path: Path) -> None:
    temporary, started = tmp_path / "tmp", tmp_path / "started"
    temporary.mkdir()
    script = (
        f"from llmrun.fit.exact import ChildAllocator; from llmrun.fit.types import Setup; "
        f"ChildAllocator([{str(smollm2_path())!r}], command={stall(started, 1.0)!r})"
        f".measure([Setup(512)])"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "TMPDIR": str(temporary)}
    )
    wait_until(lambda: started.exists() and started.read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: list(temporary.iterdir()) == [])


def test_a_crash_inside_the_library_is_contained() -> None:
    """In its default mode the library aborts when it is told to allocate nothing."""
    change = (
        "from llmrun.engine import probe; fill = probe.fill_model_params; "
        "probe.Meter._load_from = lambda self, path, options: "
        "self._C.llama_model_load_from_file(str(path).encode(), "
        "(lambda p: (setattr(p, 'no_alloc', True), p)[1])(fill(self._C, EngineOptions())[0])); "
        "from llmrun.engine.types import EngineOptions"
    )
    allocator = ChildAllocator([smollm2_path()], command=run_probe_with(change))
    assert allocator.measure(SETUPS) == (None, None, None)
    assert "SIGABRT" in (allocator.problem or "")
    assert "GGML_ASSERT" in (allocator.problem or "")


class TestBrokenHeaders:
    def fail(self, header: bytes, n_bytes: int) -> str:
        allocator = ChildAllocator.of_headers([("x.gguf", header, n_bytes)])
        assert allocator.measure(SETUPS) == (None, None, None)
        assert allocator.problem is not None and allocator.problem.isprintable()
        return allocator.problem

    @pytest.mark.parametrize("part", [0.001, 0.3, 0.9, 0.9999])
    def test_truncated(self, part: float) -> None:
        path = smollm2_path()
        header = first_bytes(path)
        self.fail(header[: int(len(header) * part)], path.stat().st_size)

    def test_without_the_files_size(self) -> None:
        header = first_bytes(smollm2_path())
        assert "not within the file bounds" in self.fail(header, len(header))

    @pytest.mark.parametrize("n_bytes", [0, -1])
    def test_with_an_impossible_size(self, n_bytes: int) -> None:
        self.fail(first_bytes(smollm2_path()), n_bytes)

    def test_empty(self) -> None:
        self.fail(b"", 1000)

    def test_an_architecture_that_llama_cpp_does_not_know(self) -> None:
        builder = tiny_llama_builder()
        content = builder.build().replace(b"llama", b"lamma")
        assert "unknown model architecture: 'lamma'" in self.fail(content, len(content))

    def test_a_tensor_that_is_missing(self) -> None:
        builder = tiny_llama_builder()
        builder.specs = [spec for spec in builder.specs if spec[0] != "blk.1.attn_q.weight"]
        content = split_builder(builder, 1)[0].build()
        assert "blk.1.attn_q.weight" in self.fail(content, len(content))


@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (Setup(1024, type_v="q8_0", flash_attn="off"), "FlashAttention"),
        (Setup(1 << 30), "too long to measure"),
        (Setup(0), "at least one token"),
        (Setup(512, n_seq_max=300), "300 sequences"),
        (Setup(512, n_ubatch=1, n_seq_max=2), "below n_seq_max"),
        (Setup(512, tensor_split=(0.0,)), "not all 0"),
        (Setup(512, tensor_split=(1.0,) * 200), "200 parts"),
        (Setup(512, n_cpu_moe=-1), "experts"),
    ],
)
def test_what_the_engine_would_refuse_is_refused(setup: Setup, words: str) -> None:
    allocator = ChildAllocator([smollm2_path()])
    refused, answered = allocator.measure([setup, Setup(512)])
    assert refused is None and answered is not None
    assert words in (allocator.refusal(setup) or "")
    assert allocator.problem is None


def test_a_recurrent_state_is_not_allocated_beyond_a_bound() -> None:
    """llama.cpp really allocates it: 6 GB here."""
    header, n_bytes = build_shape("mamba-2.8b")
    allocator = ChildAllocator.of_headers([("x", header, n_bytes)])
    large, small = Setup(512, n_seq_max=256), Setup(512)
    assert [answer is None for answer in allocator.measure([large, small])] == [True, False]
    assert "alloc" in (allocator.refusal(large) or "")


def test_the_engine_loads_with_the_same_params(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf", chat_template=CHATML)
    options = EngineOptions(n_ctx=256, n_threads=1, n_cpu_moe=1, tensor_split=(1.0, 3.0))
    backend = open_backend(path, options)
    try:
        assert backend.n_ctx == 256
    finally:
        backend.close()


def test_a_tensor_split_fills_the_array_of_all_devices() -> None:
    C = load_library()
    params, _keep = fill_model_params(C, EngineOptions(tensor_split=(1.0, 3.0)))
    n_devices = C.llama_max_devices()
    assert params.tensor_split
    assert params.tensor_split[:n_devices] == [1.0, 3.0, *[0.0] * (n_devices - 2)]
    assert not fill_model_params(C, EngineOptions())[0].tensor_split


def test_without_layers_for_it_a_gpu_is_left_alone() -> None:
    C = load_library()
    none, _keep = fill_model_params(C, EngineOptions(n_gpu_layers=0))
    assert (none.split_mode, none.main_gpu) == (C.LLAMA_SPLIT_MODE_NONE, -1)
    for n in (-1, 1, 40):
        some, _keep = fill_model_params(C, EngineOptions(n_gpu_layers=n))
        assert (some.split_mode, some.main_gpu) == (C.LLAMA_SPLIT_MODE_LAYER, 0)


@pytest.mark.parametrize("split", [(-1.0, 2.0), (0.0, 0.0), (float("nan"),), (float("inf"),)])
def test_a_tensor_split_of_nonsense_is_refused(split: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="tensor split"):
        check_options(EngineOptions(tensor_split=split))


class TestExpertsInRam:
    """Which tensors are overridden is only in the log where all is RAM anyway."""

    @pytest.fixture
    def stub(self, tmp_path: Path) -> Path:
        header, n_bytes = build_shape("qwen3-30b-a3b")
        return write_stubs([StubSource(header, n_bytes)], tmp_path / "stub")

    def overridden(self, stub: Path, n: int, caplog: pytest.LogCaptureFixture) -> set[str]:
        C = load_library()
        params, keep = fill_model_params(C, EngineOptions(use_mmap=False, n_cpu_moe=n))
        params.no_alloc = True
        with caplog.at_level(logging.DEBUG, logger="llmrun.llama"):
            model = C.llama_model_load_from_file(os.fsencode(stub), params)
        assert model and keep is not None
        C.llama_model_free(model)
        lines = [line for line in caplog.messages if "buffer type overridden" in line]
        caplog.clear()
        return {line.split("tensor ")[1].split()[0] for line in lines}

    def test_those_of_the_first_layers(self, stub: Path, caplog: pytest.LogCaptureFixture) -> None:
        names = {
            f"blk.{i}.ffn_{kind}_exps.weight" for i in range(48) for kind in ("up", "down", "gate")
        }
        first = {name for name in names if int(name.split(".")[1]) < 12}
        assert self.overridden(stub, 0, caplog) == set()
        assert self.overridden(stub, 12, caplog) == first
        assert self.overridden(stub, 48, caplog) == names
        assert self.overridden(stub, 999, caplog) == names

    def test_the_sum_is_the_same(self) -> None:
        header, n_bytes = build_shape("qwen3-30b-a3b")
        setups = (Setup(2048), Setup(2048, n_cpu_moe=12), Setup(2048, n_cpu_moe=999))
        answers = measure(ChildAllocator.of_headers([("x", header, n_bytes)]), *setups)
        assert len({answer.weights_bytes for answer in answers}) == 1
        assert answers[0].weights_bytes > 17 << 30
