"""Byte sources on this machine. The hub has its own for byte ranges of a remote file."""

from __future__ import annotations

import stat
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from llmrun.errors import DamagedFileError, LlmrunError, NotFoundError
from llmrun.text import escape_line


class FileSource:
    """A local file, open for as long as the `with` block runs.

    Raises NotFoundError where there is no file, DamagedFileError for what is not a regular file
    (a pipe would block for ever) and LlmrunError when it may not be read.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        shown = _shown(self.path)
        try:
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise DamagedFileError(f"{shown} is not a regular file", hint="name a .gguf file")
            self._file: BinaryIO = self.path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise NotFoundError(f"{shown} does not exist", hint="check the path") from error
        except (OSError, ValueError) as error:
            raise LlmrunError(f"{shown} cannot be read", why=_reason(error)) from error
        self._n_bytes = status.st_size

    @property
    def n_bytes(self) -> int:
        return self._n_bytes

    def read(self, offset: int, n_bytes: int) -> bytes:
        """See `ByteSource.read`. Raises LlmrunError when the disk fails."""
        try:
            self._file.seek(offset)
            chunk = self._file.read(n_bytes)
            if len(chunk) == n_bytes or not chunk:
                return chunk
            # One system call may return less than is there.
            parts = [chunk]
            n_left = n_bytes - len(chunk)
            while n_left and (chunk := self._file.read(n_left)):
                parts.append(chunk)
                n_left -= len(chunk)
            return b"".join(parts)
        except OSError as error:
            shown = _shown(self.path)
            raise LlmrunError(f"{shown} cannot be read", why=_reason(error)) from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class BytesSource:
    """Bytes in memory; with `n_bytes` larger than they are, the first bytes of a larger file."""

    def __init__(self, data: bytes, n_bytes: int | None = None) -> None:
        self._data = data
        self._n_bytes = len(data) if n_bytes is None else n_bytes

    @property
    def n_bytes(self) -> int:
        return self._n_bytes

    def read(self, offset: int, n_bytes: int) -> bytes:
        return self._data[offset : offset + n_bytes]


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _shown(path: Path) -> str:
    """A path that can be printed, also when its name is no valid text."""
    return escape_line(str(path)).encode(errors="backslashreplace").decode()
