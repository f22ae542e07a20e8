"""Reading the fields of quantized blocks, many blocks at a time."""

from __future__ import annotations

import numpy as np


def half(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at byte `start` of each block, as float32 `[blocks, 1]`."""
    column: np.ndarray = np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)
    return column


def words(blocks: np.ndarray, start: int, stop: int, dtype: str) -> np.ndarray:
    """Bytes `start` to `stop` of each block as little-endian numbers, `[blocks, words]`."""
    found: np.ndarray = np.ascontiguousarray(blocks[:, start:stop]).view(dtype)
    return found


def nibbles(quants: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high four bits of each byte."""
    return quants & np.uint8(0x0F), quants >> np.uint8(4)


def interleaved_nibbles(quants: np.ndarray) -> np.ndarray:
    """The four-bit numbers of `[blocks, bytes]`, the low one of each byte first: `[blocks, 2 * bytes]`."""
    return np.stack(nibbles(quants), axis=-1).reshape(len(quants), -1)
