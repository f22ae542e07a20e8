"""Experts' tensors as one weight that kernels of a GPU take: packed where all can stay so, dense otherwise.

Experts are converted one at a time, so that beside the result there is one expert; packed ones are joined at the end,
which takes a layer's projection once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from aphrodite.kernels.dispatch import Choice, Declined, choose
from aphrodite.kernels.triton.expert_weights import ExpertWeights
from aphrodite.layers.dense import short_name, to_dense
from aphrodite.layers.packed_linear import interleaved_layout
from aphrodite.layers.triton_moe import TritonExperts
from aphrodite.quantization.fp8 import quantize_fp8
from aphrodite.quantization.layouts import Int8Groups, stack_layouts
from aphrodite.quantization.planes import Planes, decline_planes, planes_of
from aphrodite.quantization.repack import decline_layout, layout_of
from aphrodite.quantization.types import NoiseTensor, QuantType, RawTensor


def stack_experts(
    parts: Sequence[RawTensor],
    biases: Sequence[RawTensor],
    dtype: torch.dtype,
    device: torch.device,
    *,
    fp8: bool = False,
) -> TritonExperts:
    """One projection of all experts.

    Args:
        parts: `[experts, out_i, in]`: gate and up, whose rows will alternate, or a single one.
        biases: `[experts, out_i]` of each, or none.
        dtype: of activations and dense weights.
        fp8: quantize dense experts to fp8 (e4m3), with a scale a row.

    Raises:
        ModelFormatError: a value does not fit `dtype`.
    """

    def packed() -> Planes | Declined:
        return _packed(parts, device)

    def quantized() -> Planes | Declined:
        return _quantized(parts, dtype, device)

    def dense() -> torch.Tensor:
        return _dense(parts, dtype, device)

    types = "/".join(sorted({part.type_name for part in parts}))
    candidates: list[tuple[str, Callable[[], Planes | torch.Tensor | Declined]]]
    candidates = [("packed experts", packed), (f"dense experts {short_name(dtype)}", dense)]
    if fp8:
        candidates.insert(1, ("experts in fp8", quantized))
    chosen: tuple[Planes | torch.Tensor, Choice] = choose(f"experts of {types}", candidates)
    weight, choice = chosen
    bias = _alternating([to_dense(bias, torch.float32, device) for bias in biases]) if biases else None
    is_e2m1 = isinstance(weight, Planes) and all(part.qtype is QuantType.MXFP4 for part in parts)
    return TritonExperts(ExpertWeights(weight, parts[0].shape[0], bias, is_e2m1), choice)


def _alternating(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(tuple(parts), dim=2).flatten(1, 2)


def _dense(parts: Sequence[RawTensor], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    experts, rows, columns = parts[0].shape
    out = torch.empty((experts, rows * len(parts), columns), dtype=dtype, device=device)
    for number, part in enumerate(parts):
        if isinstance(part, NoiseTensor):
            out[:, number :: len(parts)] = to_dense(part, dtype, device)
            continue
        for expert in range(experts):
            out[expert, number :: len(parts)] = to_dense(part.part(expert), dtype, device)
    return out


def _quantized(parts: Sequence[RawTensor], dtype: torch.dtype, device: torch.device) -> Planes | Declined:
    experts, _, columns = parts[0].shape
    # Noise is made on the device, all at once.
    sources = [to_dense(part, dtype, device) if isinstance(part, NoiseTensor) else part for part in parts]
    found: list[Planes] = []
    for expert in range(experts):
        own = [
            source[expert] if isinstance(source, torch.Tensor) else to_dense(source.part(expert), dtype, device)
            for source in sources
        ]
        rows = _alternating([matrix[None] for matrix in own])[0]
        weight = quantize_fp8(rows, torch.float8_e4m3fn)
        layout = Int8Groups(weight.values, weight.scale[:, None], None, columns)
        declined = decline_planes(layout)
        if declined is not None:
            return declined
        found.append(planes_of(layout))
    return _joined(found)


def _packed(parts: Sequence[RawTensor], device: torch.device) -> Planes | Declined:
    experts = parts[0].shape[0]
    for part in parts:
        declined = decline_layout(part.part(0))
        if declined is not None:
            return declined
    found: list[Planes] = []
    for expert in range(experts):
        layouts = stack_layouts([layout_of(part.part(expert), device) for part in parts])
        if len(layouts) > 1:
            return Declined("gate and up are packed differently")
        declined = decline_planes(layouts[0])
        if declined is not None:
            return declined
        found.append(planes_of(interleaved_layout(layouts[0]) if len(parts) > 1 else layouts[0]))
    first = found[0]
    if any(planes.form != first.form for planes in found):
        return Declined("experts are packed differently")
    if any(planes.permutation is not None for planes in found):
        return Declined("experts take their inputs in orders of their own (act-order)")
    return _joined(found)


def _joined(found: Sequence[Planes]) -> Planes:
    """The rows of all; a table of values is that of the first."""
    fields = {field.name: [getattr(planes, field.name) for planes in found] for field in dataclasses.fields(Planes)}
    joined = {
        name: torch.cat(tensors)
        for name, tensors in fields.items()
        if name != "table" and isinstance(tensors[0], torch.Tensor)
    }
    return dataclasses.replace(found[0], **joined)  # type: ignore[arg-type]  # fields of its own
