"""Random weights in GGUF blocks, for benchmarks and tests of models that nobody has stored."""

from __future__ import annotations

import torch

from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.gguf_fields import BLOCK_FORMS
from aphrodite.quantization.grid_fields import GRID_FORMS
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
        return blocks.view(shape[0], -1)
    if qtype is QuantType.TQ2_0:  # of two bits three codes mean something; the fourth becomes the middle one
        codes = blocks[:, :64]
        codes ^= codes << 1 & codes & 0xAA
    sample = blocks[:_SAMPLE].cpu()
    scaled = _expanded(qtype, sample, 1.0, 0.0)
    scale = standard_deviation / float(scaled.std())
    offset = 0.0
    if qtype in BLOCK_FORMS and len(BLOCK_FORMS[qtype].halves) == 2:
        offset = -scale * float(scaled.mean()) / float(_expanded(qtype, sample, 0.0, 1.0).mean())
    write_factors(qtype, blocks, torch.tensor([[scale, offset]], dtype=torch.float16, device=device))
    return blocks.view(shape[0], -1)


def write_factors(qtype: QuantType, blocks: torch.Tensor, factors: torch.Tensor) -> None:
    """Put float16 factors, of the scale and of the offset, `[n or 1, 2]`, into blocks `[n, block_bytes]` uint8."""
    if qtype is QuantType.IQ1_M:  # the scale's nibbles are the upper ones of four words
        bits = factors[:, :1].contiguous().view(torch.int16).int()
        nibbles = bits >> torch.arange(0, 16, 4, dtype=torch.int32, device=bits.device) & 15
        blocks[:, 49:56:2] = (blocks[:, 49:56:2] & 15) | nibbles.to(torch.uint8) << 4
        return
    halves = GRID_FORMS[qtype].halves if qtype in GRID_FORMS else BLOCK_FORMS[qtype].halves
    for number, at in enumerate(halves):
        blocks[:, at : at + 2] = factors[:, number : number + 1].contiguous().view(torch.uint8)


def _expanded(qtype: QuantType, sample: torch.Tensor, scale: float, offset: float) -> torch.Tensor:
    """Values of blocks with other factors of the scale and the offset."""
    blocks = sample.clone()
    write_factors(qtype, blocks, torch.tensor([[scale, offset]], dtype=torch.float16))
    count = len(blocks) * qtype.block_size
    return torch.from_numpy(dequantize(RawTensor("noise", (1, count), qtype, blocks.view(1, -1).numpy())))
