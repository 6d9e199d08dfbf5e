"""How fast memory is read: known GPUs and chips from a table, this machine's RAM by measuring.

The makers' figures: transfer rate times bus width. What a program reaches is less.
"""

from __future__ import annotations

import re
import sys
import time

_GB = 10**9

# GB/s by the name as `_normalize` leaves it. A name that is not here is not guessed at: "4070" and
# "4070 ti super" are different cards. Two versions of one name are told apart by `_BY_SIZE`, else
# the slower one counts.
_TABLE: dict[str, float] = {
    # NVIDIA, desktop
    "gtx 1060": 192, "gtx 1070": 256, "gtx 1070 ti": 256, "gtx 1080": 320, "gtx 1080 ti": 484,
    "gtx 1650": 128, "gtx 1660": 192, "gtx 1660 super": 336, "gtx 1660 ti": 288,
    "rtx 2060": 336, "rtx 2060 super": 448, "rtx 2070": 448, "rtx 2070 super": 448,
    "rtx 2080": 448, "rtx 2080 super": 496, "rtx 2080 ti": 616, "titan rtx": 672,
    "rtx 3050": 224, "rtx 3060": 360, "rtx 3060 ti": 448, "rtx 3070": 448, "rtx 3070 ti": 608,
    "rtx 3080": 760, "rtx 3080 ti": 912, "rtx 3090": 936, "rtx 3090 ti": 1008,
    "rtx 4060": 272, "rtx 4060 ti": 288, "rtx 4070": 504, "rtx 4070 super": 504,
    "rtx 4070 ti": 504, "rtx 4070 ti super": 672, "rtx 4080": 717, "rtx 4080 super": 736,
    "rtx 4090": 1008, "rtx 4090 d": 1008,
    "rtx 5050": 320, "rtx 5060": 448, "rtx 5060 ti": 448, "rtx 5070": 672, "rtx 5070 ti": 896,
    "rtx 5080": 960, "rtx 5090": 1792, "rtx 5090 d": 1792,
    # NVIDIA, laptops
    "rtx 4050 laptop": 192, "rtx 4060 laptop": 256, "rtx 4070 laptop": 256,
    "rtx 4080 laptop": 432, "rtx 4090 laptop": 576, "rtx 5060 laptop": 384,
    "rtx 5070 laptop": 384, "rtx 5070 ti laptop": 672, "rtx 5080 laptop": 896,
    "rtx 5090 laptop": 896,
    # NVIDIA, workstations and servers
    "rtx a4000": 448, "rtx a5000": 768, "rtx a6000": 768, "rtx 4000 ada generation": 360,
    "rtx 5000 ada generation": 576, "rtx 6000 ada generation": 960,
    "rtx pro 6000 blackwell workstation edition": 1792,
    "rtx pro 6000 blackwell max q workstation edition": 1792,
    "rtx pro 6000 blackwell server edition": 1597,
    "t4": 320, "l4": 300, "l40": 864, "l40s": 864, "a10": 600, "a10g": 600, "a40": 696,
    "p40": 346, "p100 pcie 16gb": 732, "v100 sxm2 16gb": 900, "v100 sxm2 32gb": 900,
    "a100 sxm4 40gb": 1555, "a100 pcie 40gb": 1555, "a100 80gb pcie": 1935,
    "a100 sxm4 80gb": 2039, "h100 80gb hbm3": 3350, "h100 pcie": 2000, "h100 nvl": 3900,
    "h200": 4800, "h200 nvl": 4800, "b200": 8000, "gb10": 273, "thor": 273,
    # AMD
    "rx 6600": 224, "rx 6600 xt": 256, "rx 6650 xt": 280, "rx 6700 xt": 384, "rx 6750 xt": 432,
    "rx 6800": 512, "rx 6800 xt": 512, "rx 6900 xt": 512, "rx 6950 xt": 576, "rx 7600": 288,
    "rx 7600 xt": 288, "rx 7700 xt": 432, "rx 7800 xt": 624, "rx 7900 gre": 576,
    "rx 7900 xt": 800, "rx 7900 xtx": 960, "rx 9060 xt": 320, "rx 9070": 640, "rx 9070 xt": 640,
    "vii": 1024, "pro w7800": 576, "pro w7900": 864, "instinct mi210": 1638,
    "instinct mi300x": 5300, "8060s": 256, "8050s": 256, "8040s": 256,
    "ryzen ai max+ 395": 256, "ryzen ai max 390": 256, "ryzen ai max 385": 256,
    "ryzen ai max+ pro 395": 256, "ryzen ai max pro 390": 256, "ryzen ai max pro 385": 256,
    # Intel
    "arc a380": 186, "arc a580": 512, "arc a750": 512, "arc a770": 512, "arc b570": 380,
    "arc b580": 456, "arc pro b50": 224, "arc pro b60": 456,
    # Apple
    "m1": 68, "m1 pro": 200, "m1 max": 400, "m1 ultra": 800, "m2": 100, "m2 pro": 200,
    "m2 max": 400, "m2 ultra": 800, "m3": 100, "m3 pro": 150, "m3 max": 300, "m3 ultra": 819,
    "m4": 120, "m4 pro": 273, "m4 max": 410, "m5": 153, "m5 pro": 307, "m5 max": 460,
}  # fmt: skip

# (from, below, GB/s): versions of one name by their memory in GiB (of the whole Mac for Apple).
_BY_SIZE: dict[str, tuple[tuple[float, float, float], ...]] = {
    "rtx 3050": ((0, 7, 168),),
    "rtx 3060": ((0, 9, 240),),
    "rtx 3080": ((11, 99, 912),),
    "arc a770": ((12, 99, 560),),
    "m3 max": ((40, 90, 400), (120, 999, 400)),
    "m4 max": ((40, 999, 546),),
    "m5 max": ((40, 999, 614),),
}

_NOISE = re.compile(
    r"\([^)]*\)|\b(?:nvidia|geforce|tesla|amd|radeon|intel|apple|graphics|gpu|corporation)\b"
    r"|\bw/.*|\b\d+-core.*"
)


def bandwidth_of(description: str, total_bytes: int = 0) -> float | None:
    """Bytes/s that the memory of the device or chip so described delivers at best; None when it is
    not known. `total_bytes` (of a Mac: all its RAM) tells versions of one name apart."""
    name = _normalize(description)
    speed = _TABLE.get(name)
    for low, below, other in _BY_SIZE.get(name, ()):
        if total_bytes and low <= total_bytes / (1 << 30) < below:
            speed = other
    return None if speed is None else float(speed * _GB)


def _normalize(description: str) -> str:
    """`NVIDIA GeForce RTX 4070 Ti SUPER` -> `rtx 4070 ti super`."""
    # "(TM)" sticks to words, the names of drivers in brackets follow them.
    text = re.sub(r"\((?:r|tm)\)", " ", description.lower())
    return " ".join(re.findall(r"[a-z0-9+]+", _NOISE.sub(" ", text)))


def measure_ram_bandwidth(
    seconds: float = 0.1, *, n_threads: int | None = None, available_bytes: int | None = None
) -> float:
    """Bytes/s at which `n_threads` (default: one for each core of this process) read RAM together.
    0.0 when it cannot be measured.

    Takes some tenths of a second in all: the buffers, larger than caches, are filled first. They
    take no more than an eighth of `available_bytes`. Where other programs take the processor in
    between, it is at least what one thread reads in the time that it really runs.
    """
    try:
        import numpy as np
    except ImportError:
        return 0.0
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier, BrokenBarrierError

    n_threads = max(1, min(n_threads or _count_cores(), _MAX_THREADS))
    n_bytes = max(_BUFFERS_BYTES // n_threads, _MIN_BUFFER_BYTES)
    if available_bytes is not None:
        n_bytes = min(n_bytes, available_bytes // 8 // n_threads)
    n_items = n_bytes // 8
    if n_items < _PART_ITEMS:
        return 0.0
    barrier = Barrier(n_threads)

    def read() -> tuple[float, float, float, int]:
        try:
            # Zeros would all be the same page.
            buffer = np.ones(n_items, dtype=np.int64)
            parts = [buffer[i : i + _PART_ITEMS] for i in range(0, n_items, _PART_ITEMS)]
        except MemoryError:
            barrier.abort()
            raise
        barrier.wait(timeout=_PATIENCE_S)
        n_read, cpu_start, start = 0, time.thread_time(), time.perf_counter()
        end = start
        while end - start < seconds:
            for part in parts:
                np.add.reduce(part)
                n_read += part.nbytes
                end = time.perf_counter()
                if end - start >= seconds:
                    break
        return start, end, time.thread_time() - cpu_start, n_read

    try:
        with ThreadPoolExecutor(n_threads) as pool:
            results = [future.result() for future in [pool.submit(read) for _ in range(n_threads)]]
    except (MemoryError, BrokenBarrierError, RuntimeError):
        return 0.0
    took = max(end for _, end, _, _ in results) - min(start for start, _, _, _ in results)
    together = sum(n_read for _, _, _, n_read in results) / took if took > 0 else 0.0
    if not _HAS_FINE_CLOCK:
        return together
    alone = [n_read / ran for _, _, ran, n_read in results if ran > _LEAST_RUN_S]
    return max(together, *alone, 0.0)


_MAX_THREADS = 32  # no machine needs more to fill its memory channels
_BUFFERS_BYTES = 256 << 20
_MIN_BUFFER_BYTES = 32 << 20
_PART_ITEMS = 1 << 19  # 4 MiB: looks at the clock some thousand times a second
_PATIENCE_S = 5.0
_LEAST_RUN_S = 1e-3
_HAS_FINE_CLOCK = sys.platform != "win32"  # there a thread's time comes in steps of 16 ms


def _count_cores() -> int:
    from llmrun.hardware.probe import detect_machine
    from llmrun.hardware.threads import choose_threads

    return choose_threads(detect_machine().cpu).n_threads
