"""Which quantization method a safetensors checkpoint has, and its tensors as parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from aphrodite.errors import ModelFormatError
from aphrodite.loading.config_reader import ConfigReader
from aphrodite.loading.quantized.bitsandbytes import unpack_bitsandbytes
from aphrodite.loading.quantized.compressed_tensors import unpack_compressed_tensors
from aphrodite.loading.quantized.eight_bit import unpack_fp8, unpack_modelopt
from aphrodite.loading.quantized.integer_words import unpack_auto_round, unpack_awq, unpack_gptq
from aphrodite.loading.quantized.mxfp4 import unpack_mxfp4
from aphrodite.loading.safetensors import StoredTensor, dense_tensors
from aphrodite.quantization.types import RawTensor

_GPTQ_FILE = "quantize_config.json"
_MODELOPT_FILE = "hf_quant_config.json"
_Unpack = Callable[[dict[str, StoredTensor], ConfigReader], Mapping[str, RawTensor]]
_METHODS: dict[str, _Unpack] = {
    "awq": unpack_awq,
    "gptq": unpack_gptq,
    "fp8": unpack_fp8,
    "compressed-tensors": unpack_compressed_tensors,
    "bitsandbytes": unpack_bitsandbytes,
    "mxfp4": unpack_mxfp4,
    "fbgemm_fp8": unpack_fp8,
    "modelopt": unpack_modelopt,
    "auto-round": unpack_auto_round,
    "intel/auto-round": unpack_auto_round,
}


def quantization_of(config: ConfigReader, directory: Path) -> ConfigReader | None:
    """What says how a checkpoint is quantized, None where nothing does; arguments as for `unpack_tensors`."""
    text = config.section("text_config")
    for reader, key in ((config, "quantization_config"), (config, "compression_config"), (text, "quantization_config")):
        section = reader.section(key) if reader is not None else None
        if section is not None:
            return section if section.has("quant_method") else _with_method(section)
    if (directory / _GPTQ_FILE).exists():
        return ConfigReader.from_file(directory / _GPTQ_FILE).with_defaults({"quant_method": "gptq"})
    section = config.section("quantization")
    if section is None and (directory / _MODELOPT_FILE).exists():
        section = ConfigReader.from_file(directory / _MODELOPT_FILE).section("quantization")
    return _with_method(section) if section is not None else None


def _with_method(section: ConfigReader) -> ConfigReader:
    """A description that does not name its method, with the name of what writes such ones."""
    if section.has("quant_algo"):
        return section.with_defaults({"quant_method": "modelopt"})
    return section.with_defaults({"quant_method": "MLX"}) if section.has("bits") else section


def unpack_tensors(tensors: dict[str, StoredTensor], config: ConfigReader, directory: Path) -> dict[str, RawTensor]:
    """A checkpoint's tensors as its parameters: a module's weight for the tensors of which it is made.

    Args:
        tensors: as they lie in the files.
        config: of config.json, whose `quantization_config` names the method; early GPTQ checkpoints have a
            `quantize_config.json` instead.
        directory: of the checkpoint.

    Raises:
        ModelFormatError: the method is unknown, the checkpoint does not fit it, or a tensor that no method claims is
            neither F32 nor F16 nor BF16.
    """
    section = quantization_of(config, directory)
    if section is None:
        return dense_tensors(tensors)
    method = section.read("quant_method", str, "")
    if method not in _METHODS:
        known = ", ".join(name for name in _METHODS if "/" not in name)
        raise ModelFormatError(
            f"{section.source}: the weights are quantized with {method or 'an unnamed method'}, which is not supported "
            f"(supported: {known}); use another version of the model, or a GGUF file"
        )
    rest = dict(tensors)
    packed = _METHODS[method](rest, section)
    return {**dense_tensors(rest), **packed}
