"""From a checkpoint's tensors to the decoder's parameters: names, shapes and row order, all checked first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from aphrodite.errors import ModelFormatError
from aphrodite.loading.latent import LatentPart, latent_row_order
from aphrodite.loading.parameters import EXPERT_PLACEHOLDER, HEAD_PLACEHOLDER, Storage, parameter_shapes
from aphrodite.loading.report import listed
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.packed import PackedMatrix, PackedTensor
from aphrodite.quantization.types import QuantType, RawTensor, StackedTensor, transposed


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter that can be had: its description costs nothing, `load` may read and copy.

    `matrix` is the packing out of which it is expanded, None if it is stored as `qtype` says.
    """

    shape: tuple[int, ...]
    qtype: QuantType
    load: Callable[[], RawTensor]
    matrix: PackedMatrix | None = None

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def type_name(self) -> str:
        """How it is stored, for people."""
        return self.qtype.name if self.matrix is None else self.matrix.method

    @property
    def nbytes(self) -> int:
        """Bytes as it is stored."""
        if self.matrix is not None:
            return self.matrix.nbytes * math.prod(self.shape[:-1]) // self.matrix.shape[0]
        return self.count // self.shape[-1] * self.qtype.row_bytes(self.shape[-1])


class Weights(Mapping[str, RawTensor]):
    """Parameters by canonical name. Each access loads anew: views of the file, or reordered copies.

    Attributes:
        parameters: the same names with shape and type, for whoever wants no bytes.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = parameters

    def __getitem__(self, name: str) -> RawTensor:
        return self.parameters[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.parameters)

    def __len__(self) -> int:
        return len(self.parameters)


def match_weights(
    source: str,
    spec: ModelSpec,
    tensors: Mapping[str, RawTensor],
    storage: Storage,
    *,
    harmless: Callable[[str], bool],
) -> Weights:
    """Assign a checkpoint's tensors to the parameters of `spec`.

    What the checkpoint keeps otherwise than the decoder wants is converted when a parameter is loaded: stacked tensors
    are cut, rows that pair neighbouring dimensions are reordered to halves, norms get their offset and the last one the
    scale of the logits, in float32.

    Args:
        source: the checkpoint, for the error.
        storage: how it names and keeps them.
        harmless: tells of a left-over tensor whether the decoder does not need it.

    Raises:
        ModelFormatError: names are missing or left over, or shapes are wrong; all in one message.
    """
    parameters: dict[str, Parameter] = {}
    missing: dict[str, None] = {}
    misshapen: dict[str, None] = {}
    left_over = dict.fromkeys(tensors)
    shapes = parameter_shapes(spec)
    for canonical, place in _places(spec, shapes, storage).items():
        found = [tensors[name] for name in place.names if name in tensors]
        if storage.transposed_experts and ".expert_" in canonical and canonical.endswith(".weight"):
            found = [transposed(raw) if raw.qtype.block_size == 1 and len(raw.shape) == 3 else raw for raw in found]
        missing.update(dict.fromkeys(name for name in place.names if name not in tensors))
        for name in place.names:
            left_over.pop(name, None)
        wrong = [problem for raw in found if (problem := _problem(canonical, raw, place.shape))]
        misshapen.update(dict.fromkeys(wrong))
        if len(found) == len(place.names) and not wrong:
            load = _loader(canonical, shapes[canonical], found, place.rows, spec, storage)
            first, expanded = found[0], isinstance(load, LatentPart)
            matrix = first.matrix if isinstance(first, PackedTensor) and not expanded else None
            parameters[canonical] = Parameter(shapes[canonical], load.qtype, load, matrix)
    unknown = [name for name in left_over if not harmless(name)]
    if missing or misshapen or unknown:
        problems = (
            listed("missing", missing) + listed("wrong shape or type", misshapen) + listed("not part of it", unknown)
        )
        raise ModelFormatError(
            f"{source}: the tensors do not fit the {spec.family} model that its configuration describes: "
            + "; ".join(problems)
        )
    return Weights(parameters)


class MatrixPlace(NamedTuple):
    """Where a checkpoint keeps a weight's rows.

    Attributes:
        name: of the module that holds them, without `.weight`.
        rows: of that module.
        arranged: takes a matrix of so many rows and any columns to the rows of the weight, in the decoder's order.
    """

    name: str
    rows: int
    arranged: Callable[[RawTensor], RawTensor]


def matrix_places(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], storage: Storage) -> dict[str, MatrixPlace]:
    """Places of the matrices `shapes` of layers, by canonical name, for whatever belongs to rows of weights.

    Args:
        shapes: of `parameter_shapes(spec)`, those of `[out, in]` that one module each holds, or several stacked.
    """
    found: dict[str, MatrixPlace] = {}
    for canonical, place in _places(spec, shapes, storage).items():

        def arranged(raw: RawTensor, canonical: str = canonical, place: _Place = place) -> RawTensor:
            shape = (shapes[canonical][0], raw.shape[1])
            return _loader(canonical, shape, [raw], place.rows, spec, storage)()

        found[canonical] = MatrixPlace(place.names[0].removesuffix(".weight"), place.shape[0], arranged)
    return found


_Rows = np.ndarray | slice


class _Place(NamedTuple):
    """Where a parameter lies: tensors that are stacked to it, the shape that each must have, and which rows are its own
    (None for all)."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: _Rows | None


def _places(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], storage: Storage) -> dict[str, _Place]:
    stacks: dict[str, list[str]] = {}
    for canonical in shapes:
        stacks.setdefault(storage.names.checkpoint_name(canonical), []).append(canonical)
    places: dict[str, _Place] = {}
    for name, members in stacks.items():
        first = shapes[members[0]]
        if spec.mla is not None and len(members) == 2 and members[0].endswith(".k_b.weight"):
            both = (spec.num_heads * (spec.mla.qk_nope_head_dim + spec.mla.v_head_dim), spec.mla.kv_lora_rank)
            places.update((member, _Place((name,), both, None)) for member in members)
        elif HEAD_PLACEHOLDER in name or EXPERT_PLACEHOLDER in name:
            placeholder = HEAD_PLACEHOLDER if HEAD_PLACEHOLDER in name else EXPERT_PLACEHOLDER
            names = tuple(name.replace(placeholder, str(number)) for number in range(first[0]))
            places[members[0]] = _Place(names, first[1:], None)
        elif len(members) == 1:
            places[members[0]] = _Place((name,), first, None)
        elif ".expert_" in members[0]:
            gate_up_shape = (first[0], 2 * first[1], *first[2:])
            rows = _gate_up_rows(first[0], first[1], storage.alternating_experts)
            for member, own in zip(members, rows, strict=True):
                places[member] = _Place((name,), gate_up_shape, own)
        else:
            stacked = (sum(shapes[member][0] for member in members), *first[1:])
            grouped = storage.grouped_qkv and len(members) == 3  # q, k and v
            rows = _grouped_rows(spec) if grouped else _consecutive([shapes[member][0] for member in members])
            for member, own in zip(members, rows, strict=True):
                places[member] = _Place((name,), stacked, own)
    return places


def _consecutive(counts: Sequence[int]) -> list[_Rows]:
    ends = list(itertools.accumulate(counts))
    return [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _gate_up_rows(experts: int, inner: int, alternating: bool) -> list[_Rows]:
    """Rows of gate and up where each expert has both in one matrix, one behind the other or alternating."""
    rows = np.arange(experts * 2 * inner)
    by_part = rows.reshape(experts, inner, 2) if alternating else rows.reshape(experts, 2, inner).swapaxes(1, 2)
    return [by_part[..., part].reshape(-1) for part in range(2)]


def _grouped_rows(spec: ModelSpec) -> list[_Rows]:
    """Rows of q, k and v where each KV head's query heads, key and value lie together."""
    group = spec.num_heads // spec.num_kv_heads
    rows = np.arange((spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim)
    by_head = rows.reshape(spec.num_kv_heads, group + 2, spec.head_dim)
    return [part.reshape(-1) for part in (by_head[:, :group], by_head[:, group], by_head[:, group + 1])]


def _problem(canonical: str, raw: RawTensor, shape: tuple[int, ...]) -> str | None:
    if raw.shape != shape and (1, *raw.shape) != shape:  # a vector may stand for a matrix of one row
        return f"{raw.name} is {list(raw.shape)} instead of {list(shape)}"
    if raw.qtype.block_size > 1 and (len(shape) == 1 or _is_norm(canonical)):
        return f"{raw.name} is {raw.qtype.name}, but norms and biases must be F32, F16 or BF16"
    return None


def _is_norm(canonical: str) -> bool:
    return canonical.endswith("norm.weight")


@dataclass(frozen=True, slots=True)
class _Loader:
    """Makes a parameter of its tensors: their rows `rows`, reordered by `order`, then (w + offset) * scale.

    With `by_value` rows are single values: of vectors, and of norms with a row a head.
    """

    raws: tuple[RawTensor, ...]
    shape: tuple[int, ...]
    rows: _Rows | None
    order: np.ndarray | None
    by_value: bool
    offset: float
    scale: float

    @property
    def qtype(self) -> QuantType:
        return QuantType.F32 if self._folds else self.raws[0].qtype

    @property
    def _folds(self) -> bool:
        return self.offset != 0.0 or self.scale != 1.0

    def __call__(self) -> RawTensor:
        raw = self.raws[0]
        if len(self.raws) > 1:  # one a head, or an expert
            raw = StackedTensor(raw.name, self.raws)
        elif len(self.shape) > len(raw.shape):
            raw = raw.regrouped(self.shape, slice(None))
        for rows in (self.rows, self.order):
            if rows is not None and self.by_value:
                raw = _take_values(raw, rows, self.shape)
            elif rows is not None:
                raw = raw.take_rows(rows) if len(self.shape) == 2 else raw.regrouped(self.shape, rows)
        if not self._folds:
            return raw
        values = ((dequantize(raw).astype(np.float64) + self.offset) * self.scale).astype("<f4")
        return RawTensor(raw.name, raw.shape, QuantType.F32, values.reshape(raw.data.shape[0], -1).view(np.uint8))


def _take_values(raw: RawTensor, rows: _Rows, shape: tuple[int, ...]) -> RawTensor:
    values = raw.data.reshape(-1, raw.qtype.block_bytes)[rows]
    return RawTensor(raw.name, shape, raw.qtype, values.reshape(math.prod(shape[:-1]), -1))


def _loader(
    canonical: str,
    shape: tuple[int, ...],
    raws: Sequence[RawTensor],
    rows: _Rows | None,
    spec: ModelSpec,
    storage: Storage,
) -> _Loader | LatentPart:
    module = canonical.split(".")[-2]
    order = None
    if spec.mla is not None and module in ("k_b", "v_b") and raws[0].shape != shape:
        return LatentPart(raws[0], spec.mla, is_key=module == "k_b")
    if spec.mla is not None and storage.interleaved:
        order = latent_row_order(spec.mla, module, shape[0])
    elif storage.interleaved and module in ("q", "k", "q_norm", "k_norm"):
        count = math.prod(shape) if _is_norm(canonical) else shape[0]
        order = _halves_from_pairs(count, spec.head_dim, spec.rotary.dim)
    offset = storage.norm_offset if _is_norm(canonical) else 0.0
    scale = spec.logit_scale if canonical in ("norm.weight", "norm.bias") else 1.0
    by_value = len(shape) == 1 or _is_norm(canonical) or canonical.endswith(".bias")
    return _Loader(tuple(raws), shape, rows, order, by_value, offset, scale)


def _halves_from_pairs(count: int, head_dim: int, rotated: int) -> np.ndarray:
    """Indices that reorder the turning dimensions of each head from (0, r/2, 1, r/2 + 1, …) to (0, 1, 2, …)."""
    head = np.concatenate([np.arange(0, rotated, 2), np.arange(1, rotated, 2), np.arange(rotated, head_dim)])
    order: np.ndarray = (np.arange(0, count, head_dim)[:, None] + head).reshape(-1)
    return order
