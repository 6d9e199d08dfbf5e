"""The commands that install a build of llama.cpp for what is in this machine. Pure."""

from __future__ import annotations

_PIP = "pip install --force-reinstall --no-cache-dir llama-cpp-python"

# CUDA versions for which the binding's maintainers publish ready-made builds (x86-64 only).
_CUDA_WHEELS = ((11, 8), (12, 1), (12, 2), (12, 3), (12, 4), (12, 5), (13, 0), (13, 2))

# CMake's switch for each of ggml's libraries.
SWITCHES = {
    "cuda": "-DGGML_CUDA=on",
    "hip": "-DGGML_HIP=on",
    "metal": "-DGGML_METAL=on",
    "vulkan": "-DGGML_VULKAN=on",
    "sycl": "-DGGML_SYCL=on -DCMAKE_C_COMPILER=icx -DCMAKE_CXX_COMPILER=icpx",
    "opencl": "-DGGML_OPENCL=on",
    "blas": "-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS",
}


def write_build_command(platform: str, switches: str = "", *, without_epoch: bool = False) -> str:
    """A line for this platform's shell (PowerShell on Windows) that builds the binding.

    `without_epoch` takes SOURCE_DATE_EPOCH away, under which ggml leaves out all SIMD.
    """
    if platform == "win32":
        parts = [write_unset_command(platform, "SOURCE_DATE_EPOCH")] if without_epoch else []
        parts += [f'$env:CMAKE_ARGS="{switches}"'] if switches else []
        return "; ".join([*parts, _PIP])
    epoch = "env -u SOURCE_DATE_EPOCH " if without_epoch else ""
    arguments = f'CMAKE_ARGS="{switches}" ' if switches else ""
    return f"{epoch}{arguments}{_PIP}"


def write_unset_command(platform: str, name: str) -> str:
    """A line that takes the environment variable `name` away for this session of the shell."""
    return f"Remove-Item Env:{name}" if platform == "win32" else f"unset {name}"


def find_cuda_wheels(cuda: tuple[int, int], arch: str) -> str | None:
    """The name of the index of ready-made builds (`cu124`) that a driver for `cuda` can run: the
    newest that is not newer than it. None where there is none."""
    if arch.lower() not in ("x86_64", "amd64"):
        return None
    usable = [version for version in _CUDA_WHEELS if version <= cuda]
    return "cu{}{}".format(*max(usable)) if usable else None


def name_gfx_target(number: int) -> str | None:
    """AMD's compiler target of the kernel's `gfx_target_version`: 110501 is `gfx1151`."""
    major, minor, step = number // 10000, number // 100 % 100, number % 100
    return f"gfx{major}{minor:x}{step:x}" if 7 <= major <= 20 else None
