"""A `Probe` of a machine that exists only in a folder and in canned output of commands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmrun.hardware.processes import Reply
from llmrun.hardware.sources import Probe

MIB = 1 << 20
GIB = 1 << 30
LIBRARY_FOLDER = Path("/opt/python/llama_cpp/lib")
SUFFIXES = {"linux": "lib{}.so", "darwin": "lib{}.dylib", "win32": "{}.dll"}


class Child:
    """Stands for the child that asks the engine; counts how often it was started."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.requests: list[tuple[str, str]] = []

    def __call__(self, module: str, text: str, timeout_s: float) -> Reply:
        assert timeout_s == 15.0
        self.requests.append((module, text))
        return self.reply


def fake_probe(
    root: Path,
    files: Mapping[str, str] | None = None,
    *,
    commands: Mapping[str, str] | None = None,
    child: Child | Reply | None = None,
    libraries: Sequence[str] | None = ("base", "cpu"),
    platform: str = "linux",
    arch: str = "x86_64",
    environ: Mapping[str, str] | None = None,
    **changes,
) -> Probe:
    """`files` by absolute path; `commands` gives the output by the whole command line or by its
    first word; `libraries` are ggml's in the installed binding, None without one."""
    for path, text in (files or {}).items():
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    if libraries is not None:
        folder = root / str(LIBRARY_FOLDER).lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        names = ["ggml", "llama", *(f"ggml-{name}" for name in libraries)]
        for name in names:
            (folder / SUFFIXES[platform].format(name)).touch()

    def run(command: Sequence[str], timeout_s: float) -> str | None:
        outputs = commands or {}
        return outputs.get(" ".join(command), outputs.get(command[0]))

    if child is None:
        child = Child(Reply(None, "must not be asked"))
    fields = {
        "root": root,
        "platform": platform,
        "arch": arch,
        "run": run,
        "n_logical": lambda: 8,
        "affinity": lambda: None,
        "host_memory": lambda: None,
        "n_physical": lambda: None,
        "ask_module": child if isinstance(child, Child) else Child(child),
        "library_folder": lambda: None if libraries is None else LIBRARY_FOLDER,
        "environ": environ or {},
    }
    return Probe(**(fields | changes))


def device(
    name: str, description: str, free: int, total: int, *, backend: str = "", kind: str = "gpu"
) -> dict:
    """An entry of the child's answer."""
    return {
        "name": name,
        "description": description,
        "backend": backend or name.rstrip("0123456789"),
        "type": kind,
        "free": free,
        "total": total,
    }


def answer(*devices: dict, features: Sequence[str] = ("SSE3", "AVX", "AVX2"), **changes) -> Reply:
    """What the child says on a machine with `devices` beside its CPU."""
    ram = 64 * GIB
    cpu = device("CPU", "some processor", ram, ram, kind="cpu")
    fields = {
        "devices": [*devices, cpu],
        "features": list(features),
        "backends": sorted({entry["backend"] for entry in devices} | {"CPU"}),
        "version": "0.5.0",
        "supports_gpu_offload": bool(devices),
    }
    return Reply(json.dumps(fields | changes) + "\n")


def meminfo(total: int, available: int, **more: int) -> dict[str, str]:
    fields = {"MemTotal": total, "MemAvailable": available} | more
    return {"/proc/meminfo": "".join(f"{key}: {n >> 10} kB\n" for key, n in fields.items())}


def amd_card(vram: int, gtt: int, *, vram_used: int = 0, gtt_used: int = 0, card: str = "card0"):
    folder = f"/sys/class/drm/{card}/device"
    return {
        f"{folder}/vendor": "0x1002\n",
        f"{folder}/mem_info_vram_total": f"{vram}\n",
        f"{folder}/mem_info_vram_used": f"{vram_used}\n",
        f"{folder}/mem_info_gtt_total": f"{gtt}\n",
        f"{folder}/mem_info_gtt_used": f"{gtt_used}\n",
    }
