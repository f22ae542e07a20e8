"""Programs of the native library: a list of operations over buffers that runs a whole step in one call.

The ctypes structures mirror `native/program.h`, where each operation is described. A program is put together with
`ProgramBuilder`; what it computes (which model) is the caller's business.
"""

from __future__ import annotations

import ctypes
import enum
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from aphrodite.kernels.cpu.library import NativeLibrary
from aphrodite.quantization.codebooks import grid_words
from aphrodite.quantization.types import QuantType, RawTensor

BLOCK_COLUMNS = 32
TILE_ROWS = 16
KV_BLOCK = 16
MAX_QUERY_GROUP = 32
MAX_QUERY_ROWS = 48  # (position, head) pairs that a task of attention computes at once
MAX_CHOICES = 64
LOGITS = -1
HIDDEN = -2


class Codes(enum.IntEnum):
    """What the codes of groups are multiplied as: integers less their group's zero, floats, numbers of a table."""

    INTEGERS = 0
    FLOAT8 = 1
    TABLE = 2


class GroupKind(NamedTuple):
    """Codes with a scale for each group of columns: (code - zero) * scale, or what the code stands for, times scale.

    Integers have 2, 3, 4 or 8 bits, floats 8 (e4m3), codes of a table of 16 numbers 4. `group` is a multiple of 32 and
    divides the columns; `scales` is F16, BF16 or F32; codes and zeros are unsigned.
    """

    bits: int
    scales: QuantType
    group: int
    codes: Codes = Codes.INTEGERS

    @property
    def number(self) -> int:
        """Of `Type` in `native/formats.h`, negative where it has none."""
        return _GROUP_NUMBERS.get((self.codes, self.bits, self.scales), -1)

    @property
    def codes_a_byte(self) -> int:
        """Of the codes as `repack_groups` takes them."""
        return 2 if self.bits == 4 else 1


TileKind: TypeAlias = QuantType | GroupKind
"""What the library keeps a matrix in: blocks of a GGUF type, or groups of codes."""

_GROUP_NUMBERS = {
    (Codes.INTEGERS, 4, QuantType.F16): 1000,
    (Codes.INTEGERS, 4, QuantType.BF16): 1001,
    (Codes.INTEGERS, 8, QuantType.F16): 1002,
    (Codes.INTEGERS, 8, QuantType.BF16): 1003,
    (Codes.INTEGERS, 2, QuantType.F16): 1004,
    (Codes.INTEGERS, 2, QuantType.BF16): 1005,
    (Codes.INTEGERS, 3, QuantType.F16): 1006,
    (Codes.INTEGERS, 3, QuantType.BF16): 1007,
    (Codes.INTEGERS, 4, QuantType.F32): 1008,
    (Codes.INTEGERS, 8, QuantType.F32): 1009,
    (Codes.FLOAT8, 8, QuantType.F32): 1010,
    (Codes.TABLE, 4, QuantType.F16): 1011,
    (Codes.TABLE, 4, QuantType.F32): 1012,
}


class GroupArrays(NamedTuple):
    """A matrix in groups, as `repack_groups` takes it."""

    codes: np.ndarray
    """uint8 `[rows, columns]`, or of 4 bits `[rows, columns / 2]` with the even column in the low nibble."""
    scales: np.ndarray
    """uint16, the bytes of F16 or BF16, or float32; `[rows, groups]`."""
    zeros: np.ndarray | None = None
    """uint8 `[rows, groups]`; None where codes are no integers."""
    table: np.ndarray | None = None
    """float32 `[16]`, what codes of a table stand for."""


class OpKind(enum.IntEnum):
    EMBED = 0
    NORM = 1
    PACK = 2
    LINEAR = 3
    GATED = 4
    ROTARY_KV = 5
    ATTENTION = 6
    GATHER = 7
    NORM_ADD = 8
    ROUTE = 9
    EXPERT_GATED = 10
    EXPERT_LINEAR = 11
    EXPERT_SUM = 12
    LATENT_KV = 13
    HEAD_LINEAR = 14


class RowSet(enum.IntEnum):
    """Which rows an operation writes: all tokens, or those whose logits or hidden states are wanted.

    PAIRS are those of packs of experts: a row for each token and choice, ordered by expert. HEADS are those of packs of
    `HEAD_LINEAR`, of one head at a time.
    """

    TOKENS = 0
    LOGITS = 1
    HIDDEN = 2
    PAIRS = 3
    HEADS = 4


class Activation(enum.IntEnum):
    """How matrix products read their input."""

    FLOAT32 = 0
    INT16 = 1
    INT8 = 2


class KvType(enum.IntEnum):
    """Storage of the KV cache."""

    FLOAT32 = 0
    FLOAT16 = 1
    INT16 = 2

    def block_bytes(self, kv_heads: int, head_dim: int) -> int:
        """Bytes of a block of one layer."""
        element, units = {KvType.FLOAT32: (4, 0), KvType.FLOAT16: (2, 0), KvType.INT16: (2, 2)}[self]
        return kv_heads * KV_BLOCK * (2 * head_dim * element + 4 * units)

    def latent_block_bytes(self, latent_dim: int) -> int:
        """The same of latent attention, which has `latent_dim` values a position."""
        element, units = {KvType.FLOAT32: (4, 0), KvType.FLOAT16: (2, 0), KvType.INT16: (2, 2)}[self]
        return KV_BLOCK * (latent_dim * element + 4 * units)


class NormKind(enum.IntEnum):
    """RMSNorm, LayerNorm, LayerNorm with a bias, which is the vector behind the weight."""

    RMS = 0
    LAYER = 1
    BIASED_LAYER = 2


class HeadNorm(enum.IntEnum):
    """Norms of queries and keys before rotation; the vectors are those of `ModelSpec.head_norm`."""

    NONE = 0
    HEAD = 1
    WIDTH = 2
    EACH_HEAD = 3


class GateKind(enum.IntEnum):
    SILU = 0
    GELU_TANH = 1
    BOUNDED_SWIGLU = 2


class Scoring(enum.IntEnum):
    """How a router's products become the weights of experts, as `MoeSpec.scoring`."""

    SOFTMAX = 0
    SIGMOID = 1
    SOFTMAX_OF_CHOSEN = 2


_STEP_ERRORS = {
    1: "a token id is outside the vocabulary",
    2: "query_start is not an ascending partition of the tokens into non-empty sequences",
    3: "positions do not match context_lens, or a context exceeds the model length or its block table",
    4: "a block table names a block outside the KV cache",
    5: "slot_mapping points outside the KV cache",
    6: "logits_index names a row outside the step",
    8: "hidden_index names a row outside the step",
    9: "a sequence's adapter has no slot",
}
_OUT_OF_MEMORY = 7


class _Op(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "rows", "input", "output", "first_pack", "pack_count")),
        *((name, ctypes.c_int32) for name in ("first_weight", "weight_count", "vector", "layer", "window", "flag")),
        ("value", ctypes.c_float),
        ("bound", ctypes.c_float),
    )


class _WeightDesc(ctypes.Structure):
    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "out_column")),
        ("type", ctypes.c_int32),
        ("pack", ctypes.c_int32),
    )


class _PackDesc(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("rows", ctypes.c_int32), ("columns", ctypes.c_int64))


class RoutingDesc(ctypes.Structure):
    """How a layer's tokens choose their experts; `native/program.h` describes the fields."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("experts", "choices", "scoring", "normalize", "groups", "best_groups")),
        *((name, ctypes.c_int32) for name in ("pair_score", "correction", "logits", "shared", "gate")),
        ("scale", ctypes.c_float),
    )


class LatentDesc(ctypes.Structure):
    """How a program's latents lie; `native/program.h` describes the fields. All zeros: attention is not latent."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("turning", "plain", "source", "column"))


_DIMENSIONS = ("vocab_size", "max_len", "num_layers", "heads", "kv_heads", "head_dim", "rotary_half", "kv_type")
_ARRAYS = ("cos", "sin", "query_scales", "ops", "weights", "packs", "buffers", "vectors", "routings", "orders")
_COUNTS = ("op_count", "weight_count", "pack_count", "buffer_count", "vector_count", "routing_count", "order_count")


class _ProgramDesc(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _DIMENSIONS),
        ("latent", LatentDesc),
        ("choices", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
        *((name, ctypes.c_int64) for name in _COUNTS),
    )


class StepDesc(ctypes.Structure):
    """One step; pointers to the tensors of `runner.inputs.ForwardInputs`, logits, the cache and hidden states."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("token_ids", "positions", "slots", "query_start", "context_lens")),
        *((name, ctypes.c_void_p) for name in ("block_tables", "logits_index")),
        *((name, ctypes.c_int64) for name in ("tokens", "sequences", "table_stride", "max_blocks", "logits_rows")),
        ("logits", ctypes.c_void_p),
        ("cache", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("nanoseconds", ctypes.c_void_p),
        ("hidden_index", ctypes.c_void_p),
        ("hidden_rows", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("adapter_slots", ctypes.c_void_p),
        ("adapter_pairs", ctypes.c_void_p),
        ("adapter_count", ctypes.c_int64),
    )


class LowRankDesc(ctypes.Structure):
    """What an adapter adds to the product with one weight (`native/low_rank.h`); all zeros: nothing."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class NativeMemory:
    """Zeroed memory on huge pages, freed with the object.

    Raises:
        MemoryError: the system refuses `size` bytes.
    """

    def __init__(self, library: NativeLibrary, size: int) -> None:
        self._free: Any = library.cdll.aph_free
        self._free.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        allocate: Any = library.cdll.aph_allocate
        allocate.argtypes = [ctypes.c_int64]
        allocate.restype = ctypes.c_void_p
        self.size = size
        self.address: int = allocate(size) or 0
        if not self.address:
            raise MemoryError(f"the system refuses {size / 2**20:.0f} MiB")

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self._free(self.address, self.size)


def tiles_bytes(library: NativeLibrary, kind: TileKind, rows: int, columns: int) -> int:
    """Bytes of a [rows, columns] weight in tiles; 0 if the library cannot hold that type or shape."""
    function: Any = library.cdll.aph_tiles_bytes
    function.argtypes = [ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    function.restype = ctypes.c_int64
    number, group = _type_number(kind)
    if isinstance(kind, QuantType):
        _tell_grid(library, kind)
    size: int = function(number, rows, columns, group) if number >= 0 else 0
    return size


@functools.cache
def _tell_grid(library: NativeLibrary, qtype: QuantType) -> None:
    """The library holds matrices of a grid's points only when it knows them."""
    words = grid_words(qtype)
    if words is None:
        return
    function: Any = library.cdll.aph_set_grid
    function.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64]
    function.restype = ctypes.c_int64
    points: int = function(qtype.gguf_id, words.ctypes.data, len(words))
    if points != len(words):
        raise RuntimeError(f"the native library has {points} points for {qtype.name}, not {len(words)}")


def repack(library: NativeLibrary, weight: RawTensor, address: int) -> None:
    """Writes a weight's tiles (`tiles_bytes` of them) to `address`, on the library's default threads.

    Raises:
        ValueError: the weight's data are of another size, or the library has no tiles for its type or shape.
    """
    rows, columns = weight.shape
    if not tiles_bytes(library, weight.qtype, rows, columns):
        raise ValueError(f"{weight.name}: there are no tiles for [{rows}, {columns}] {weight.qtype.name}")
    data = np.ascontiguousarray(weight.data)
    if data.nbytes != rows * weight.qtype.row_bytes(columns):
        raise ValueError(f"{weight.name}: {data.nbytes} bytes do not make [{rows}, {columns}] {weight.qtype.name}")
    function: Any = library.cdll.aph_repack
    function.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    function(weight.qtype.gguf_id, data.ctypes.data, rows, columns, address)


def repack_groups(library: NativeLibrary, kind: GroupKind, arrays: GroupArrays, address: int) -> None:
    """Writes the tiles of groups of codes to `address`, on the library's default threads.

    Raises:
        ValueError: shapes or types do not belong together, or the library has no tiles for them.
    """
    codes, scales, zeros, table = arrays
    rows, columns = codes.shape[0], codes.shape[1] * kind.codes_a_byte
    if not tiles_bytes(library, kind, rows, columns):
        raise ValueError(f"there are no tiles for [{rows}, {columns}] in {kind}")
    shape, integers = (rows, columns // kind.group), kind.codes is Codes.INTEGERS
    if scales.shape != shape or (zeros is not None and zeros.shape != shape):
        found = None if zeros is None else zeros.shape
        raise ValueError(f"scales {scales.shape} and zeros {found} do not make [{rows}, {columns}] in {kind}")
    wanted = ["uint8", "float32" if kind.scales is QuantType.F32 else "uint16", "uint8" if integers else None]
    wanted.append("float32" if kind.codes is Codes.TABLE else None)
    types = [None if array is None else array.dtype.name for array in arrays]
    if types != wanted:
        raise ValueError(f"codes, scales, zeros and table are {types}, not {wanted}")
    if table is not None and table.shape != (16,):
        raise ValueError(f"a table of 16 numbers has the shape {table.shape}")
    kept = [None if array is None else np.ascontiguousarray(array) for array in arrays]
    function: Any = library.cdll.aph_repack_groups
    function.argtypes = [ctypes.c_int32, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    pointers = [None if array is None else array.ctypes.data for array in kept]
    function(kind.number, *pointers, rows, columns, kind.group, address)


def _type_number(kind: TileKind) -> tuple[int, int]:
    """The library's number of a type, negative where it has none, and the columns of its groups."""
    return (kind.gguf_id, 0) if isinstance(kind, QuantType) else (kind.number, kind.group)


class ProgramBuilder:
    """Collects buffers, packs, weights and operations; `build` hands them to the library.

    Every `add_*` of an operand returns the number by which operations name it.
    """

    def __init__(self) -> None:
        self._ops: list[_Op] = []
        self._weights: list[_WeightDesc] = []
        self._packs: list[_PackDesc] = []
        self._buffers: list[int] = []
        self._vectors: list[np.ndarray] = []
        self._biases: list[np.ndarray] = []
        self._routings: list[RoutingDesc] = []
        self._orders: list[np.ndarray | None] = []
        self.latent = LatentDesc()

    @property
    def num_weights(self) -> int:
        return len(self._weights)

    def add_buffer(self, width: int) -> int:
        """A float32 buffer [rows, width], width a multiple of 16."""
        self._buffers.append(width)
        return len(self._buffers) - 1

    def add_pack(self, kind: Activation, columns: int, rows: RowSet = RowSet.TOKENS) -> int:
        """Rows packed as matrix products read them."""
        self._packs.append(_PackDesc(kind, rows, columns))
        return len(self._packs) - 1

    def add_vector(self, vector: np.ndarray) -> int:
        """A float32 vector such as a norm's weight."""
        self._vectors.append(np.ascontiguousarray(vector, dtype=np.float32))
        return len(self._vectors) - 1

    def add_weight(
        self,
        address: int,
        kind: TileKind,
        shape: tuple[int, int],
        *,
        pack: int = -1,
        out_column: int = 0,
        bias: np.ndarray | None = None,
    ) -> int:
        """A weight in tiles; in a product it multiplies `pack` and writes columns from `out_column` on.

        Of a stack of matrices `shape` is that of each, and their biases are `[matrices, rows]`.
        """
        bias_address = None
        if bias is not None:
            padded = np.zeros((*bias.shape[:-1], -(-shape[0] // TILE_ROWS) * TILE_ROWS), np.float32)
            padded[..., : shape[0]] = bias
            self._biases.append(padded)
            bias_address = padded.ctypes.data
        number, group = _type_number(kind)
        self._weights.append(_WeightDesc(address, bias_address, *shape, group, out_column, number, pack))
        return len(self._weights) - 1

    def add_routing(self, routing: RoutingDesc) -> int:
        """How a layer's tokens choose; all layers have the same number of choices."""
        if self._routings and routing.choices != self._routings[0].choices:
            raise ValueError(f"{routing.choices} experts a token after {self._routings[0].choices}")
        self._routings.append(routing)
        return len(self._routings) - 1

    def add_orders(self, orders: Sequence[np.ndarray | None]) -> int:
        """Orders of columns of an operation's packs, one a pack, None for that of its input.

        Each is a permutation `[columns]`, of an operation that packs for experts `[experts, columns]`: column j of the
        pack is column order[j] of the input. The returned number is the operation's `window`.
        """
        self._orders += [None if order is None else np.ascontiguousarray(order, dtype=np.int32) for order in orders]
        return len(self._orders) - len(orders) + 1

    def add_op(
        self,
        kind: OpKind,
        *,
        rows: RowSet = RowSet.TOKENS,
        source: int = 0,
        output: int = 0,
        packs: Sequence[int] = (),
        weights: Sequence[int] = (),
        vector: int = 0,
        layer: int = 0,
        window: int = 0,
        flag: int = 0,
        value: float = 0.0,
        bound: float = 0.0,
    ) -> None:
        """Appends an operation; `packs` and `weights` are runs of consecutive numbers."""
        for run in (packs, weights):
            if list(run) != list(range(run[0], run[0] + len(run)) if run else ()):
                raise ValueError(f"{kind.name}: {list(run)} are not consecutive")
        first_pack, first_weight = (packs[0] if packs else 0), (weights[0] if weights else 0)
        self._ops.append(
            _Op(
                kind,
                rows,
                source,
                output,
                first_pack,
                len(packs),
                first_weight,
                len(weights),
                vector,
                layer,
                window,
                flag,
                value,
                bound,
            )
        )

    def build(
        self,
        library: NativeLibrary,
        isa: str | None,
        cos: np.ndarray,
        sin: np.ndarray,
        query_scales: np.ndarray | None = None,
        **dimensions: int,
    ) -> Program:
        """The program; `cos` and `sin` are `[max_len, rotary_half]`, or several such tables stacked.

        `query_scales` `[max_len]` multiply queries by their position; `dimensions` are those of `ProgramDesc` in
        `native/program.h` that no table gives.
        """
        cos, sin = (np.ascontiguousarray(table, dtype=np.float32) for table in (cos, sin))
        keep_alive: list[Any] = [cos, sin, *self._vectors, *self._biases, *self._orders]
        ops = (_Op * len(self._ops))(*self._ops)
        weights = (_WeightDesc * len(self._weights))(*self._weights)
        packs = (_PackDesc * len(self._packs))(*self._packs)
        buffers = (ctypes.c_int64 * len(self._buffers))(*self._buffers)
        vectors = (ctypes.c_void_p * len(self._vectors))(*(vector.ctypes.data for vector in self._vectors))
        routings = (RoutingDesc * len(self._routings))(*self._routings)
        addresses = (None if order is None else order.ctypes.data for order in self._orders)
        orders = (ctypes.c_void_p * len(self._orders))(*addresses)
        desc = _ProgramDesc(max_len=cos.shape[-2], rotary_half=cos.shape[-1], latent=self.latent, **dimensions)
        desc.choices = self._routings[0].choices if self._routings else 0
        desc.cos, desc.sin = cos.ctypes.data, sin.ctypes.data
        if query_scales is not None:
            scales = np.ascontiguousarray(query_scales, dtype=np.float32)
            keep_alive.append(scales)
            desc.query_scales = scales.ctypes.data
        named = (("op", ops), ("weight", weights), ("pack", packs), ("buffer", buffers), ("routing", routings))
        for name, array in named:
            setattr(desc, f"{name}s", ctypes.addressof(array))
            setattr(desc, f"{name}_count", len(array))
        desc.vectors, desc.vector_count = ctypes.addressof(vectors), len(vectors)
        desc.orders, desc.order_count = ctypes.addressof(orders), len(orders)
        return Program(library, desc, isa, keep_alive)


class Program:
    """A program in the library. One step at a time; weights, tables and cache are the caller's to keep alive."""

    def __init__(self, library: NativeLibrary, desc: _ProgramDesc, isa: str | None, keep_alive: list[Any]) -> None:
        cdll = library.cdll
        cdll.aph_program_create.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        cdll.aph_program_create.restype = ctypes.c_void_p
        cdll.aph_program_destroy.argtypes = [ctypes.c_void_p]
        self._destroy: Any = cdll.aph_program_destroy
        self._run: Any = cdll.aph_program_run
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._run.restype = ctypes.c_int32
        self._keep_alive = keep_alive
        self._handle: int = cdll.aph_program_create(ctypes.addressof(desc), isa.encode() if isa else None) or 0
        if not self._handle:
            raise MemoryError("the native library could not create its program")

    def run(self, step: StepDesc) -> None:
        """Runs one step.

        Raises:
            ValueError: an input is out of range; nothing was written.
            MemoryError: no memory for the step's buffers.
        """
        code: int = self._run(self._handle, ctypes.addressof(step))
        if code == _OUT_OF_MEMORY:
            raise MemoryError(f"no memory for the buffers of a step of {step.tokens} tokens")
        if code:
            raise ValueError(_STEP_ERRORS[code])

    def __del__(self) -> None:
        if getattr(self, "_handle", 0):
            self._destroy(self._handle)
