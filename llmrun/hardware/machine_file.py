"""Machines as files, so that a plan can be made for a machine that is elsewhere.

TOML, or JSON with the same keys. Only `memory.total` must be there:

    name = "my next PC"
    platform = "linux"              # or "darwin", "win32"
    arch = "x86_64"                 # or "arm64"
    notes = ["a sentence"]

    [cpu]
    name = "AMD Ryzen 7 7700"
    n_logical = 16                  # hardware threads; then those that may be used (n_affinity),
    n_physical = 8                  # their cores, the fast ones among these (n_performance)
    quota = 2.5                     # a container's limit in cores
    features = ["AVX2", "AVX512"]

    [memory]
    total = "32GiB"                 # or a number of bytes
    available = "26GiB"             # when left out: total less a quarter, at most 4 GiB
    bandwidth = "80GB/s"
    limit_source = "system"

    [[device]]                      # one for each GPU, in the engine's order
    name = "CUDA0"
    description = "NVIDIA GeForce RTX 3060"
    backend = "CUDA"                # or "ROCm", "Metal", "Vulkan", "SYCL"
    kind = "gpu"                    # or "igpu"
    total = "12GiB"
    free = "11GiB"                  # when left out: total less a sixteenth, at most 1 GiB
    shares_host_memory = false      # true: its memory is a part of RAM
    bandwidth = "360GB/s"           # when left out: by the description, where it is known
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from llmrun.errors import UsageError
from llmrun.hardware.bandwidth import bandwidth_of
from llmrun.hardware.machine import Cpu, Device, DeviceKind, Machine, Memory
from llmrun.text import close_names, escape_line, parse_bytes

T = TypeVar("T")

MAX_FILE_BYTES = 1 << 20
_GIB = 1 << 30
_MIN_TOTAL = 1 << 20
_MAX_TOTAL = 1 << 46
_MAX_BANDWIDTH = 1e14
_MAX_CPUS = 1 << 14
_MAX_DEVICES = 64
_MAX_WORDS = 200
_KINDS: Mapping[str, DeviceKind] = {"gpu": "gpu", "igpu": "igpu"}


def parse_machine(text: str, where: str, *, is_json: bool = False) -> Machine:
    """The machine that `text` describes. `where` names the text in errors. Raises UsageError that
    names the line and key to mend."""
    try:
        values = json.loads(text) if is_json else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if is_json else "TOML"
        why = escape_line(str(error))[:_MAX_WORDS] or "it is nested too deeply"
        raise UsageError(
            f"{where} is not {kind}", why=why, hint="mend that line, or use a known name"
        ) from error
    return read_machine(values, where, text)


def read_machine(values: object, where: str, text: str = "") -> Machine:
    """The machine that a parsed table describes. Raises UsageError; the line is looked up in
    `text`."""
    table = _Table(values, where, text, ())
    name = table.words("name")
    platform = table.words("platform") or "linux"
    arch = table.words("arch") or "x86_64"
    notes = table.word_list("notes")
    memory = _read_memory(table.child("memory"))
    cpu = _read_cpu(table.child("cpu"))
    entries = table.take("device", list, "tables that begin with [[device]]") or []
    if len(entries) > _MAX_DEVICES:
        table.fail("device", f"has {len(entries)} entries, at most {_MAX_DEVICES} are possible")
    devices = tuple(
        _read_device(_Table(entry, where, text, ("device", i)), i, memory)
        for i, entry in enumerate(entries)
    )
    names = [device.name for device in devices]
    if len(set(names)) < len(names):
        table.fail("device", "has two entries of the same name", 'name = "CUDA1"')
    table.end(("name", "platform", "arch", "notes", "cpu", "memory", "device"))
    return Machine(cpu, memory, devices, platform, arch, name, notes)


def dump_machine(machine: Machine) -> str:
    """`machine` as TOML. What `parse_machine` reads from it is equal, where names are printable and
    the memory is known."""
    cpu, memory = machine.cpu, machine.memory
    lines = [
        *_line("name", machine.name),
        *_line("platform", machine.platform),
        *_line("arch", machine.arch),
        *_line("notes", machine.notes),
        "",
        "[cpu]",
        *_line("name", cpu.name),
        *_line("n_logical", cpu.n_logical),
        *_line("n_affinity", cpu.n_affinity),
        *_line("n_physical", cpu.n_physical),
        *_line("n_performance", cpu.n_performance),
        *_line("quota", cpu.quota),
        *_line("features", cpu.features),
        "",
        "[memory]",
        *_line("total", _write_size(memory.total_bytes)),
        *_line("available", _write_size(memory.available_bytes)),
        *_line("limit_source", memory.limit_source),
        *_line("bandwidth", memory.bandwidth_bytes_s),
    ]
    for device in machine.devices:
        lines += [
            "",
            "[[device]]",
            *_line("name", device.name),
            *_line("description", device.description),
            *_line("backend", device.backend),
            *_line("kind", device.kind),
            *_line("total", _write_size(device.total_bytes)),
            *_line("free", _write_size(device.free_bytes)),
            *_line("shares_host_memory", device.shares_host_memory),
            # 0 is "not known", which keeps the table from being asked.
            *_line("bandwidth", device.bandwidth_bytes_s or 0),
        ]
    return "\n".join(lines) + "\n"


def _read_memory(table: _Table) -> Memory:
    total = table.size("total", low=_MIN_TOTAL)
    if total is None:
        table.fail("total", "is missing", 'total = "16GiB"')
    available = table.size("available", high=total, limit="memory.total")
    if available is None:
        available = total - min(total // 4, 4 * _GIB)
    source = table.words("limit_source") or "system"
    bandwidth = table.bandwidth("bandwidth")
    table.end(("total", "available", "bandwidth", "limit_source"))
    return Memory(total, available, source, bandwidth or None)


def _read_cpu(table: _Table) -> Cpu:
    n_physical = table.count("n_physical")
    n_logical = table.count("n_logical")
    n_affinity = table.count("n_affinity")
    n_logical = n_logical or n_affinity or n_physical or 4
    n_affinity = n_affinity or n_logical
    if n_affinity > n_logical:
        table.fail("n_affinity", f"is above n_logical, {n_logical}")
    n_physical = n_physical or n_affinity
    if n_physical > n_affinity:
        table.fail("n_physical", f"is above the {n_affinity} hardware threads")
    n_performance = table.count("n_performance")
    if n_performance is not None and n_performance > n_physical:
        table.fail("n_performance", f"is above n_physical, {n_physical}")
    quota = table.number("quota")
    if quota is not None and not 0 < quota <= _MAX_CPUS:
        table.fail("quota", "is no count of cores", "quota = 2.5")
    name, features = table.words("name"), table.word_list("features")
    keys = ("name", "n_logical", "n_affinity", "n_physical", "n_performance", "quota", "features")
    table.end(keys)
    return Cpu(n_logical, n_affinity, n_physical, quota, n_performance, name, features)


def _read_device(table: _Table, index: int, memory: Memory) -> Device:
    backend = table.words("backend") or ""
    name = table.words("name") or f"{backend or 'GPU'}{index}"
    description = table.words("description") or name
    kind = _KINDS.get(table.words("kind") or "gpu")
    if kind is None:
        table.fail("kind", "is neither gpu nor igpu", 'kind = "gpu"')
    is_shared = table.take("shares_host_memory", bool, "true or false") or False
    total = table.size("total")
    if total is None:
        table.fail("total", "is missing", 'total = "12GiB"')
    if is_shared and total > memory.total_bytes:
        table.fail("total", "is above memory.total, of which it is a part")
    free = table.size("free", high=total, limit="total")
    if free is None:
        free = total - min(total // 16, _GIB)
        free = min(free, memory.available_bytes) if is_shared else free
    bandwidth = table.bandwidth("bandwidth")
    if bandwidth is None:
        bandwidth = bandwidth_of(description, memory.total_bytes if is_shared else total)
    table.end(
        (
            "name",
            "description",
            "backend",
            "kind",
            "total",
            "free",
            "shares_host_memory",
            "bandwidth",
        )
    )
    return Device(name, description, kind, free, total, is_shared, backend, bandwidth or None)


class _Table:
    """A table of a machine file, at `path` in it. What is wrong with it becomes a UsageError."""

    def __init__(self, values: object, where: str, text: str, path: tuple[str | int, ...]) -> None:
        self._where = where
        self._text = text
        self._path = path
        if not isinstance(values, dict):
            self.fail(None, "is not a table")
        self._values: dict[str, Any] = values

    def fail(self, key: str | None, what: str, example: str | None = None) -> NoReturn:
        path = self._path if key is None else (*self._path, key)
        dotted = ".".join(escape_line(str(part))[:_MAX_WORDS] for part in path) or "the file"
        number = find_line(self._text, path)
        where = self._where if number is None else f"{self._where}, line {number}"
        why = None
        if number is not None:
            why = (
                f"it says: {escape_line(self._text.splitlines()[number - 1].strip())[:_MAX_WORDS]}"
            )
        hint = None if example is None else f"write a line such as: {example}"
        raise UsageError(f"{where}: {dotted} {what}", why=why, hint=hint)

    def end(self, known: tuple[str, ...]) -> None:
        """Refuse keys that mean nothing here: a slip must not be taken for a default."""
        for key in self._values:
            if key not in known:
                near = close_names(str(key), known, n=1)
                what = "is not a key of this table"
                self.fail(str(key), f"{what} (did you mean {near[0]}?)" if near else what)

    def child(self, key: str) -> _Table:
        values = self._values.get(key, {})
        return _Table(values, self._where, self._text, (*self._path, key))

    def take(self, key: str, kind: type[T], words: str) -> T | None:
        value = self._values.get(key)
        if value is not None and not isinstance(value, kind):
            self.fail(key, f"should be {words}")
        return value

    def words(self, key: str) -> str | None:
        value = self.take(key, str, 'a text in "quotes"')
        if value is not None and (len(value) > _MAX_WORDS or escape_line(value) != value):
            self.fail(key, f"is not a printable text of at most {_MAX_WORDS} characters")
        return value or None

    def word_list(self, key: str) -> tuple[str, ...]:
        values = self.take(key, list, "a list of texts") or []
        for value in values[: _MAX_WORDS + 1]:
            is_word = isinstance(value, str) and len(value) <= _MAX_WORDS
            if not is_word or escape_line(value) != value or len(values) > _MAX_WORDS:
                self.fail(key, "should be a short list of printable texts")
        return tuple(values)

    def count(self, key: str) -> int | None:
        value = self._values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_CPUS:
            self.fail(key, f"should be a whole number from 1 to {_MAX_CPUS}", f"{key} = 8")
        return value

    def number(self, key: str) -> float | None:
        value = self._values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            self.fail(key, "should be a number")
        return value

    def size(
        self, key: str, *, low: int = 0, high: int = _MAX_TOTAL, limit: str = "64 TiB"
    ) -> int | None:
        value = self._measure(key, parse_bytes, 'a size such as "16GiB"')
        if value is None:
            return None
        if isinstance(value, float) or value < low:
            self.fail(key, "is no size of a memory in bytes", f'{key} = "16GiB"')
        if value > high:
            self.fail(key, f"is above {limit}", f'{key} = "16GiB"')
        return value

    def bandwidth(self, key: str) -> float | None:
        """In bytes/s; 0 where the file says that it is not known."""
        value = self._measure(
            key, lambda text: parse_bytes(text.removesuffix("/s")), 'a speed such as "360GB/s"'
        )
        if value is not None and not (value == 0 or 1e6 <= value <= _MAX_BANDWIDTH):
            self.fail(key, "is no speed of a memory in bytes/s", f'{key} = "360GB/s"')
        return None if value is None else float(value)

    def _measure(self, key: str, parse: Callable[[str], int], words: str) -> int | float | None:
        value = self._values.get(key)
        if isinstance(value, str):
            try:
                return parse(value)
            except ValueError:
                self.fail(key, f"should be {words}")
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            self.fail(key, f"should be {words}")
        return value


def find_line(text: str, path: tuple[str | int, ...]) -> int | None:
    """The number of the line of TOML or JSON that `path` is written on, or what holds it; a plain
    search, for error messages only."""
    here: tuple[str | int, ...] = ()
    lines: dict[tuple[str | int, ...], int] = {}
    n_tables: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[\[\s*([\w-]+)\s*\]\]", line):
            here = (match[1], n_tables.get(match[1], 0))
            n_tables[match[1]] = n_tables.get(match[1], 0) + 1
            lines.setdefault((match[1],), number)
            lines[here] = number
        elif match := re.match(r"\s*\[\s*([\w-]+)\s*\]", line):
            here = (match[1],)
            lines.setdefault(here, number)
        elif match := re.match(r'\s*"?([\w-]+)"?\s*[=:]', line):
            lines.setdefault((*here, match[1]), number)
    for n_parts in range(len(path), 0, -1):
        if path[:n_parts] in lines:
            return lines[path[:n_parts]]
    return None


def _write_size(n_bytes: int) -> str | int:
    for name, unit in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if n_bytes and n_bytes % unit == 0:
            return f"{n_bytes // unit}{name}"
    return n_bytes


def _line(key: str, value: object) -> list[str]:
    """`key = value`; nothing for what is not there."""
    if value is None or value == () or value == "":
        return []
    return [f"{key} = {_write_value(value)}"]


def _write_value(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_write_value, value))}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for surrogate pairs, which are not made here.
        return json.dumps(escape_line(value)[:_MAX_WORDS], ensure_ascii=False)
    return json.dumps(value)
