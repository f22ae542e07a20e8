"""What the parts of a program for the native library have in common: operands by the names of parameters, and norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from aphrodite.errors import ConfigError
from aphrodite.kernels.cpu.program import TILE_ROWS, Activation, GateKind, NormKind, OpKind, ProgramBuilder, RowSet
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import QuantType, RawTensor
from aphrodite.runner.native_weights import TiledWeights, reads_floats

GATES = {"silu": GateKind.SILU, "gelu_tanh": GateKind.GELU_TANH, "swiglu_oai": GateKind.BOUNDED_SWIGLU}


class Packs(NamedTuple):
    """The forms of one input that weights read.

    Attributes:
        numbers: of all packs.
        of: the pack that a weight reads, by the weight's name.
        orders: what the operation that writes them has as its `window`.
    """

    numbers: list[int]
    of: Mapping[str, int]
    orders: int


class Compiler:
    """Turns names into operands of a program under construction."""

    def __init__(self, weights: Mapping[str, RawTensor], packed: TiledWeights, activation: Activation) -> None:
        self.builder = ProgramBuilder()
        self._packs: dict[tuple[str, tuple[tuple[Activation, int], ...]], list[int]] = {}
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

    def packs(self, use: str, names: list[str], columns: int, rows: RowSet = RowSet.TOKENS) -> Packs:
        """Packs of one input, one for each form and order of columns that the named weights read; layers share those of
        the same use."""
        orders: list[np.ndarray | None] = [None]
        reads = {name: (self._kind(name), _place(self._gathered(name), orders)) for name in names}
        forms = tuple(dict.fromkeys(reads.values()))
        if (use, forms) not in self._packs:
            self._packs[use, forms] = [self.builder.add_pack(kind, columns, rows) for kind, _ in forms]
        numbers = self._packs[use, forms]
        of = {name: numbers[forms.index(form)] for name, form in reads.items()}
        taken = self.builder.add_orders([orders[place] for _, place in forms]) if len(orders) > 1 else 0
        return Packs(numbers, of, taken)

    def pack(self, source: int, packs: Packs) -> None:
        """Adds the packing of rows of `source` as they are."""
        self.builder.add_op(OpKind.PACK, source=source, packs=packs.numbers, window=packs.orders)

    def weight(self, name: str, packs: Packs, out_column: int = 0) -> int:
        """A matrix, or a stack of them, that multiplies one of `packs`, with its bias, if it has one."""
        rows, columns = self._weights[name].shape[-2:]
        bias = self._bias(name)
        number = self.builder.add_weight(
            self._packed.address(name),
            self._packed.kinds[name],
            (rows, columns),
            pack=packs.of[name],
            out_column=out_column,
            bias=bias,
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

    def _gathered(self, name: str) -> np.ndarray | None:
        """The order into which columns have to be brought for a weight; what gates make is in it already."""
        return None if name.endswith("down.weight") else self._packed.column_orders.get(name)

    def _bias(self, name: str) -> np.ndarray | None:
        """Of a weight's rows, in their order."""
        stored = self._weights.get(name.removesuffix("weight") + "bias")
        if stored is None:
            return None
        bias, order = dense_vector(stored).reshape(stored.shape), self._packed.row_orders.get(name)
        return bias if order is None else np.take_along_axis(bias, order, axis=-1)

    def _kind(self, name: str) -> Activation:
        exact = reads_floats(self._packed.kinds[name]) or name.endswith("router.weight")
        return Activation.FLOAT32 if exact else self._activation


def compile_norm(
    compiler: Compiler,
    spec: ModelSpec,
    source: int,
    packs: Packs,
    name: str,
    rows: RowSet = RowSet.TOKENS,
) -> None:
    """Packs what the next product reads: rows of `source`, normalised in models with norms before their parts."""
    if spec.block == "post_norm" and rows is RowSet.TOKENS:
        compiler.pack(source, packs)
        return
    vector, kind = compiler.norm(spec, name)
    compiler.builder.add_op(
        OpKind.NORM,
        rows=rows,
        source=source,
        packs=packs.numbers,
        vector=vector,
        window=packs.orders,
        flag=kind,
        value=spec.norm_eps,
    )


def _place(order: np.ndarray | None, known: list[np.ndarray | None]) -> int:
    """Where an order stands among the known ones, to which it is added if it is new."""
    for place, other in enumerate(known):
        if order is other or (order is not None and other is not None and np.array_equal(order, other)):
            return place
    known.append(order)
    return len(known) - 1


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
