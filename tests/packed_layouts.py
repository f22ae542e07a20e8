"""Random packed weights of every layout, for tests of what reads them."""

from __future__ import annotations

import torch

from aphrodite.quantization.gguf_fields import BLOCK_FORMS
from aphrodite.quantization.grid_fields import GRID_FORMS
from aphrodite.quantization.layouts import (
    CodebookGroups,
    GgufBlocks,
    Int4Groups,
    Int8Groups,
    NarrowGroups,
    PackedLayout,
)
from aphrodite.quantization.noise import write_factors
from aphrodite.quantization.types import QuantType

NF4 = torch.tensor([-1.0, -0.7, -0.52, -0.4, -0.28, -0.18, -0.09, 0.0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1.0])


def random_blocks(qtype: QuantType, rows: int, columns: int, seed: int = 0) -> GgufBlocks:
    """Random codes with scales that are numbers."""
    generator = torch.Generator().manual_seed(seed)
    count = rows * columns // qtype.block_size
    blocks = torch.randint(0, 256, (count, qtype.block_bytes), generator=generator, dtype=torch.uint8)
    if qtype is QuantType.MXFP4:
        blocks[:, 0] = torch.randint(110, 125, (count,), generator=generator)
    else:
        sizes = torch.rand((count, 2), generator=generator) * 0.009 + 0.001
        signs = torch.randint(0, 2, (count, 2), generator=generator) * 2 - 1
        write_factors(qtype, blocks, (sizes * signs).half())
    return GgufBlocks(blocks.view(rows, -1), qtype)


def random_layouts(rows: int, columns: int, seed: int = 0) -> dict[str, PackedLayout]:
    """Every layout by name; `columns` is a multiple of 96, those of super-blocks become one of 256."""
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape: int, high: int = 256) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator).to(torch.uint8)

    def scales(group: int) -> torch.Tensor:
        return torch.rand((rows, columns // group), generator=generator).mul_(0.05).add_(0.001).half()

    def zeros(group: int, high: int) -> torch.Tensor:
        return codes(rows, columns // group, high=high)

    four, eight, values = codes(rows, columns // 2), codes(rows, columns), torch.randn(rows, columns)
    order = torch.randperm(columns, generator=generator).int()
    grouped: dict[str, PackedLayout] = {
        "int4": Int4Groups(four, scales(32), zeros(32, 16), 32),
        "int4 a row": Int4Groups(four, scales(columns), zeros(columns, 16), columns),
        "int4 fractional": Int4Groups(four, scales(96), scales(96) * 300, 96),
        "int4 act-order": Int4Groups(four, scales(32), zeros(32, 16), 32, order),
        "2 bits": NarrowGroups(2, codes(rows, columns // 4), scales(32), zeros(32, 4), 32),
        "3 bits": NarrowGroups(3, codes(rows, columns * 3 // 8), scales(96), zeros(96, 8), 96, order),
        "int8": Int8Groups(eight.view(torch.int8), scales(48), None, 48),
        "uint8": Int8Groups(eight, scales(96).float(), zeros(96, 256), 96),
        "uint8 act-order": Int8Groups(eight, scales(32), zeros(32, 256), 32, order),
        "e4m3": Int8Groups(values.to(torch.float8_e4m3fn), scales(96).float(), None, 96),
        "e5m2": Int8Groups(values.to(torch.float8_e5m2), scales(columns).bfloat16(), None, columns),
        "nf4": CodebookGroups(four, scales(32), NF4, 32),
    }
    for qtype in (*BLOCK_FORMS, *GRID_FORMS):
        width = columns if qtype.block_size == 32 else -(-columns // 256) * 256
        grouped[qtype.name] = random_blocks(qtype, rows, width, seed)
    return grouped
