"""Random weights in GGUF blocks, for benchmarks and tests of models that nobody has stored."""

from __future__ import annotations

import numpy as np
import torch

from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.gguf_fields import BLOCK_FORMS
from aphrodite.quantization.types import QuantType, RawTensor

_SAMPLE = 256  # blocks of which the spread is measured
_MXFP4_EXPONENT = 120  # 2^-8 for a spread of about 6, doubled


def noise_blocks(
    qtype: QuantType, shape: tuple[int, int], standard_deviation: float, seed: int, device: torch.device
) -> torch.Tensor:
    """Rows of blocks whose codes are uniform and whose values have about this deviation and mean zero.

    Args:
        qtype: one that has packed kernels.
        shape: `[out, in]`.

    Returns:
        uint8 `[out, row_bytes]` on `device`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    blocks = torch.empty((shape[0] * shape[1] // qtype.block_size, qtype.block_bytes), dtype=torch.uint8, device=device)
    blocks.random_(0, 256, generator=generator)
    if qtype is QuantType.MXFP4:
        blocks[:, 0] = _MXFP4_EXPONENT
    sample = blocks[:_SAMPLE].cpu().numpy().copy()
    halves = BLOCK_FORMS[qtype].halves
    factors: list[float] = []
    if halves:
        scaled = _expanded(qtype, sample, (1.0, 0.0))
        factors.append(standard_deviation / float(scaled.std()))
    if len(halves) == 2:
        factors.append(-factors[0] * float(scaled.mean()) / float(_expanded(qtype, sample, (0.0, 1.0)).mean()))
    for at, factor in zip(halves, factors, strict=True):
        number = torch.tensor([factor], dtype=torch.float16).view(torch.uint8)
        blocks[:, at : at + 2] = number.to(device)
    return blocks.view(shape[0], -1)


def _expanded(qtype: QuantType, blocks: np.ndarray, factors: tuple[float, float]) -> np.ndarray:
    """Values of blocks with other factors of the scale and the offset."""
    for at, factor in zip(BLOCK_FORMS[qtype].halves, factors, strict=False):
        blocks[:, at : at + 2] = np.array([factor], "<f2").view(np.uint8)
    count = len(blocks) * qtype.block_size
    return dequantize(RawTensor("noise", (1, count), qtype, blocks.reshape(1, -1)))
