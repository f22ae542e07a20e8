"""MXFP4 (OCP Microscaling Formats 1.0) as GPT-OSS keeps its experts: `NAME_blocks` and `NAME_scales` for NAME.

A block is 32 values along the input: 16 bytes, whose low nibbles are the even values, and the exponent of a power of
two in a tensor of its own. Both become GGUF's blocks when rows are read: the same bits in another order.
"""

from __future__ import annotations

import functools

import numpy as np

from aphrodite.errors import ModelFormatError
from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.safetensors import StoredTensor
from aphrodite.quantization.types import ComputedTensor, QuantType, RawTensor

_BLOCKS, _SCALES = "_blocks", "_scales"
_VALUES, _BYTES = 32, 16


def unpack_mxfp4(tensors: dict[str, StoredTensor], config: ConfigReader) -> dict[str, RawTensor]:
    """Takes the tensors of packed weights out of `tensors`, and returns these weights `[experts, out, in]`.

    Raises:
        ModelFormatError: one of a weight's tensors is missing, or they do not fit one another.
    """
    packed: dict[str, RawTensor] = {}
    for name in [name for name in tensors if name.endswith(_BLOCKS)]:
        weight = name.removesuffix(_BLOCKS)
        blocks, scales = tensors.pop(name), tensors.pop(weight + _SCALES, None)
        if scales is None:
            raise ModelFormatError(f"{blocks.source}: {name} has no {weight + _SCALES}; the checkpoint is incomplete")
        shape = blocks.shape
        if (blocks.dtype, scales.dtype) != ("U8", "U8") or len(shape) < 3 or shape != (*scales.shape, _BYTES):
            raise ModelFormatError(
                f"{config.source}: {name} is {blocks.dtype} {list(shape)} beside scales of {scales.dtype} "
                f"{list(scales.shape)}; MXFP4 has bytes, {_BYTES} for each scale"
            )
        groups = shape[-2]
        read = functools.partial(_gguf_blocks, blocks.data.reshape(-1, groups, _BYTES), scales.data.reshape(-1, groups))
        packed[weight] = ComputedTensor(weight, (*shape[:-2], groups * _VALUES), QuantType.MXFP4, read)
    return packed


def _gguf_blocks(blocks: np.ndarray, scales: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rows in GGUF's order: the exponent, then 16 bytes whose low nibbles are the block's first half."""
    taken = blocks[rows]
    first, second = taken[..., : _BYTES // 2], taken[..., _BYTES // 2 :]
    out = np.empty((*taken.shape[:2], QuantType.MXFP4.block_bytes), np.uint8)
    out[..., 0] = scales[rows]
    out[..., 1::2] = (first & 15) | (second << 4)
    out[..., 2::2] = (first >> 4) | (second & 0xF0)
    return out.reshape(len(rows), -1)
