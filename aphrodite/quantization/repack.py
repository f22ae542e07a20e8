"""Checkpoint tensors into the canonical layouts, on the device on which they stay.

The words of a checkpoint travel as they are, in pieces through pinned memory, and are reordered on the device. Beside
the result there are the words of one matrix and a few pieces of 4 million values.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from aphrodite.kernels.dispatch import Declined
from aphrodite.quantization.at_load import AtLoadMatrix, quantize
from aphrodite.quantization.gguf_fields import BLOCK_FORMS
from aphrodite.quantization.grid_fields import GRID_FORMS
from aphrodite.quantization.layouts import (
    CodebookGroups,
    GgufBlocks,
    Int4Groups,
    Int8Groups,
    NarrowGroups,
    PackedLayout,
    consecutive_permutation,
    stack_layouts,
    unpack_bits,
)
from aphrodite.quantization.noise import noise_blocks
from aphrodite.quantization.packed import (
    AWQ_NIBBLES,
    AwqMatrix,
    BitsAndBytesMatrix,
    GptqMatrix,
    NoiseMatrix,
    PackedMatrix,
    PackedTensor,
    PackQuantizedMatrix,
    ScaledMatrix,
    e4m3_values,
    e5m2_values,
)
from aphrodite.quantization.types import NoiseTensor, QuantType, RawTensor

_PIECE_BYTES = 16 << 20  # in flight to the device
_PIECE_VALUES = 4 << 20  # reordered at a time
_DENSE = {QuantType.F32: torch.float32, QuantType.F16: torch.float16, QuantType.BF16: torch.bfloat16}


def decline_layout(raw: RawTensor) -> Declined | None:
    """Why a tensor has no canonical layout; None if it has. Reads no weights but the groups of an act-order."""
    if not isinstance(raw, PackedTensor):
        packed = raw.qtype in BLOCK_FORMS or raw.qtype in GRID_FORMS
        return None if packed else Declined(f"{raw.qtype.name} has no packed kernel")
    matrix = raw.matrix
    if isinstance(matrix, GptqMatrix | PackQuantizedMatrix):
        if matrix.shape[1] % 8:
            return Declined(f"{matrix.shape[1]} inputs are no multiple of 8")
        if matrix.group_of is not None and _permutation(matrix, matrix.scale_groups) is None:
            return Declined("the groups of the act-order have unequal sizes")
    if isinstance(matrix, ScaledMatrix) and matrix.shape[1] % matrix.tile[1]:
        return Declined(f"blocks of {matrix.tile[1]} do not divide {matrix.shape[1]} inputs")
    if isinstance(matrix, BitsAndBytesMatrix) and matrix.shape[1] % matrix.block:
        return Declined(f"blocks of {matrix.block} cross the rows of {matrix.shape[1]} inputs")
    return Declined(f"{matrix.shape[1]} inputs are odd") if matrix.shape[1] % 2 else None


def layout_of(raw: RawTensor, device: torch.device) -> PackedLayout:
    """A matrix in its canonical layout on `device`; `decline_layout` has been asked."""
    if isinstance(raw, NoiseTensor):
        rows, columns = raw.shape
        return GgufBlocks(noise_blocks(raw.qtype, (rows, columns), raw.standard_deviation, raw.seed, device), raw.qtype)
    if not isinstance(raw, PackedTensor):
        return GgufBlocks(upload(raw.data, device), raw.qtype)
    layout = _LAYOUTS[type(raw.matrix)](raw.matrix, device)
    chosen = raw.rows
    if len(chosen) == layout.shape[0] and bool((chosen == np.arange(len(chosen))).all()):
        return layout
    return layout.take_rows(torch.from_numpy(chosen).to(device))


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of `array` on `device`, uint32 as int32. Does not wait for it: torch's allocator keeps pinned memory until
    its copy is done."""
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.view(array.dtype.str.replace("u", "i"))
    if device.type == "cpu":
        return torch.from_numpy(np.array(array))
    out = torch.empty(array.shape, dtype=torch.from_numpy(array[:0].copy()).dtype, device=device)
    step = max(1, _PIECE_BYTES // max(1, array[:1].nbytes))
    for first in range(0, len(array), step):
        piece = array[first : first + step]
        staged = torch.empty(piece.shape, dtype=out.dtype, pin_memory=device.type == "cuda")
        np.copyto(staged.numpy(), piece)
        out[first : first + step].copy_(staged, non_blocking=True)
    return out


def _dense(raw: RawTensor, device: torch.device) -> torch.Tensor:
    data = upload(np.ascontiguousarray(raw.data), device)
    return data.view(_DENSE[raw.qtype]).view(raw.shape)


def _awq(matrix: AwqMatrix, device: torch.device) -> PackedLayout:
    words = upload(matrix.codes, device)
    rows, columns = matrix.shape
    codes = torch.empty((rows, columns // 2), dtype=torch.uint8, device=device)
    step = max(2, _PIECE_VALUES // rows // 2 * 2)
    for first in range(0, columns, step):
        nibbles = _awq_nibbles(words[first : first + step])
        codes[:, first // 2 : first // 2 + len(nibbles) // 2] = (nibbles[0::2] | nibbles[1::2] << 4).t()
    zeros = _awq_nibbles(upload(matrix.zeros, device)).t().contiguous()
    scales = _dense(matrix.scales, device).t().contiguous()
    return Int4Groups(codes, scales, zeros, columns // scales.shape[1])


def _awq_nibbles(words: torch.Tensor) -> torch.Tensor:
    """uint8 `[n, out]` of int32 `[n, out / 8]`."""
    shifts = torch.tensor([4 * nibble for nibble in AWQ_NIBBLES], dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & 15).to(torch.uint8).flatten(1)


def _gptq(matrix: GptqMatrix, device: torch.device) -> PackedLayout:
    codes = upload(matrix.codes, device).t().contiguous().view(torch.uint8)
    zeros = unpack_bits(upload(matrix.zeros, device).view(torch.uint8), matrix.bits)
    zeros = (zeros + matrix.zero_offset & (1 << matrix.bits) - 1).t().contiguous()
    scales = _dense(matrix.scales, device).t().contiguous()
    return _grouped(matrix, codes, scales, zeros, device)


def _pack_quantized(matrix: PackQuantizedMatrix, device: torch.device) -> PackedLayout:
    rows, columns = matrix.shape
    codes = upload(matrix.codes, device).view(torch.uint8)[:, : columns * matrix.bits // 8].contiguous()
    scales = _dense(matrix.scales, device)
    stored_rows = len(scales)
    scales = scales.expand(rows, -1).contiguous()
    if matrix.zeros is not None:
        # A copy, for of a single row torch takes the transposed words as contiguous, which `view` does not.
        words = upload(matrix.zeros, device).t().clone(memory_format=torch.contiguous_format).view(torch.uint8)
        zeros = unpack_bits(words, matrix.bits)[:, :stored_rows].t().expand(rows, -1).contiguous()
    else:
        zeros = torch.full(scales.shape, 1 << matrix.bits - 1, dtype=torch.uint8, device=device)
    return _grouped(matrix, codes, scales, zeros, device)


def _grouped(
    matrix: GptqMatrix | PackQuantizedMatrix,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    device: torch.device,
) -> PackedLayout:
    """Codes in the order of the inputs, a stream of bits a row, which an act-order reorders."""
    permutation = None
    if matrix.group_of is not None:
        order = _permutation(matrix, scales.shape[1])
        if order is None:
            raise ValueError("groups of unequal sizes: decline_layout has not been asked")
        permutation = torch.from_numpy(order).to(device)
        codes = _reordered(codes, permutation, matrix.bits)
    group_size = matrix.shape[1] // scales.shape[1]
    if matrix.bits < 4:
        return NarrowGroups(matrix.bits, codes, scales, zeros, group_size, permutation)
    make = Int4Groups if matrix.bits == 4 else Int8Groups
    return make(codes, scales, zeros, group_size, permutation)


def _permutation(matrix: GptqMatrix | PackQuantizedMatrix, groups: int) -> np.ndarray | None:
    if matrix.group_of is None:
        return None
    return consecutive_permutation(matrix.group_of, matrix.shape[1] // groups)


def _reordered(codes: torch.Tensor, permutation: torch.Tensor, bits: int) -> torch.Tensor:
    """Columns in the order of `permutation`."""
    step = max(1, _PIECE_VALUES // len(permutation))
    for first in range(0, len(codes), step):
        numbers = unpack_bits(codes[first : first + step], bits)
        codes[first : first + step] = _pack_bits(_columns(numbers, permutation), bits)
    return codes


def _columns(numbers: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`numbers[:, order]`, for which numpy takes a tenth of torch's time on a CPU."""
    if numbers.device.type != "cpu":
        return numbers.index_select(1, order)
    return torch.from_numpy(np.take(numbers.numpy(), order.numpy(), axis=1))


def _pack_bits(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `unpack_bits`."""
    if bits == 8:
        return numbers
    if bits == 4:  # without wider numbers on the way
        pairs = numbers.view(torch.int16)
        return (pairs | pairs >> 4).to(torch.uint8)
    together = 8 if bits == 3 else 8 // bits
    parts = numbers.unflatten(1, (-1, together)).int()
    joined: torch.Tensor = parts[..., 0]
    for place in range(1, together):
        joined = joined | parts[..., place] << bits * place
    if bits == 3:
        return torch.stack((joined & 255, joined >> 8 & 255, joined >> 16), dim=-1).to(torch.uint8).flatten(1)
    return joined.to(torch.uint8)


def _scaled(matrix: ScaledMatrix, device: torch.device) -> PackedLayout:
    rows, columns = matrix.shape
    codes = upload(matrix.values, device)
    if matrix.table is not None:
        codes = codes.view(torch.float8_e4m3fn if matrix.table is e4m3_values() else torch.float8_e5m2)
        if matrix.table is not e4m3_values() and matrix.table is not e5m2_values():
            raise TypeError(f"{matrix.method} is no float8 type")
    grid = _dense(matrix.scales, device)
    if matrix.divisor != 1.0:
        grid = grid.float() / matrix.divisor
    zeros = None if matrix.zeros is None else _of_rows(upload(matrix.zeros, device), matrix.tile[0], rows)
    group_size = columns if grid.shape[1] == 1 else matrix.tile[1]
    return Int8Groups(codes, _of_rows(grid, matrix.tile[0], rows), zeros, group_size)


def _of_rows(grid: torch.Tensor, height: int, rows: int) -> torch.Tensor:
    """A row of the grid for each row of the matrix."""
    return grid if height == 1 else grid.repeat_interleave(height, dim=0)[:rows].contiguous()


def _bitsandbytes(matrix: BitsAndBytesMatrix, device: torch.device) -> PackedLayout:
    rows, columns = matrix.shape
    stored = upload(matrix.codes[: rows * columns // 2], device).view(rows, columns // 2)
    codes = stored >> 4 | stored << 4  # the even column's is the high nibble there
    scales = upload(matrix.absmax, device)
    if matrix.nested is not None:
        outer = upload(matrix.nested.absmax, device).repeat_interleave(matrix.nested.block)[: len(scales)]
        codebook = upload(matrix.nested.codebook, device)
        scales = (codebook[scales.long()] * outer + matrix.nested.offset).half()
    table = upload(matrix.codebook, device)
    return CodebookGroups(codes, scales.view(rows, columns // matrix.block), table, matrix.block)


def _noise(matrix: NoiseMatrix, device: torch.device) -> PackedLayout:
    """Random codes whose values have about the standard deviation of the matrix."""
    rows, columns = matrix.shape
    generator = torch.Generator(device).manual_seed(matrix.seed)
    groups = columns // matrix.group_size
    codes = torch.empty((rows, columns * matrix.bits // 8), dtype=torch.uint8, device=device)
    codes.random_(0, 256, generator=generator)
    scales = torch.full((rows, groups), matrix.scale, dtype=torch.float16, device=device)
    zeros = torch.full((rows, groups), 1 << matrix.bits - 1, dtype=torch.uint8, device=device)
    make = Int4Groups if matrix.bits == 4 else Int8Groups
    return make(codes, scales, zeros, matrix.group_size)


def _at_load(matrix: AtLoadMatrix, device: torch.device) -> PackedLayout:
    """Quantized on the device, some rows at a time."""
    rows, columns = matrix.shape
    step = max(1, _PIECE_VALUES // columns)
    if isinstance(matrix.source, NoiseTensor) and device.type != "cpu":
        generator = torch.Generator(device).manual_seed(matrix.source.seed)
        noise = torch.empty((min(step, rows), columns), device=device)
        pieces = (
            noise.normal_(0.0, matrix.source.standard_deviation, generator=generator) for _ in range(0, rows, step)
        )
        quantized = [quantize(piece, matrix.kind) for piece in pieces]
    else:
        taken = (matrix.source.take_rows(slice(first, first + step)) for first in range(0, rows, step))
        quantized = [quantize(_dense(piece, device).float(), matrix.kind) for piece in taken]
    (stacked,) = stack_layouts(quantized)
    return stacked if stacked.shape[0] == rows else stacked.take_rows(slice(0, rows))


_LAYOUTS: dict[type[PackedMatrix], Callable[..., PackedLayout]] = {
    AwqMatrix: _awq,
    GptqMatrix: _gptq,
    PackQuantizedMatrix: _pack_quantized,
    ScaledMatrix: _scaled,
    BitsAndBytesMatrix: _bitsandbytes,
    NoiseMatrix: _noise,
    AtLoadMatrix: _at_load,
}
