"""What this machine is: processor, memory, and how fast it reads."""

from __future__ import annotations

import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Instruction sets that decide between kernels, by the names that /proc/cpuinfo (x86, Arm) uses.
NOTABLE_FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def cpu_model() -> str:
    """The processor's name."""
    for line in _cpuinfo():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """Of `NOTABLE_FLAGS` those that the processor has; empty where the system does not tell."""
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            present = set(line.partition(":")[2].split())
            return [flag for flag in NOTABLE_FLAGS if flag in present]
    return []


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def read_bandwidth(threads: int, *, megabytes: int = 512, repeats: int = 7) -> float:
    """Bytes a second that `threads` threads read from memory in order: the best of `repeats` runs.

    A plain read (a dot product of a buffer with itself, larger than the caches). Kernels that prefetch
    may exceed it, so a share above 100 % of it is possible.
    """
    import numpy as np

    buffer = np.ones(megabytes * 2**20 // 4, dtype=np.float32)
    parts = np.array_split(buffer, threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            best = min(best, time.perf_counter() - began)
    return buffer.nbytes / best
