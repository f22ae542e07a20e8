"""Numbers of the dense types F32, F16 and BF16 as numpy holds them, and float32 values of them and back."""

from __future__ import annotations

import numpy as np

from aphrodite.quantization.types import QuantType, RawTensor

_STORED = {QuantType.F32: "<f4", QuantType.F16: "<f2", QuantType.BF16: "<u2"}


def numbers_of(raw: RawTensor) -> np.ndarray:
    """A dense tensor's numbers, a view `raw.shape` of its bytes where these are contiguous; bfloat16 as its bits."""
    return np.ascontiguousarray(raw.data).view(_STORED[raw.qtype]).reshape(raw.shape)


def to_float32(numbers: np.ndarray, qtype: QuantType) -> np.ndarray:
    """What `numbers` (of `numbers_of`, or some of them) mean; a new array unless they are float32."""
    if qtype is QuantType.BF16:
        return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(np.float32, copy=False)


def encode_dense(values: np.ndarray, qtype: QuantType) -> np.ndarray:
    """float32 values in the bytes of a dense type, uint8 `[..., itemsize]`; to nearest, ties to even."""
    if qtype is QuantType.BF16:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        encoded = (rounded >> np.uint32(16)).astype("<u2")
    else:
        encoded = values.astype("<f2" if qtype is QuantType.F16 else "<f4")
    return encoded[..., None].view(np.uint8)
