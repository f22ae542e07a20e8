"""Compile Triton kernels for GPUs that are not there, and read what the compiler made of them."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Target, and the shared memory that a block can have on it, bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
}
NVIDIA = ("sm_80", "sm_90")


@dataclass(frozen=True)
class KernelCase:
    """One kernel in one configuration.

    Attributes:
        name: for the test's id.
        kernel: a `triton.jit` function, whether under `direct_launch` or not.
        arguments: every parameter by name. A string is a run-time argument in Triton's notation ("*bf16", "*i32",
            "i32", "fp32"); pointers are taken as 16-byte aligned, as torch's allocations are, and "i32:16" is an
            integer known to be a multiple of 16. Anything else (numbers, bools, None, tl dtypes) is a compile-time
            constant; a string constant is written `Constant("silu")`.
        num_warps, num_stages: as at the launch; None for Triton's default.
        targets: of TARGETS; PDL cases want ("sm_90",).
        spills: registers spilled that are accepted, for the rare case where that was measured to be right.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int | None = None
    targets: Sequence[str] = tuple(TARGETS)
    spills: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


class Constant(NamedTuple):
    """A compile-time constant that is a string."""

    value: str


class Compiled(NamedTuple):
    """What came out.

    Attributes:
        registers: per thread.
        spills: bytes of stack a thread (CUDA), spilled vector registers (HIP).
        shared: bytes a block.
        asm: by stage: "ttir", "ttgir", "llir", "ptx" or "amdgcn", ...
    """

    registers: int
    spills: int
    shared: int
    asm: Mapping[str, Any]


def compile_case(case: KernelCase, target_name: str) -> Compiled:
    """`case` compiled for one of TARGETS; Triton's cache serves repetitions."""
    target, _ = TARGETS[target_name]
    options = {"num_warps": case.num_warps, **case.options}
    if case.num_stages is not None:
        options["num_stages"] = case.num_stages
    if target.backend == "hip":
        options.pop("launch_pdl", None)
    compiled = triton.compile(_source(case), target=target, options=options)
    if target.backend == "hip":
        registers, spills = _read_amd(compiled.asm["amdgcn"])
    else:
        registers, spills = _read_cubin(compiled.asm["cubin"])
    return Compiled(registers, spills, compiled.metadata.shared, compiled.asm)


def _source(case: KernelCase) -> ASTSource:
    kernel = getattr(case.kernel, "jitted", case.kernel)
    names = kernel.arg_names
    if unknown := set(case.arguments) ^ set(names):
        raise ValueError(f"{case.name}: arguments that differ from the kernel's: {sorted(unknown)}")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(names):
        value = case.arguments[name]
        if isinstance(value, str):
            kind, _, multiple = value.partition(":")
            signature[name] = kind
            if multiple == "16" or kind.startswith("*"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = value.value if isinstance(value, Constant) else value
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource  # not in every Triton

        return GluonASTSource(kernel, signature, constants, attributes)
    return ASTSource(kernel, signature, constants, attributes)


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = re.search(r"REG:(\d+)", report)
    stack = re.search(r"STACK:(\d+)", report)
    if registers is None or stack is None:
        raise ValueError(f"cuobjdump's report was not understood: {report}")
    return int(registers[1]), int(stack[1])


def _read_amd(assembly: str) -> tuple[int, int]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    if registers is None or spills is None:
        raise ValueError("the assembly names no registers")
    return int(registers[1]), int(spills[1])


@functools.cache
def _cuobjdump() -> str:
    import triton.backends.nvidia

    return str(Path(next(iter(triton.backends.nvidia.__path__))) / "bin" / "cuobjdump")
