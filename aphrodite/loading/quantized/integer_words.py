"""AWQ and GPTQ checkpoints: codes of a few bits in 32-bit words, with a scale and a zero for each group of inputs.

Layouts: AutoAWQ's gemm layout (arXiv 2306.00978) and AutoGPTQ's and GPTQModel's `qweight`, `qzeros`, `scales` and
`g_idx` (arXiv 2210.17323).
"""

from __future__ import annotations

import numpy as np

from aphrodite.errors import ModelFormatError
from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.quantized.tensors import DENSE_TYPES, ModuleTensors, group_size_of, numbers
from aphrodite.loading.safetensors import StoredTensor
from aphrodite.quantization.packed import AwqMatrix, GptqMatrix, PackedTensor

_INT32 = ("I32", "U32")
_GPTQ_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_GPTQ_BITS = (2, 3, 4, 8)
# Of AutoRound's layouts those that are GPTQ's and AWQ's, tensor for tensor.
_AUTO_ROUND_GPTQ = ("auto_round:auto_gptq", "auto_round:gptq", "auto_gptq")
_AUTO_ROUND_AWQ = ("auto_round:auto_awq", "auto_round:awq", "auto_awq")


def unpack_awq(tensors: dict[str, StoredTensor], config: ConfigReader) -> dict[str, PackedTensor]:
    """Takes every AWQ module out of `tensors`; their weights by name.

    Raises:
        ModelFormatError: another layout than gemm, other bits than 4, or tensors that do not fit.
    """
    if config.read("bits", int) != 4:
        raise config.wrong("bits", "4", config.read("bits", int))
    for key in ("version", "format"):
        layout = config.read(key, str, "gemm")
        if layout.lower() != "gemm":
            raise config.wrong(key, "gemm", layout)
    group_size = _group_size(config)
    modules, found = ModuleTensors(tensors, "AWQ"), {}
    for module in modules.modules_with(".qweight"):
        stored = modules.take(f"{module}.qweight", _INT32, (None, None))
        codes = numbers(stored)
        columns, words = codes.shape
        groups = columns // group_size_of(stored, columns, group_size)
        zeros = numbers(modules.take(f"{module}.qzeros", _INT32, (groups, words)))
        scales = modules.take(f"{module}.scales", DENSE_TYPES, (groups, words * 8)).dense()
        name = f"{module}.weight"
        found[name] = PackedTensor(name, scales.qtype, AwqMatrix(codes, zeros, scales))
    return found


def unpack_gptq(tensors: dict[str, StoredTensor], config: ConfigReader) -> dict[str, PackedTensor]:
    """Takes every GPTQ module out of `tensors`; their weights by name.

    Raises:
        ModelFormatError: a layout that is not supported, or tensors that do not fit.
    """
    bits = config.read("bits", int)
    if bits not in _GPTQ_BITS:
        raise config.wrong("bits", "2, 3, 4 or 8", bits)
    if config.read("is_marlin_format", bool, False):
        raise config.wrong("is_marlin_format", "false", True)
    zero_offset = config.choice("checkpoint_format", _GPTQ_ZERO_OFFSETS, "gptq")
    group_size, act_order = _group_size(config), config.read("desc_act", bool, False)
    # GPTQModel and AutoRound may give modules bits and groups of their own, which show in their tensors' shapes.
    mixed = config.section("dynamic") is not None or config.section("extra_config") is not None
    modules, found = ModuleTensors(tensors, "GPTQ"), {}
    for module in modules.modules_with(".qweight"):
        stored = modules.take(f"{module}.qweight", _INT32, (None, None))
        if mixed:
            bits, group_size = _own_packing(modules, module, stored)
        codes = numbers(stored)
        rows, columns = codes.shape[1], codes.shape[0] * 32 // bits
        groups = columns // group_size_of(stored, columns, group_size)
        zeros = numbers(modules.take(f"{module}.qzeros", _INT32, (groups, rows * bits // 32)))
        scales = modules.take(f"{module}.scales", DENSE_TYPES, (groups, rows)).dense()
        if columns * bits != codes.shape[0] * 32 or rows * bits % 32:
            raise modules.mismatch(stored, f"numbers of outputs and inputs whose {bits} bits fill words of 32")
        group_of = None
        if modules.has(f"{module}.g_idx") or (act_order and not mixed):
            group_of = scattered_groups(modules.take(f"{module}.g_idx", ("I32",), (columns,)), groups)
        name = f"{module}.weight"
        matrix = GptqMatrix(bits, codes, zeros, zero_offset, scales, group_of)
        found[name] = PackedTensor(name, scales.qtype, matrix)
    return found


def _own_packing(modules: ModuleTensors, module: str, stored: StoredTensor) -> tuple[int, int]:
    """Bits and group size of one module, from the shapes of its codes `[columns * bits / 32, rows]` and zeros
    `[groups, rows * bits / 32]`.

    Raises:
        ModelFormatError: the shapes are of no packing.
    """
    zeros = modules.shape_of(f"{module}.qzeros")
    words, rows = stored.shape
    for bits in _GPTQ_BITS:
        columns = words * 32 // bits
        if len(zeros) == 2 and zeros[0] > 0 and zeros[1] * 32 == rows * bits and columns % zeros[0] == 0:
            return bits, columns // zeros[0]
    raise modules.mismatch(stored, f"packed in 2, 3, 4 or 8 bits with zeros of {list(zeros)}")


def unpack_auto_round(tensors: dict[str, StoredTensor], config: ConfigReader) -> dict[str, PackedTensor]:
    """Takes every module out of `tensors` that AutoRound (arXiv 2309.05516) has packed as GPTQ or AWQ are packed.

    Raises:
        ModelFormatError: another layout, floating-point weights, or tensors that do not fit.
    """
    if config.read("data_type", str, "int") != "int":
        raise config.wrong("data_type", "int", config.read("data_type", str))
    packing = config.read("packing_format", str, _AUTO_ROUND_GPTQ[0])
    if packing in _AUTO_ROUND_AWQ:
        return unpack_awq(tensors, config)
    if packing not in _AUTO_ROUND_GPTQ:
        raise config.wrong("packing_format", f"{_AUTO_ROUND_GPTQ[0]} or {_AUTO_ROUND_AWQ[0]}", packing)
    return unpack_gptq(tensors, config)


def scattered_groups(order: StoredTensor, groups: int) -> np.ndarray | None:
    """The group of each input, None where groups are consecutive.

    Raises:
        ModelFormatError: a group that has no scale.
    """
    group_of = numbers(order).view("<i4")
    if group_of.min(initial=0) < 0 or group_of.max(initial=0) >= groups:
        raise ModelFormatError(
            f"{order.source}: {order.name!r} names a group outside 0 to {groups - 1}; "
            "the checkpoint is damaged: download it again"
        )
    consecutive = np.arange(len(group_of)) // (len(group_of) // groups)
    return None if np.array_equal(group_of, consecutive) else group_of.astype(np.intp)


def _group_size(config: ConfigReader) -> int:
    size = config.read("group_size", int, 128, low=-1, high=1 << 20)
    if size == 0:
        raise config.wrong("group_size", "-1 or at least 1", size)
    return size
