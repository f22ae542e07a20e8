"""Speed of the native CPU library's products by the type of the weights, beside what the machine can do.

    python benchmarks/cpu_types.py [--types Q4_1 Q4_K …] [--rows 1 8 32 256] [--activations int16 int8] [--isa avx2]

One matrix of random blocks a type, larger than the caches, times rows of activations. Every figure is the best of
`--repeat` (other programs only ever make a product slower), packing the activations included. GB/s counts the weights
once in their file's bytes; the shares are of the limits printed at the top. "repack" is what loading does. FP8 and NF4
take float32 activations only.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aphrodite.kernels.cpu.library import NativeLibrary, load
from aphrodite.kernels.cpu.program import (
    Activation,
    Codes,
    GroupArrays,
    GroupKind,
    KvType,
    NativeMemory,
    OpKind,
    Program,
    ProgramBuilder,
    StepDesc,
    TileKind,
    repack,
    repack_groups,
    tiles_bytes,
)
from aphrodite.quantization.types import QuantType, RawTensor

OUT, COLUMNS = 24576, 4096
TOKENS = 64  # rows of activations that differ
READ_BYTES = 512 << 20
GROUPS = {
    **{
        f"INT{bits}_G{group}": GroupKind(bits, QuantType.F16, group)
        for bits, group in ((2, 64), (3, 128), (4, 32), (4, 128), (8, 128))
    },
    "FP8": GroupKind(8, QuantType.F32, COLUMNS, Codes.FLOAT8),
    "NF4": GroupKind(4, QuantType.F32, 64, Codes.TABLE),
}
# Where a block has float16 scales; random bytes there would be infinite now and then.
UNITS = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4", *GROUPS),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"),
)


@dataclass(frozen=True)
class Matrix:
    """A weight in tiles; `nbytes` as a file has it, `seconds` its repacking took."""

    kind: TileKind
    memory: NativeMemory
    nbytes: int
    seconds: float


def make_matrix(library: NativeLibrary, name: str) -> Matrix:
    generator = np.random.default_rng(0)
    kind = GROUPS.get(name) or QuantType[name]
    memory = NativeMemory(library, tiles_bytes(library, kind, OUT, COLUMNS))
    ctypes.memset(memory.address, 0, memory.size)  # pages are taken from the system here, not in the repacking
    if isinstance(kind, GroupKind):
        largest = 256 if kind.codes_a_byte == 2 else 1 << kind.bits
        codes = generator.integers(0, largest, (OUT, COLUMNS // kind.codes_a_byte), np.uint8)
        zeros = np.full((OUT, COLUMNS // kind.group), 1 << kind.bits - 1, np.uint8)
        scales = np.full(zeros.shape, 0.01, np.float32)
        if kind.scales is QuantType.F16:
            scales = scales.astype(np.float16).view(np.uint16)
        nbytes = OUT * COLUMNS * kind.bits // 8 + scales.nbytes
        integers = kind.codes is Codes.INTEGERS
        nbytes += zeros.nbytes * kind.bits // 8 if integers else 0
        table = np.linspace(-1, 1, 16, dtype=np.float32) if kind.codes is Codes.TABLE else None
        began = time.perf_counter()
        repack_groups(library, kind, GroupArrays(codes, scales, zeros if integers else None, table), memory.address)
        return Matrix(kind, memory, nbytes, time.perf_counter() - began)
    data = generator.integers(0, 256, (OUT, kind.row_bytes(COLUMNS)), np.uint8)
    blocks = data.reshape(-1, kind.block_bytes)
    if kind is QuantType.MXFP4:
        blocks[:, 0] = 120
    elif kind is QuantType.IQ1_M:
        blocks[:, 49::2] = blocks[:, 49::2] & 15 | np.array([0x00, 0x10, 0x20, 0x20], np.uint8)  # d is 0x2210
    else:
        for place in UNITS.get(name, (0,)):
            blocks[:, place : place + 2] = np.array([0.01], "<f2").view(np.uint8)
    began = time.perf_counter()
    repack(library, RawTensor(name, (OUT, COLUMNS), kind, data), memory.address)
    return Matrix(kind, memory, data.nbytes, time.perf_counter() - began)


class Products:
    """A program that packs rows of activations and multiplies them by one matrix."""

    def __init__(self, library: NativeLibrary, isa: str | None, threads: int) -> None:
        self._library, self._isa, self._threads = library, isa, threads
        values = np.random.default_rng(1).standard_normal((TOKENS, COLUMNS)).astype(np.float32)
        table = RawTensor("x", values.shape, QuantType.F32, values.view(np.uint8).reshape(TOKENS, -1))
        self._table = NativeMemory(library, tiles_bytes(library, QuantType.F32, TOKENS, COLUMNS))
        repack(library, table, self._table.address)
        self._cache = NativeMemory(library, 1 << 20)

    def seconds(self, matrix: Matrix, activation: Activation, rows: int, repeat: int) -> float:
        """Of packing and the product, the best of `repeat`."""
        program = self._program(matrix, activation)
        positions = np.arange(rows, dtype=np.int32)
        arrays: Sequence[np.ndarray] = (
            positions % TOKENS,
            positions,
            positions.astype(np.int64),
            np.array([0, rows], np.int32),
            np.array([rows], np.int32),
            np.arange(-(-rows // 16), dtype=np.int32),
            np.zeros(1, np.int32),
        )
        blocks, best = len(arrays[5]), float("inf")
        addresses: list[Any] = [array.ctypes.data for array in arrays]
        for _ in range(repeat):
            step = StepDesc(
                *addresses, *(rows, 1, blocks, blocks, 0), 0, self._cache.address, blocks, self._threads, None
            )
            began = time.perf_counter()
            program.run(step)
            best = min(best, time.perf_counter() - began)
        return best

    def _program(self, matrix: Matrix, activation: Activation) -> Program:
        builder = ProgramBuilder()
        source, out = builder.add_buffer(COLUMNS), builder.add_buffer(OUT)
        pack = builder.add_pack(activation, COLUMNS)
        lookup = builder.add_weight(self._table.address, QuantType.F32, (TOKENS, COLUMNS))
        weight = builder.add_weight(matrix.memory.address, matrix.kind, (OUT, COLUMNS), pack=pack)
        builder.add_op(OpKind.EMBED, output=source, weights=[lookup])
        builder.add_op(OpKind.PACK, source=source, packs=[pack])
        builder.add_op(OpKind.LINEAR, output=out, weights=[weight])
        angles = np.ones((8192, 8), np.float32)
        sizes = {"vocab_size": TOKENS, "num_layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 16}
        return builder.build(self._library, self._isa, angles, angles, **sizes, kv_type=KvType.FLOAT32)


def limits(library: NativeLibrary, isa: str, threads: int, repeat: int) -> dict[str, float]:
    """Bytes a second, and operations a second of each kind of dot product."""
    dots, read = library.cdll.aph_measure_dots, library.cdll.aph_measure_read
    dots.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64]
    read.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64]
    dots.restype = read.restype = ctypes.c_double
    memory = NativeMemory(library, READ_BYTES + 8192)
    ctypes.memset(memory.address, 1, memory.size)
    name = isa.encode()
    rates = {bits: 2 * max(dots(name, threads, bits, 1_000_000) for _ in range(repeat)) for bits in (16, 8)}
    plain = max(read(name, threads, memory.address, READ_BYTES) for _ in range(repeat))
    return {"read": plain, "int16": rates[16], "int8": rates[8], "float32": rates[16] / 2}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 256])
    parser.add_argument("--activations", nargs="+", default=["int16", "int8"], choices=["float32", "int16", "int8"])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--isa", default=None)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    library = load()
    isa = library.select_isa(options.isa) if library is not None else None
    if library is None or isa is None:
        raise SystemExit("the native library is not built or does not know the instruction set")
    threads = options.threads or library.cdll.aph_available_cores()
    library.cdll.aph_set_default_threads(threads)
    machine = limits(library, isa, threads, options.repeat)
    print(f"{isa}, {threads} threads: " + ", ".join(f"{name} {rate / 1e9:.0f} G/s" for name, rate in machine.items()))
    products = Products(library, options.isa, threads)
    for name in options.types:
        matrix = make_matrix(library, name)
        size = f"{matrix.nbytes / 1e6:.0f} MB, {matrix.memory.size / matrix.nbytes:.2f} times in tiles"
        print(f"{name}: {size}, repack {matrix.nbytes / matrix.seconds / 1e9:.1f} GB/s")
        floats = isinstance(matrix.kind, GroupKind) and matrix.kind.codes is not Codes.INTEGERS
        for activations in ["float32"] if floats else options.activations:
            cells = []
            for rows in options.rows:
                seconds = products.seconds(matrix, Activation[activations.upper()], rows, options.repeat)
                read, ops = matrix.nbytes / seconds, 2 * OUT * COLUMNS * rows / seconds
                shares = f"{read / machine['read']:.0%} of reading, {ops / machine[activations]:.0%} of dots"
                cells.append(f"{rows} rows {seconds * 1e3:.2f} ms ({read / 1e9:.1f} GB/s, {shares})")
            print(f"  {activations:8}" + "; ".join(cells), flush=True)


if __name__ == "__main__":
    main()
