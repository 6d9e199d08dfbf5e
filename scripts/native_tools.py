"""llama.cpp's own tools, built once from the source that the installed binding's sdist carries.

    python scripts/native_tools.py [--jobs N]

downloads the sdist of the installed llama-cpp-python (or unpacks the one that lies in the folder
already), builds llama-bench, llama-completion and llama-server with the flags of a wheel built on
this machine (Release, shared libraries, native CPU, OpenMP; more in CMAKE_ARGS), and prints where
they are. Everything stays in the user's cache folder, by version and flags.

The tools run on the libraries of the installed binding, so that both sides of a comparison compute
with the same machine code. LLMRUN_NATIVE_OWN=1 leaves them the ones that were built with them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TARGETS = ("llama-bench", "llama-completion", "llama-server")
_PACKAGE = "llama-cpp-python"
# What the binding's own CMakeLists.txt sets, and nothing built that is not used or that would load
# something from the network.
_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
)
_START_S = 120.0


@dataclass(frozen=True, slots=True)
class NativeTools:
    """The built programs. `environment` is what they are to be run with."""

    version: str
    folder: Path
    environment: dict[str, str]
    libraries: str

    def path(self, target: str) -> str:
        return str(self.folder / (target + (".exe" if sys.platform == "win32" else "")))


def find_tools(*, jobs: int = 0, spin_count: str | None = None) -> NativeTools:
    """Build what is missing. `spin_count` goes into GOMP_SPINCOUNT; None: OpenMP's own.

    Raises SystemExit with the reason when something cannot be had.
    """
    version = importlib.metadata.version(_PACKAGE)
    flags = [*_FLAGS, *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
    key = hashlib.sha256("\n".join(flags).encode()).hexdigest()[:8]
    root = _cache_folder()
    source = _unpack(root, version)
    build = root / f"build-{version}-{key}"
    if not (build / "done").exists():
        _build(source / "vendor" / "llama.cpp", build, flags, jobs or os.cpu_count() or 1)
        (build / "done").write_text("\n".join(flags))
    environment = dict(os.environ, GGML_NO_BACKTRACE="1")
    environment.pop("GOMP_SPINCOUNT", None)
    if spin_count is not None:
        environment["GOMP_SPINCOUNT"] = spin_count
    libraries = "built with the tools"
    if os.environ.get("LLMRUN_NATIVE_OWN") != "1":
        installed = _binding_libraries()
        name = "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"
        environment[name] = os.pathsep.join(filter(None, [str(installed), os.environ.get(name)]))
        libraries = "of the installed binding"
    return NativeTools(version, build / "bin", environment, libraries)


def _cache_folder() -> Path:
    import platformdirs

    # Not llmrun's own folder: its `prune` is for what it made itself.
    folder = platformdirs.user_cache_path("llmrun-native-tools")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _binding_libraries() -> Path:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise SystemExit(f"{_PACKAGE} is not installed")
    return Path(spec.origin).parent / "lib"


def _unpack(root: Path, version: str) -> Path:
    name = f"llama_cpp_python-{version}"
    source = root / name
    if source.exists():
        return source
    archive = root / f"{name}.tar.gz"
    if not archive.exists():
        _say(f"downloading the source of {_PACKAGE} {version}")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", _PACKAGE]
        command += [f"{_PACKAGE}=={version}", "--dest", str(root)]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode or not archive.exists():
            raise SystemExit(f"no source distribution of {_PACKAGE} {version}")
    unpacked = root / f"{name}.part"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    (unpacked / name).rename(source)
    unpacked.rmdir()
    return source


def _build(source: Path, build: Path, flags: list[str], jobs: int) -> None:
    if shutil.which("cmake") is None:
        raise SystemExit("cmake is missing")
    _say(f"building {', '.join(TARGETS)} in {build} (once; ten minutes and more on two cores)")
    # A date makes ggml leave out every instruction set beyond the oldest.
    environment = {k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"}
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    log = build.with_suffix(".log")
    with log.open("w") as sink:
        for command in (
            ["cmake", "-S", str(source), "-B", str(build), *generator, *flags],
            ["cmake", "--build", str(build), "-j", str(jobs), "--target", *TARGETS],
        ):
            if subprocess.run(command, env=environment, stdout=sink, stderr=sink).returncode:
                raise SystemExit(f"the build failed; its output is in {log}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def bench(
    tools: NativeTools, model: Path, *, n_prompt: int, n_gen: int, n_threads: int, repeats: int
) -> dict[str, list[float]]:
    """tok/s of each repeat of llama-bench: {"pp": […], "tg": […]}; 0 tokens leave one out."""
    command = [tools.path("llama-bench"), "-m", str(model), "-o", "json", "-r", str(repeats)]
    command += ["-p", str(n_prompt), "-n", str(n_gen), "-t", str(n_threads)]
    out = subprocess.run(
        command,
        env=tools.environment,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ).stdout
    return {"pp" if test["n_prompt"] else "tg": test["samples_ts"] for test in json.loads(out)}


def completion_command(
    tools: NativeTools, model: Path, prompt: str, *, n_new: int, n_threads: int, n_ctx: int
) -> list[str]:
    """One raw greedy answer by llama-completion, without its warm-up decode."""
    command = [tools.path("llama-completion"), "-m", str(model), "-p", prompt, "-n", str(n_new)]
    command += ["--temp", "0", "-t", str(n_threads), "-tb", str(n_threads), "-c", str(n_ctx)]
    return [*command, "-no-cnv", "--no-display-prompt", "--no-warmup"]


class Server:
    """A running llama-server. Asked from several threads; each keeps its connection."""

    def __init__(self, port: int) -> None:
        self.port = port

    def complete(self, prompt: list[int], n_new: int) -> dict[str, int]:
        """A greedy answer of exactly `n_new` tokens, in one piece: what it costs to send it token
        by token is not counted against the server. Returns its counts of tokens."""
        body = {
            "prompt": prompt,
            "n_predict": n_new,
            "temperature": 0,
            # The best token, by the cheapest of its chains.
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        with contextlib.closing(connection):
            connection.request(
                "POST", "/completion", json.dumps(body), {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            answer = json.load(response)
        if response.status != 200:
            raise RuntimeError(f"llama-server: {answer}")
        if answer["tokens_predicted"] != n_new:
            raise RuntimeError(f"llama-server gave {answer['tokens_predicted']} of {n_new} tokens")
        return {"n_cached": answer.get("timings", {}).get("cache_n", 0)}

    def is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            with contextlib.closing(connection):
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
        except OSError:
            return False


@contextlib.contextmanager
def serve(
    tools: NativeTools, model: Path, *, n_slots: int, n_ctx: int, n_threads: int, more: list[str]
) -> Iterator[Server]:
    """llama-server on a free port of the loopback; gone when the block ends, however it does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [tools.path("llama-server"), "-m", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "-np", str(n_slots), "-c", str(n_ctx)]
    command += ["-t", str(n_threads), "-tb", str(n_threads), *more]
    process = subprocess.Popen(
        command,
        env=tools.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C is ours to handle.
        start_new_session=True,
    )
    try:
        server = Server(port)
        ends_s = time.monotonic() + _START_S
        while not server.is_ready():
            if process.poll() is not None or time.monotonic() > ends_s:
                raise SystemExit(f"llama-server does not start: {shlex.join(command)}")
            time.sleep(0.05)
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """End a child that may not want to."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=0, help="parallel compilers (default: CPUs)")
    args = parser.parse_args()
    tools = find_tools(jobs=args.jobs)
    for target in TARGETS:
        print(tools.path(target))


if __name__ == "__main__":
    main()
