"""4-bit weights in the layout of torch's packed matmul for the CPU: Q4_0, Q4_1, and groups of AWQ, GPTQ and W4A16.

That kernel computes (q - 8) * scale + zero per group in bfloat16. The formats map onto it exactly but for the rounding
of scale and zero to bfloat16 (the files have float16), which is why the path is lossy: mean |logit difference| about
0.1 on SmolLM2-135M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from aphrodite.kernels.dispatch import Declined
from aphrodite.quantization.layouts import Int4Groups, stack_layouts, unpack_bits
from aphrodite.quantization.packed import PackedTensor
from aphrodite.quantization.repack import decline_layout, layout_of
from aphrodite.quantization.types import QuantType, RawTensor

GROUP = 32  # of Q4_0 and Q4_1
_GROUPS = (32, 64, 128, 256)  # that the kernel takes
_ROW_TILE = 16  # the kernel wants the number of output rows divisible by this
_INNER_TILES = 1  # an argument for the GPU's packing that the CPU's one ignores


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """A packed 4-bit matrix `[out, in]`."""

    packed: torch.Tensor  # [out, in / 2] uint8, in the kernel's own order
    scales_and_zeros: torch.Tensor  # [groups, out, 2] bfloat16
    group_size: int = GROUP
    permutation: torch.Tensor | None = None  # [in] int32: inputs in the order of the columns


def decline_int4(parts: Sequence[RawTensor], dtype: torch.dtype, device: torch.device) -> Declined | None:
    """Why `parts`, stacked along their rows, cannot be packed; None if they can."""
    if device.type != "cpu":
        return Declined(f"only for the CPU, not {device.type}")
    in_groups = all(isinstance(part, PackedTensor) for part in parts)
    if not in_groups and any(part.qtype not in (QuantType.Q4_0, QuantType.Q4_1) for part in parts):
        return Declined(f"needs 4 bits, not {'/'.join(sorted({part.type_name for part in parts}))}")
    if dtype != torch.bfloat16:
        return Declined(f"vectorised for bfloat16 only, not {dtype}")
    rows = sum(part.shape[0] for part in parts)
    if rows % _ROW_TILE:
        return Declined(f"needs a multiple of {_ROW_TILE} output rows, not {rows}")
    return None


def pack_int4(parts: Sequence[RawTensor]) -> Int4Weight | Declined:
    """Stack 4-bit matrices along their rows and pack them, if they are of one kind; `decline_int4` has been asked."""
    if all(isinstance(part, PackedTensor) for part in parts):
        return _pack_groups(parts)
    codes, scales, minima = zip(*(_unpack(part) for part in parts), strict=True)
    scale = np.concatenate(scales)
    # The kernel's zero is the value of code 8.
    zero = np.concatenate(minima) + 8.0 * scale
    # The kernel reads memory in order and ignores strides, so the transposition must be a copy.
    scales_and_zeros = torch.from_numpy(np.stack((scale, zero), axis=-1)).transpose(0, 1).contiguous().bfloat16()
    packed = torch._convert_weight_to_int4pack_for_cpu(torch.from_numpy(np.concatenate(codes)), _INNER_TILES)
    return Int4Weight(packed, scales_and_zeros)


def matmul_int4(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """`x` `[T, in]` bfloat16 times the transposed weight: `[T, out]` bfloat16."""
    if weight.permutation is not None:
        x = x.index_select(1, weight.permutation)
    return torch._weight_int4pack_mm_for_cpu(x, weight.packed, weight.group_size, weight.scales_and_zeros)


def _pack_groups(parts: Sequence[RawTensor]) -> Int4Weight | Declined:
    for part in parts:
        declined = decline_layout(part)
        if declined is not None:
            return declined
    layouts = stack_layouts([layout_of(part, torch.device("cpu")) for part in parts])
    layout = layouts[0]
    if len(layouts) > 1 or not isinstance(layout, Int4Groups):
        return Declined(f"needs 4 bits in groups, not {'/'.join(sorted({part.type_name for part in parts}))}")
    if layout.group_size not in _GROUPS:
        return Declined(f"takes groups of {', '.join(map(str, _GROUPS))}, not {layout.group_size}")
    codes = unpack_bits(layout.codes, 4).int()
    scale = layout.scales.float()
    zero = (8.0 - layout.zeros.float()) * scale
    scales_and_zeros = torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous().bfloat16()
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, _INNER_TILES)
    return Int4Weight(packed, scales_and_zeros, layout.group_size, layout.permutation)


def _unpack(raw: RawTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes int32 `[out, in]`, scale float32 `[out, in / 32]`, value of code 0 float32 `[out, in / 32]`).

    A block holds a float16 scale, for Q4_1 a float16 minimum, and 16 bytes: the low nibbles are values
    0 to 15, the high ones 16 to 31 (GGUF specification).
    """
    rows, columns = raw.shape
    blocks = raw.data.reshape(rows, columns // GROUP, raw.qtype.block_bytes)
    has_minimum = raw.qtype is QuantType.Q4_1
    scale = np.ascontiguousarray(blocks[..., 0:2]).view("<f2")[..., 0].astype(np.float32)
    if has_minimum:
        minimum = np.ascontiguousarray(blocks[..., 2:4]).view("<f2")[..., 0].astype(np.float32)
    else:
        minimum = -8.0 * scale
    nibbles = blocks[..., 4 if has_minimum else 2 :]
    codes = np.empty((rows, columns // GROUP, GROUP), dtype=np.int32)
    codes[..., :16] = nibbles & 0x0F
    codes[..., 16:] = nibbles >> 4
    return codes.reshape(rows, columns), scale, minimum
