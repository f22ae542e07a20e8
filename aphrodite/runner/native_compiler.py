"""What the parts of a program for the native library have in common: operands by the names of parameters, and norms."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aphrodite.errors import ConfigError
from aphrodite.kernels.cpu.program import TILE_ROWS, Activation, GateKind, NormKind, OpKind, ProgramBuilder, RowSet
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import QuantType, RawTensor
from aphrodite.runner.native_weights import TiledWeights, reads_floats

GATES = {"silu": GateKind.SILU, "gelu_tanh": GateKind.GELU_TANH, "swiglu_oai": GateKind.BOUNDED_SWIGLU}


class Compiler:
    """Turns names into operands of a program under construction."""

    def __init__(self, weights: Mapping[str, RawTensor], packed: TiledWeights, activation: Activation) -> None:
        self.builder = ProgramBuilder()
        self._packs: dict[tuple[str, tuple[Activation, ...]], dict[Activation, int]] = {}
        self._buffers: dict[str, int] = {}
        self._weights = weights
        self._packed = packed
        self._activation = activation
        self.weight_numbers: dict[str, int] = {}  # of matrices that are multiplied, by their modules

    def buffer(self, use: str, width: int) -> int:
        """A buffer that layers share, its width rounded up to whole lanes."""
        if use not in self._buffers:
            self._buffers[use] = self.builder.add_buffer(-(-width // TILE_ROWS) * TILE_ROWS)
        return self._buffers[use]

    def packs(self, use: str, names: list[str], columns: int, rows: RowSet = RowSet.TOKENS) -> dict[Activation, int]:
        """Packs of one input, one for each form that the named weights read; layers share those of the same use."""
        kinds = tuple(dict.fromkeys(self._kind(name) for name in names))
        if (use, kinds) not in self._packs:
            self._packs[use, kinds] = {kind: self.builder.add_pack(kind, columns, rows) for kind in kinds}
        return self._packs[use, kinds]

    def weight(self, name: str, packs: dict[Activation, int], out_column: int = 0) -> int:
        """A matrix, or a stack of them, that multiplies one of `packs`, with its bias, if it has one."""
        rows, columns = self._weights[name].shape[-2:]
        bias = self._weights.get(name.removesuffix("weight") + "bias")
        number = self.builder.add_weight(
            self._packed.address(name),
            self._packed.kinds[name],
            (rows, columns),
            pack=packs[self._kind(name)],
            out_column=out_column,
            bias=None if bias is None else dense_vector(bias).reshape(bias.shape),
        )
        self.weight_numbers[name.removesuffix(".weight")] = number
        return number

    def columns(self, name: str) -> int:
        """Of a matrix, or of each in a stack."""
        return self._weights[name].shape[-1]

    def table(self, name: str) -> int:
        """A matrix whose rows are looked up."""
        tensor = self._weights[name]
        kind = self._packed.kinds[name]
        return self.builder.add_weight(self._packed.address(name), kind, (tensor.shape[0], tensor.shape[1]))

    def vector(self, name: str) -> int:
        return self.builder.add_vector(dense_vector(self._weights[name]))

    def norm(self, spec: ModelSpec, name: str) -> tuple[int, NormKind]:
        """A norm's weight, with its bias behind it, if it has one."""
        vector = self.vector(f"{name}.weight")
        if spec.norm == "rms":
            return vector, NormKind.RMS
        if not spec.norm_bias:
            return vector, NormKind.LAYER
        self.vector(f"{name}.bias")
        return vector, NormKind.BIASED_LAYER

    def _kind(self, name: str) -> Activation:
        exact = reads_floats(self._packed.kinds[name]) or name.endswith("router.weight")
        return Activation.FLOAT32 if exact else self._activation


def compile_norm(
    compiler: Compiler,
    spec: ModelSpec,
    source: int,
    packs: Mapping[Activation, int],
    name: str,
    rows: RowSet = RowSet.TOKENS,
) -> None:
    """Packs what the next product reads: rows of `source`, normalised in models with norms before their parts."""
    if spec.block == "post_norm" and rows is RowSet.TOKENS:
        compiler.builder.add_op(OpKind.PACK, source=source, packs=list(packs.values()))
        return
    vector, kind = compiler.norm(spec, name)
    compiler.builder.add_op(
        OpKind.NORM,
        rows=rows,
        source=source,
        packs=list(packs.values()),
        vector=vector,
        flag=kind,
        value=spec.norm_eps,
    )


def dense_vector(tensor: RawTensor) -> np.ndarray:
    """A stored vector as float32."""
    data = np.ascontiguousarray(tensor.data).reshape(-1)
    if tensor.qtype is QuantType.F32:
        return data.view("<f4")
    if tensor.qtype is QuantType.F16:
        return data.view("<f2").astype(np.float32)
    if tensor.qtype is QuantType.BF16:
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    raise ConfigError(f"{tensor.name} is {tensor.qtype.name}; norms and biases must be F32, F16 or BF16")
