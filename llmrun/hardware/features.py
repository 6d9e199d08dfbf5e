"""Instruction sets in ggml's spelling, from what kernels call them. Pure."""

from __future__ import annotations

# (the kernel's word in /proc/cpuinfo, ggml's). What ggml needs for speed, the least first.
_LINUX = (
    ("pni", "SSE3"),
    ("ssse3", "SSSE3"),
    ("avx", "AVX"),
    ("avx2", "AVX2"),
    ("f16c", "F16C"),
    ("fma", "FMA"),
    ("bmi2", "BMI2"),
    ("avx_vnni", "AVX_VNNI"),
    ("avx512f", "AVX512"),
    ("avx512vbmi", "AVX512_VBMI"),
    ("avx512_vnni", "AVX512_VNNI"),
    ("avx512_bf16", "AVX512_BF16"),
    ("amx_int8", "AMX_INT8"),
    ("asimd", "NEON"),
    ("asimddp", "DOTPROD"),
    ("asimdhp", "FP16_VA"),
    ("i8mm", "MATMUL_INT8"),
    ("sve", "SVE"),
    ("sme", "SME"),
)
# macOS on Intel: machdep.cpu.features and .leaf7_features.
_DARWIN_X86 = (
    ("SSE3", "SSE3"),
    ("SSSE3", "SSSE3"),
    ("AVX1.0", "AVX"),
    ("AVX2", "AVX2"),
    ("F16C", "F16C"),
    ("FMA", "FMA"),
    ("BMI2", "BMI2"),
    ("AVX512F", "AVX512"),
)
# macOS on Apple silicon: hw.optional.arm.* that are "1".
_DARWIN_ARM = (
    ("FEAT_DotProd", "DOTPROD"),
    ("FEAT_FP16", "FP16_VA"),
    ("FEAT_I8MM", "MATMUL_INT8"),
    ("FEAT_SME", "SME"),
)


def read_linux_features(cpuinfo: str) -> tuple[str, ...]:
    """From the first processor's `flags` (x86) or `Features` (ARM) line."""
    words = _first_value(cpuinfo, ("flags", "Features")).split()
    return tuple(ggml for kernel, ggml in _LINUX if kernel in words)


def read_linux_name(cpuinfo: str) -> str | None:
    """The maker's name of the processor; ARM kernels often have none."""
    return _first_value(cpuinfo, ("model name", "Model", "cpu model", "Hardware")) or None


def read_darwin_features(sysctl: dict[str, str]) -> tuple[str, ...]:
    if sysctl.get("hw.optional.arm64") == "1":
        arm = [ggml for name, ggml in _DARWIN_ARM if sysctl.get(f"hw.optional.arm.{name}") == "1"]
        return ("NEON", *arm)
    words = " ".join(sysctl.get(f"machdep.cpu.{key}", "") for key in ("features", "leaf7_features"))
    return tuple(ggml for kernel, ggml in _DARWIN_X86 if kernel in words.split())


def _first_value(cpuinfo: str, keys: tuple[str, ...]) -> str:
    """The value of the first of `keys` that has one; the order of the keys decides."""
    values: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, found, value = line.partition(":")
        if found and value.strip():
            values.setdefault(name.strip(), value.strip())
    return next((values[key] for key in keys if key in values), "")
