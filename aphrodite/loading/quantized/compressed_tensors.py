"""compressed-tensors checkpoints (llm-compressor): W4A16 and W8A16 in words, W8A8 in int8, FP8.

Layout: `weight_packed`, `weight_shape`, `weight_scale`, `weight_zero_point` and `weight_g_idx` of pack-quantized
modules; `weight` and `weight_scale` of int-, float- and naive-quantized ones
(https://github.com/vllm-project/compressed-tensors).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from aphrodite.errors import ModelFormatError
from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.quantized.eight_bit import compute_type, drop_activation_scales, take_float8, take_scales
from aphrodite.loading.quantized.integer_words import scattered_groups
from aphrodite.loading.quantized.tensors import DENSE_TYPES, ModuleTensors, numbers
from aphrodite.loading.safetensors import StoredTensor
from aphrodite.quantization.packed import PackedTensor, PackQuantizedMatrix, ScaledMatrix
from aphrodite.quantization.types import RawTensor

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
_KINDS = {("int", 2), ("int", 4), ("int", 8), ("float", 8)}


class _Scheme(NamedTuple):
    """What a group of the configuration says of its modules' weights."""

    kind: str
    bits: int
    group_size: int | None
    block: tuple[int, int] | None


def unpack_compressed_tensors(tensors: dict[str, StoredTensor], config: ConfigReader) -> dict[str, PackedTensor]:
    """Takes every quantized module out of `tensors`; their weights by name.

    Raises:
        ModelFormatError: a format or number of bits that is not supported, or tensors that do not fit.
    """
    schemes = _schemes(config)
    modules, found = ModuleTensors(tensors, "compressed-tensors"), {}
    for module in modules.modules_with(".weight_packed"):
        found[f"{module}.weight"] = _take_words(modules, module, schemes)
    block = next((scheme.block for scheme in schemes if scheme.block is not None), None)
    for module in modules.modules_with(".weight_scale"):
        if modules.has(f"{module}.weight") and modules.dtype_of(f"{module}.weight") == "I8":
            found[f"{module}.weight"] = _take_int8(modules, module, schemes)
        else:
            found[f"{module}.weight"] = take_float8(modules, module, block)
    drop_activation_scales(modules)
    return found


def _schemes(config: ConfigReader) -> list[_Scheme]:
    form = config.read("format", str, "dense")
    if form not in _FORMATS:
        raise config.wrong("format", "one of " + ", ".join(_FORMATS), form)
    sparsity = config.section("sparsity_config")
    if sparsity is not None and sparsity.read("format", str, "dense") != "dense":
        raise sparsity.wrong("format", "dense, for sparse weights are not supported,", sparsity.read("format", str))
    if config.section("transform_config") is not None:
        raise ModelFormatError(
            f"{config.source}: quantization_config.transform_config has weights and activations rotated, which is not "
            "supported; use a version of the model without (W4A16, FP8), or a GGUF file"
        )
    groups = config.section("config_groups")
    weights = [group.section("weights") for group in groups.sections()] if groups is not None else []
    found = [_scheme(section) for section in weights if section is not None]
    if not found and config.section("kv_cache_scheme") is None:  # which alone leaves weights as they are
        raise ModelFormatError(
            f"{config.source}: quantization_config.config_groups names no quantized weights; "
            "the configuration is damaged or of a version that is not supported"
        )
    return found


def _scheme(weights: ConfigReader) -> _Scheme:
    kind, bits = weights.read("type", str, "int"), weights.read("num_bits", int)
    if (kind, bits) not in _KINDS:
        raise weights.wrong("num_bits", "2, 4 or 8 (int) or 8 (float)", f"{bits} ({kind})")
    group_size = weights.read("group_size", int, None, low=-1, high=1 << 20)
    sizes = weights.integers("block_structure", low=1, high=1 << 16)
    block = (sizes[0], sizes[1]) if len(sizes) == 2 else None
    return _Scheme(kind, bits, group_size if group_size is not None and group_size > 0 else None, block)


def _take_words(modules: ModuleTensors, module: str, schemes: list[_Scheme]) -> PackedTensor:
    name = f"{module}.weight"
    shape = numbers(modules.take(f"{name}_shape", ("I64", "I32"), (2,))).tolist()
    rows, columns = int(shape[0]), int(shape[1])
    stored = modules.take(f"{name}_packed", ("I32",), (rows, None))
    fitting = {s.bits for s in schemes if s.kind == "int" and stored.shape[1] == -(-columns * s.bits // 32)}
    if len(fitting) != 1:
        raise modules.mismatch(stored, f"{columns} codes a row in words of 32 bits")
    bits = fitting.pop()
    scales = modules.take(f"{name}_scale", DENSE_TYPES, None)
    groups = scales.shape[-1] if len(scales.shape) == 2 else 1
    if scales.shape not in ((rows, groups), (1, 1), (1,)) or groups < 1 or columns % groups:
        raise modules.mismatch(scales, f"scales of groups of {columns} inputs for {rows} rows")
    height = scales.shape[0] if len(scales.shape) == 2 else 1
    zeros = _take_packed_zeros(modules, f"{name}_zero_point", bits, (height, groups))
    order = None
    if modules.has(f"{name}_g_idx"):
        order = scattered_groups(modules.take(f"{name}_g_idx", ("I32",), (columns,)), groups)
    raw = scales.dense()
    raw = RawTensor(raw.name, (height, groups), raw.qtype, raw.data)
    return PackedTensor(name, compute_type(raw), PackQuantizedMatrix(bits, columns, numbers(stored), raw, zeros, order))


def _take_packed_zeros(modules: ModuleTensors, name: str, bits: int, grid: tuple[int, int]) -> np.ndarray | None:
    """Zeros in words along the rows, None where there are none. The one zero of a tensor may be a signed byte.

    Args:
        grid: of the scales, `[rows or 1, groups]`.
    """
    if not modules.has(name):
        return None
    if grid == (1, 1) and modules.dtype_of(name) == "I8":
        zero = numbers(_take_single(modules, name, ("I8",))).astype(np.int64)
        return (zero + (1 << bits - 1) & (1 << bits) - 1).astype(np.uint32).reshape(1, 1)
    if grid == (1, 1):
        return numbers(_take_single(modules, name, ("I32",))).reshape(1, 1)
    return numbers(modules.take(name, ("I32",), (-(-grid[0] * bits // 32), grid[1])))


def _take_single(modules: ModuleTensors, name: str, dtypes: tuple[str, ...]) -> StoredTensor:
    """A tensor of one number, whatever its dimensions."""
    shape = modules.shape_of(name)
    stored = modules.take(name, dtypes, None)
    if any(size != 1 for size in shape):
        raise modules.mismatch(stored, "one number, as its scale is")
    return stored


def _take_int8(modules: ModuleTensors, module: str, schemes: list[_Scheme]) -> PackedTensor:
    name = f"{module}.weight"
    values = numbers(modules.take(name, ("I8",), (None, None)))
    group = next((scheme.group_size for scheme in schemes if scheme.kind == "int" and scheme.bits == 8), None)
    scales, tile = take_scales(modules, f"{name}_scale", (values.shape[0], values.shape[1]), None, group)
    zeros = None
    if modules.has(f"{name}_zero_point"):
        stored = modules.take(f"{name}_zero_point", ("I8",), None)
        if math.prod(stored.shape) != math.prod(scales.shape):
            raise modules.mismatch(stored, f"zeros for scales of {list(scales.shape)}")
        zeros = numbers(stored).reshape(scales.shape)
    return PackedTensor(name, compute_type(scales), ScaledMatrix("W8A8 int8", values, None, scales, tile, 1.0, zeros))
