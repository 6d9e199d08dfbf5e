"""Repositories of models in full size, of which only the headers are real: files with holes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from tests.fakes.loopback_hub import Content, LoopbackHub
from tests.fakes.model_shapes import build_shape, write_sparse


def shape_files(folder: Path, shape: str, stem: str, quants: Sequence[str]) -> dict[str, Content]:
    """`<stem>-<QUANT>.gguf` for each of `quants`, written into `folder`."""
    files: dict[str, Content] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for quant in quants:
        name = f"{stem}-{quant.upper()}.gguf"
        files[name] = write_sparse(folder / name, shape, quant)
    return files


def name_hashes(server: LoopbackHub) -> None:
    """Give the files made-up hashes: those of many gigabytes of holes take too long."""
    for repo in server.repos.values():
        for files in repo.commits.values():
            for name, content in files.items():
                if isinstance(content, Path):
                    digest = hashlib.sha256(f"{repo.name}/{name}".encode()).hexdigest()
                    repo._hashes[id(content)] = digest


def header_bytes(shape: str, quant: str) -> int:
    """How long the header is, with the padding behind it."""
    return len(build_shape(shape, quant)[0])
