"""ggml's devices, buffer types and llama.cpp's own account of a context's memory, by ctypes.

The binding declares none of these. Everything works on the libraries that it has loaded; this
module loads one by itself only where the system does not find a symbol through them (Windows).
Pointers are plain ints. Structures of ggml are never read, because their layout changes between
versions; scalars come from functions. The one exception is the `std::map` of `read_breakdown`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEVICE_TYPES = ("cpu", "gpu", "igpu", "accel", "meta")  # enum ggml_backend_dev_type

_LIBRARIES = ("ggml", "ggml-base", "ggml-cpu")
_BREAKDOWN = "_Z26llama_get_memory_breakdownPK13llama_context"
# A breakdown has an entry for each buffer type; a walk that finds more reads foreign memory.
_MAX_ENTRIES = 256


@dataclass(frozen=True, slots=True)
class GgmlDevice:
    """A device as the engine sees it. `type` is one of DEVICE_TYPES. A CPU tells all its RAM as
    free; a device that tells 0 and 0 can be given nothing."""

    name: str
    description: str
    backend: str
    type: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class BufferBytes:
    """One buffer type's part of a context's memory. `device` is "CPU" for all kinds of RAM."""

    buffer: str
    device: str
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int


class BreakdownUnavailableError(Exception):
    """This build of the library does not tell its memory in a form that is known here."""


class _Feature(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("value", ctypes.c_char_p))


@dataclass(frozen=True, slots=True)
class _MapLayout:
    """Where a C++ library keeps the nodes of a `std::map`: offsets in bytes on 64-bit machines.

    `values` is where the key starts; three size_t follow it."""

    n_bytes: int
    root: int
    count: int
    left: int
    right: int
    values: int


_MAP_LAYOUTS = {
    "libstdc++": _MapLayout(n_bytes=48, root=16, count=40, left=16, right=24, values=32),
    "libc++": _MapLayout(n_bytes=24, root=8, count=16, left=0, right=8, values=32),
}


class Ggml:
    """The functions of the ggml libraries behind the binding `C` (`llama_cpp.llama_cpp`).

    Raises AttributeError for what the installed build does not have.
    """

    def __init__(self, C: Any) -> None:
        self._C = C
        self._libraries: list[Any] | None = None

    def load_backends(self) -> None:
        """Load backends that are libraries of their own, in a build that has not linked them.
        Does nothing in a build that does not tell."""
        try:
            if self._call("ggml_backend_reg_count", ctypes.c_size_t) == 0:
                folder = str(_library_folder(self._C)).encode()
                self._call("ggml_backend_load_all_from_path", None, ctypes.c_char_p(folder))
        except AttributeError:
            return

    def devices(self) -> list[GgmlDevice]:
        """All devices, in the engine's order. Asking for the memory of a GPU may start its driver:
        seconds, and some hundred MiB of its memory until the process ends."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        found = []
        for device in self._device_pointers():
            free.value = total.value = 0
            self._call(
                "ggml_backend_dev_memory", None, device, ctypes.byref(free), ctypes.byref(total)
            )
            kind = self._call("ggml_backend_dev_type", ctypes.c_int, device)
            registry = self._pointer("ggml_backend_dev_backend_reg", device)
            found.append(
                GgmlDevice(
                    name=self._text("ggml_backend_dev_name", device),
                    description=self._text("ggml_backend_dev_description", device),
                    backend=self._text("ggml_backend_reg_name", registry) if registry else "",
                    type=DEVICE_TYPES[kind] if 0 <= kind < len(DEVICE_TYPES) else "accel",
                    free_bytes=free.value,
                    total_bytes=total.value,
                )
            )
        return found

    def gpu_names(self) -> list[str]:
        """Names of the devices that llama.cpp places layers on, without asking for their memory:
        those inside the processor only where there is no other. A card that two backends list is
        named twice, of which llama.cpp uses the first."""
        found: dict[int, list[str]] = {}
        for device in self._device_pointers():
            kind = self._call("ggml_backend_dev_type", ctypes.c_int, device)
            found.setdefault(kind, []).append(self._text("ggml_backend_dev_name", device))
        cards, inside = (found.get(DEVICE_TYPES.index(kind)) for kind in ("gpu", "igpu"))
        return cards or inside or []

    def backends(self) -> list[str]:
        return [self._text("ggml_backend_reg_name", registry) for registry in self._registries()]

    def features(self) -> list[str]:
        """What the backends were built to use: instruction sets ("AVX2"), for some a value
        ("ARCHS = 500,800"). What is off is left out."""
        features: list[str] = []
        for registry in self._registries():
            get = self._pointer(
                "ggml_backend_reg_get_proc_address",
                registry,
                ctypes.c_char_p(b"ggml_backend_get_features"),
            )
            if not get:
                continue
            prototype = ctypes.CFUNCTYPE(ctypes.POINTER(_Feature), ctypes.c_void_p)
            items = prototype(get)(registry)
            i = 0
            while items and items[i].name:
                name = items[i].name.decode("utf-8", "replace")
                value = (items[i].value or b"").decode("utf-8", "replace")
                if value != "0":
                    features.append(name if value in ("", "1") else f"{name} = {value}")
                i += 1
        return list(dict.fromkeys(features))

    def cpu_buffer_type(self) -> int:
        """The `ggml_backend_buffer_type_t` of plain RAM, for tensor overrides."""
        device = self._pointer("ggml_backend_dev_by_type", ctypes.c_int(DEVICE_TYPES.index("cpu")))
        return self._pointer("ggml_backend_dev_buffer_type", device) if device else 0

    def read_breakdown(self, ctx: Any) -> list[BufferBytes]:
        """What the context and its model take of each buffer type; without allocation
        (`no_alloc`) what they would take.

        `llama_get_memory_breakdown` is a C++ function that returns a
        `std::map<ggml_backend_buffer_type_t, {size_t model, context, compute}>`. Raises
        BreakdownUnavailableError when it is not there, the C++ library is none of those whose map
        is known, or the walk does not find as many nodes as the map says.
        """
        layout = _MAP_LAYOUTS.get(_cxx_library())
        if layout is None or ctypes.sizeof(ctypes.c_void_p) != 8:
            raise BreakdownUnavailableError("the C++ library is not known")
        try:
            function = self._C._lib[_BREAKDOWN]
        except AttributeError as error:
            raise BreakdownUnavailableError("the build does not export it") from error
        # A structure of more than 16 bytes is returned through a hidden pointer, as is a class.
        result = type("_Map", (ctypes.Structure,), {"_fields_": [("b", _bytes(layout.n_bytes))]})
        function.argtypes = [ctypes.c_void_p]
        function.restype = result
        found = function(ctx)
        entries = [self._entry(node, layout) for node in walk_map(ctypes.addressof(found), layout)]
        # The map's nodes are never freed: there is no destructor to call, and they are tiny.
        if any(entry is None for entry in entries):
            raise BreakdownUnavailableError("an entry has no name")
        return [entry for entry in entries if entry is not None]

    def _entry(self, node: int, layout: _MapLayout) -> BufferBytes | None:
        buffer_type, weights, kv, compute = (ctypes.c_size_t * 4).from_address(node + layout.values)
        buffer = self._text("ggml_backend_buft_name", buffer_type)
        device = self._pointer("ggml_backend_buft_get_device", buffer_type)
        is_host = self._call("ggml_backend_buft_is_host", ctypes.c_bool, buffer_type)
        # Pinned memory belongs to a GPU's backend, and still is RAM.
        name = self._text("ggml_backend_dev_name", device) if device and not is_host else "CPU"
        return BufferBytes(buffer, name, weights, kv, compute) if buffer and name else None

    def _device_pointers(self) -> list[int]:
        n_devices = self._call("ggml_backend_dev_count", ctypes.c_size_t)
        return [self._pointer("ggml_backend_dev_get", ctypes.c_size_t(i)) for i in range(n_devices)]

    def _registries(self) -> list[int]:
        n_backends = self._call("ggml_backend_reg_count", ctypes.c_size_t)
        return [
            self._pointer("ggml_backend_reg_get", ctypes.c_size_t(i)) for i in range(n_backends)
        ]

    def _text(self, name: str, pointer: int) -> str:
        value: bytes | None = self._call(name, ctypes.c_char_p, pointer)
        return (value or b"").decode("utf-8", "replace")

    def _pointer(self, name: str, *arguments: Any) -> int:
        """Call a function that returns a pointer; 0 is NULL."""
        return self._call(name, ctypes.c_void_p, *arguments) or 0

    def _call(self, name: str, restype: Any, *arguments: Any) -> Any:
        """Call `name`; ints are passed as pointers."""
        function = self.find(name)
        function.restype = restype
        return function(*(ctypes.c_void_p(a) if isinstance(a, int) else a for a in arguments))

    def find(self, name: str) -> Any:
        """The function `name` as a new object, so that no declaration of the binding is changed."""
        # Looked up in a library, a symbol is found in those that it was linked with as well, but
        # on Windows.
        try:
            return self._C._lib[name]
        except AttributeError:
            for library in self._load_libraries():
                try:
                    return library[name]
                except AttributeError:
                    continue
            raise

    def _load_libraries(self) -> list[Any]:
        if self._libraries is None:
            folder = _library_folder(self._C)
            pattern = {"win32": "{}.dll", "darwin": "lib{}.dylib"}.get(sys.platform, "lib{}.so")
            paths = [folder / pattern.format(name) for name in _LIBRARIES]
            self._libraries = [ctypes.CDLL(str(path)) for path in paths if path.exists()]
        return self._libraries


def walk_map(address: int, layout: _MapLayout) -> Iterator[int]:
    """Addresses of the nodes of the `std::map` at `address`, each once. Raises
    BreakdownUnavailableError when they are not as many as the map says."""
    (n_entries,) = (ctypes.c_size_t * 1).from_address(address + layout.count)
    if n_entries > _MAX_ENTRIES:
        raise BreakdownUnavailableError(f"it claims {n_entries} entries")
    pending = [_read_pointer(address + layout.root)] if n_entries else []
    n_found = 0
    while pending:
        node = pending.pop()
        if not node:
            continue
        n_found += 1
        if n_found > n_entries:
            break
        yield node
        pending += [_read_pointer(node + layout.left), _read_pointer(node + layout.right)]
    if n_found != n_entries:
        raise BreakdownUnavailableError(f"it has {n_entries} entries, and {n_found} were found")


def _read_pointer(address: int) -> int:
    return ctypes.c_void_p.from_address(address).value or 0


def _bytes(n: int) -> Any:
    return ctypes.c_uint64 * (n // 8)


def _cxx_library() -> str:
    """The C++ library that llama.cpp is built with here. A Linux build may use libc++ all the same:
    then it is among the process's libraries, and libstdc++ is not."""
    if sys.platform == "darwin":
        return "libc++"
    if sys.platform == "win32":
        return "msvc"
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return "libstdc++" if sys.platform == "linux" else ""
    if "libstdc++.so" in maps:
        return "libstdc++"
    return "libc++" if "libc++.so" in maps else ""


def _library_folder(C: Any) -> Path:
    return Path(C._lib._name).resolve().parent
