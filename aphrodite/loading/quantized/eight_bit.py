"""FP8 checkpoints: e4m3 or e5m2 weights with scales per tensor, per channel or per block (DeepSeek's 128 x 128).

Layout: `weight` beside `weight_scale_inv` (transformers' fp8 method, DeepSeek V3) or `weight_scale` (fbgemm's,
ModelOpt's); both are factors.
"""

from __future__ import annotations

from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.quantized.tensors import DENSE_TYPES, ModuleTensors, numbers
from aphrodite.loading.safetensors import StoredTensor
from aphrodite.quantization.packed import PackedTensor, ScaledMatrix, e4m3_values, e5m2_values
from aphrodite.quantization.types import QuantType, RawTensor

_FLOAT8 = {"F8_E4M3": e4m3_values, "F8_E5M2": e5m2_values}
# What only serves quantized activations and an FP8 KV cache, which weights are expanded without.
ACTIVATION_SUFFIXES = (
    *(".input_scale", ".input_zero_point", ".input_scale_ub", ".activation_scale", ".output_scale"),
    *(".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_output_scale"),
)
Tile = tuple[int, int]


def unpack_fp8(tensors: dict[str, StoredTensor], config: ConfigReader) -> dict[str, PackedTensor]:
    """Takes every FP8 module out of `tensors`; their weights by name.

    Raises:
        ModelFormatError: tensors that do not fit.
    """
    sizes = config.integers("weight_block_size", low=1, high=1 << 16)
    if len(sizes) not in (0, 2):
        raise config.wrong("weight_block_size", "two whole numbers", sizes)
    block = (sizes[0], sizes[1]) if sizes else None
    modules, found = ModuleTensors(tensors, "FP8"), {}
    for module in modules.modules_with(".weight"):
        if modules.dtype_of(f"{module}.weight") in _FLOAT8:
            found[f"{module}.weight"] = take_float8(modules, module, block)
    drop_activation_scales(modules)
    return found


def unpack_modelopt(tensors: dict[str, StoredTensor], config: ConfigReader) -> dict[str, PackedTensor]:
    """As `unpack_fp8` for NVIDIA's ModelOpt, of whose algorithms it is the one that is known.

    Raises:
        ModelFormatError: another algorithm, or tensors that do not fit.
    """
    algorithm = config.read("quant_algo", str, "")
    if algorithm != "FP8":
        raise config.wrong("quant_algo", "FP8", algorithm)
    return unpack_fp8(tensors, config)


def drop_activation_scales(modules: ModuleTensors) -> None:
    """Leaves out what only products of quantized activations need."""
    for suffix in ACTIVATION_SUFFIXES:
        for module in modules.modules_with(suffix):
            modules.drop(module + suffix)


def take_float8(modules: ModuleTensors, module: str, block: Tile | None) -> PackedTensor:
    """The weight of a module that is stored in float8."""
    name = f"{module}.weight"
    dtype = modules.dtype_of(name)
    values = numbers(modules.take(name, tuple(_FLOAT8), (None, None)))
    scale_name = f"{name}_scale_inv" if modules.has(f"{name}_scale_inv") else f"{name}_scale"
    scales, tile = take_scales(modules, scale_name, (values.shape[0], values.shape[1]), block)
    method = f"FP8 {dtype.removeprefix('F8_')}"
    return PackedTensor(name, compute_type(scales), ScaledMatrix(method, values, _FLOAT8[dtype](), scales, tile))


def take_scales(
    modules: ModuleTensors, name: str, shape: tuple[int, int], block: Tile | None, group: int | None = None
) -> tuple[RawTensor, Tile]:
    """Scales of a weight `shape` as a grid, and the tile that one of them is for.

    One number is for the tensor and a column for its channels, whatever the configuration says; otherwise the grid must
    be that of `block`, or of groups of `group` inputs.
    """
    rows, columns = shape
    stored = modules.take(name, DENSE_TYPES, None)
    grids: list[tuple[tuple[int, ...], Tile]] = [((), shape), ((1,), shape), ((1, 1), shape)]
    grids += [((rows,), (1, columns)), ((rows, 1), (1, columns))]
    if block is not None:
        grids.append(((-(-rows // block[0]), -(-columns // block[1])), block))
    if group is not None and columns % group == 0:
        grids.append(((rows, columns // group), (1, group)))
    for found, tile in grids:
        if stored.shape == found:
            grid = (-(-rows // tile[0]), -(-columns // tile[1]))
            raw = stored.dense()
            return RawTensor(name, grid, raw.qtype, raw.data.reshape(grid[0], -1)), tile
    raise modules.mismatch(stored, f"a scale for the tensor, for each row or for each block of {name} {list(shape)}")


def compute_type(scales: RawTensor) -> QuantType:
    """The type in which the method's kernels compute: that of the scales, bfloat16 where they are float32."""
    return QuantType.BF16 if scales.qtype is QuantType.F32 else scales.qtype
