"""Quantizing a full-precision checkpoint while it is loaded (`--quantization`): the projections of its layers.

- int4: codes of 4 bits with a float16 scale and a zero for each group of 128 inputs (64 or 32 where 128 do not divide
  them; on the CPU a float16 minimum for each 32, as Q4_1), to nearest; the range of a group is shrunk where that makes
  its squared error smaller.
- int8: codes of 8 bits with a float16 scale for each group, of the same sizes (on the CPU 32 inputs, as Q8_0).
- bitsandbytes: NF4 in blocks of 64 with float32 scales (arXiv 2305.14314), the codes that the bitsandbytes library
  finds.

Embeddings, the head, norms and routers stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from aphrodite.errors import ConfigError
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.layouts import CodebookGroups, Int4Groups, Int8Groups
from aphrodite.quantization.packed import PackedTensor, Rows
from aphrodite.quantization.types import ComputedTensor, QuantType, RawTensor, StackedTensor

AtLoad = Literal["int4", "int8", "bitsandbytes"]
GROUP = 128
NF4_BLOCK = 64
# What the codes of NF4 stand for, as the bitsandbytes library has them.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)  # of a group's range, that are tried
_METHODS = {"int4": "int4", "int8": "int8", "bitsandbytes": "NF4"}
_HOST_TYPES = {"int4": QuantType.Q4_1, "int8": QuantType.Q8_0}
_BLOCK = 32  # of the host's types
_UNTOUCHED = ("router", "norm", "sinks", ".k_b.", ".v_b.", ".expert_bias")


@dataclass(frozen=True, slots=True, eq=False)
class AtLoadMatrix:
    """A dense matrix of a checkpoint that shall be held quantized."""

    kind: AtLoad
    source: RawTensor

    @property
    def method(self) -> str:
        return f"{self.source.qtype.name} to {_METHODS[self.kind]}"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.source.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def expand(self, rows: Rows) -> np.ndarray:
        values = torch.from_numpy(dequantize(self.source.take_rows(rows)))
        quantized: np.ndarray = quantize(values, self.kind).dequantize().numpy()
        return quantized


class QuantizedWeights(Mapping[str, RawTensor]):
    """A checkpoint's parameters, those of the layers' projections to be quantized.

    Args:
        kind: "fp8" changes nothing here, for layers quantize to it themselves.
        on_host: in blocks that the CPU's kernels take, made when they are read; else for a GPU, made there.

    Raises:
        ConfigError: on access, the parameter is quantized already.
    """

    def __init__(self, weights: Mapping[str, RawTensor], kind: AtLoad | Literal["fp8"], *, on_host: bool) -> None:
        self._weights = weights
        self._kind = kind
        self._on_host = on_host

    def __getitem__(self, name: str) -> RawTensor:
        raw = self._weights[name]
        if not _is_projection(name, raw):
            return raw
        if isinstance(raw, PackedTensor) or raw.qtype.block_size > 1:
            raise ConfigError(
                f"--quantization {self._kind} is for checkpoints in full precision, but {raw.name} is quantized already"
                f" ({raw.type_name}); leave --quantization at none"
            )
        if self._kind == "fp8" or raw.shape[-1] % (_BLOCK if self._kind != "bitsandbytes" else NF4_BLOCK):
            return raw
        if self._on_host:
            return _in_blocks(raw, _HOST_TYPES[self._kind])
        if len(raw.shape) == 2:
            return PackedTensor(raw.name, raw.qtype, AtLoadMatrix(self._kind, raw))
        parts = [raw.part(number) for number in range(raw.shape[0])]
        return StackedTensor(
            raw.name, [PackedTensor(part.name, part.qtype, AtLoadMatrix(self._kind, part)) for part in parts]
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _is_projection(name: str, raw: RawTensor) -> bool:
    matrix = name.startswith("layers.") and name.endswith(".weight") and len(raw.shape) > 1
    return matrix and not any(part in name for part in _UNTOUCHED)


def quantize(values: torch.Tensor, kind: AtLoad) -> Int4Groups | Int8Groups | CodebookGroups:
    """float32 `[rows, in]` in the layout of `kind`, on its device; `in` is a multiple of 32, for NF4 of 64."""
    if kind == "bitsandbytes":
        return _nf4(values)
    rows, columns = values.shape
    group = next(size for size in (GROUP, 64, _BLOCK) if columns % size == 0)
    groups = values.view(rows, -1, group)
    if kind == "int8":
        codes, scales = _symmetric(groups)
        return Int8Groups(codes.view(rows, columns), scales, None, group)
    fit = fit_affine(groups, integer_zeros=True)
    codes = fit.codes.view(rows, -1, 2)
    return Int4Groups(codes[..., 0] | codes[..., 1] << 4, fit.scales, fit.offsets.to(torch.uint8), group)


class AffineFit(NamedTuple):
    """4-bit codes of groups: (code - offset) * scale with integer zeros, else code * scale + offset."""

    codes: torch.Tensor  # [..., group] uint8
    scales: torch.Tensor  # [...] float16
    offsets: torch.Tensor  # [...] float16


def fit_affine(groups: torch.Tensor, *, integer_zeros: bool) -> AffineFit:
    """The best of some ranges of each group of float32 values `[..., group]`, by their squared error."""
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    if integer_zeros:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    best: AffineFit | None = None
    least = torch.empty(0)
    for shrink in _SHRINKS:
        fit, error = _fit(groups, low * shrink, high * shrink, integer_zeros)
        if best is None:
            best, least = fit, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best = AffineFit(
            torch.where(better[..., None], fit.codes, best.codes),
            torch.where(better, fit.scales, best.scales),
            torch.where(better, fit.offsets, best.offsets),
        )
    if best is None:
        raise RuntimeError("no range was tried")
    return best


def _fit(
    groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor, integer_zeros: bool
) -> tuple[AffineFit, torch.Tensor]:
    scales = ((high - low) / 15).half()
    step = torch.where(scales > 0, scales, 1).float()  # a group of one value has scale 0
    if integer_zeros:
        offsets = (-low / step).round_().clamp_(0, 15)
        codes = (groups / step[..., None]).round_().add_(offsets[..., None]).clamp_(0, 15)
        values = (codes - offsets[..., None]) * scales.float()[..., None]
    else:
        offsets = low.half().float()
        codes = ((groups - offsets[..., None]) / step[..., None]).round_().clamp_(0, 15)
        values = codes * scales.float()[..., None] + offsets[..., None]
    error = (values - groups).square_().sum(dim=-1)
    return AffineFit(codes.to(torch.uint8), scales, offsets.half()), error


def _symmetric(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes `[..., group]` and float16 scales `[...]`: the largest magnitude is 127."""
    scales = (groups.abs().amax(dim=-1) / 127).half()
    step = torch.where(scales > 0, scales, 1).float()
    return (groups / step[..., None]).round_().clamp_(-127, 127).to(torch.int8), scales


def _nf4(values: torch.Tensor) -> CodebookGroups:
    rows = values.shape[0]
    table = torch.tensor(NF4_VALUES, device=values.device)
    groups = values.view(rows, -1, NF4_BLOCK)
    scales = groups.abs().amax(dim=-1)
    relative = groups / torch.where(scales > 0, scales, 1)[..., None]
    codes = torch.bucketize(relative, (table[1:] + table[:-1]) / 2).to(torch.uint8).view(rows, -1, 2)
    return CodebookGroups(codes[..., 0] | codes[..., 1] << 4, scales, table, NF4_BLOCK)


def _in_blocks(raw: RawTensor, qtype: QuantType) -> RawTensor:
    """`raw` in blocks of 32, which are made each time that they are read; of a stack those of the matrix that is."""
    if len(raw.shape) == 3:
        return StackedTensor(raw.name, [_in_blocks(raw.part(number), qtype) for number in range(raw.shape[0])])

    def read(rows: np.ndarray) -> np.ndarray:
        data = np.empty((len(rows), qtype.row_bytes(raw.shape[-1])), np.uint8)
        step = max(1, (1 << 18) // raw.shape[-1])
        for first in range(0, len(rows), step):
            values = torch.from_numpy(dequantize(raw.take_rows(rows[first : first + step])))
            data[first : first + step] = quantize_blocks(values, qtype)
        return data

    return ComputedTensor(raw.name, raw.shape, qtype, read)


def quantize_blocks(values: torch.Tensor, qtype: QuantType) -> np.ndarray:
    """float32 `[rows, in]` as Q4_1 or Q8_0 on the host: uint8 `[rows, row_bytes]`."""
    rows = values.shape[0]
    groups = values.view(rows, -1, _BLOCK)
    if qtype is QuantType.Q8_0:
        codes, scales = _symmetric(groups)
        parts = [scales[..., None].view(torch.uint8), codes.view(torch.uint8)]
    else:
        fit = fit_affine(groups, integer_zeros=False)
        nibbles = fit.codes[..., :16] | fit.codes[..., 16:] << 4
        parts = [fit.scales[..., None].view(torch.uint8), fit.offsets[..., None].view(torch.uint8), nibbles]
    data: np.ndarray = torch.cat(parts, dim=-1).view(rows, -1).numpy()
    return data
