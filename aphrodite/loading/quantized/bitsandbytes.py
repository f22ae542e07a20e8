"""bitsandbytes checkpoints that were saved quantized: NF4 and FP4, with scales quantized once more or not, and int8.

Layout: a 4-bit `weight` lies flat beside `.absmax`, `.quant_map`, `.nested_absmax`, `.nested_quant_map` and
`.quant_state.bitsandbytes__nf4`, a JSON object as bytes; an int8 `weight` beside `SCB`, the largest magnitude of
each row, which stands for 127 (https://github.com/bitsandbytes-foundation/bitsandbytes).
"""

from __future__ import annotations

import math

from aphrodite.loading.config_reader import ConfigReader, parse_json_object
from aphrodite.loading.quantized.tensors import ModuleTensors, numbers
from aphrodite.loading.safetensors import StoredTensor
from aphrodite.quantization.packed import BitsAndBytesMatrix, NestedScales, PackedTensor, ScaledMatrix
from aphrodite.quantization.types import QuantType, RawTensor

_STATE = ".weight.quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
_STORAGE = ("U8", "BF16", "F16", "F32")  # bnb_4bit_quant_storage
_COMPUTE = {"bfloat16": QuantType.BF16, "float16": QuantType.F16, "float32": QuantType.F32}
_BITS_KEYS = ("load_in_4bit", "_load_in_4bit", "load_in_8bit", "_load_in_8bit")
_INT8_LIMIT = 127.0


def unpack_bitsandbytes(tensors: dict[str, StoredTensor], config: ConfigReader) -> dict[str, PackedTensor]:
    """Takes every quantized module out of `tensors`; their weights by name.

    Raises:
        ModelFormatError: tensors that do not fit, or a configuration that asks for neither 4 nor 8 bits.
    """
    if not any(config.read(key, bool, False) for key in _BITS_KEYS):
        raise config.wrong("load_in_4bit", "true, or load_in_8bit", False)
    modules, found = ModuleTensors(tensors, "bitsandbytes"), {}
    for kind in _TYPES:
        for module in modules.modules_with(_STATE + kind):
            found[f"{module}.weight"] = _take_4_bit(modules, module, kind)
    for module in modules.modules_with(".SCB"):
        found[f"{module}.weight"] = _take_int8(modules, module)
    return found


def _take_4_bit(modules: ModuleTensors, module: str, kind: str) -> PackedTensor:
    name = f"{module}.weight"
    text = modules.take(f"{module}{_STATE}{kind}", ("U8",), (None,))
    source = f"{text.source}: {text.name}"
    state = ConfigReader(source, parse_json_object(text.data.tobytes(), source))
    shape = state.integers("shape", low=1, high=1 << 31)
    if len(shape) != 2:
        raise state.wrong("shape", "two whole numbers", shape)
    block = state.read("blocksize", int, low=2, high=1 << 20)
    if block % 2:
        raise state.wrong("blocksize", "an even number", block)
    count = math.prod(shape)
    blocks = -(-count // block)
    stored = modules.take(name, _STORAGE, None)  # bytes, whatever numbers they are said to be
    codes = stored.data.reshape(-1)
    if len(codes) != -(-count // 2):
        raise modules.mismatch(stored, f"{count} codes of 4 bits")
    codebook = modules.take(f"{name}.quant_map", ("F32",), (16,)).data.view("<f4")
    nested = None
    if modules.has(f"{name}.nested_absmax"):
        absmax = numbers(modules.take(f"{name}.absmax", ("U8",), (blocks,)))
        nested = _nested(modules, name, state, blocks)
    else:
        absmax = modules.take(f"{name}.absmax", ("F32",), (blocks,)).data.view("<f4")
    qtype = state.choice("dtype", _COMPUTE, "float32")
    matrix = BitsAndBytesMatrix(
        f"bitsandbytes {kind.upper()}", (shape[0], shape[1]), codes, codebook, block, absmax, nested
    )
    return PackedTensor(name, qtype, matrix)


def _nested(modules: ModuleTensors, name: str, state: ConfigReader, blocks: int) -> NestedScales:
    size = state.read("nested_blocksize", int, low=1, high=1 << 20)
    offset = state.read("nested_offset", float)
    codebook = modules.take(f"{name}.nested_quant_map", ("F32",), (256,)).data.view("<f4")
    absmax = modules.take(f"{name}.nested_absmax", ("F32",), (-(-blocks // size),)).data.view("<f4")
    return NestedScales(codebook, absmax, size, offset)


def _take_int8(modules: ModuleTensors, module: str) -> PackedTensor:
    name = f"{module}.weight"
    values = numbers(modules.take(name, ("I8",), (None, None)))
    rows, columns = values.shape
    scales = modules.take(f"{module}.SCB", ("F32", "F16", "BF16"), (rows,)).dense()
    modules.drop(f"{module}.weight_format")
    grid = RawTensor(scales.name, (rows, 1), scales.qtype, scales.data.reshape(rows, -1))
    matrix = ScaledMatrix("bitsandbytes int8", values, None, grid, (1, columns), _INT8_LIMIT)
    return PackedTensor(name, QuantType.F16, matrix)
