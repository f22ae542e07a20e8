"""From a checkpoint's tensors to the decoder's parameters: names, shapes and row order, all checked first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from aphrodite.errors import ModelFormatError
from aphrodite.loading.parameters import NameTable, parameter_shapes
from aphrodite.models.spec import ModelSpec
from aphrodite.quantization.types import QuantType, RawTensor

_SHOWN = 4  # names listed in an error, of each kind


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter that can be had: its description costs nothing, `load` may read and copy."""

    shape: tuple[int, ...]
    qtype: QuantType
    load: Callable[[], RawTensor]

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
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
    names: NameTable,
    *,
    harmless: Callable[[str], bool],
    interleaved: bool = False,
) -> Weights:
    """Assign a checkpoint's tensors to the parameters of `spec`.

    Args:
        source: the checkpoint, for the error.
        harmless: tells of a left-over tensor whether the decoder does not need it.
        interleaved: rows of q and k pair neighbouring dimensions; they are reordered to halves.

    Raises:
        ModelFormatError: names are missing or left over, or shapes are wrong; all in one message.
    """
    parameters: dict[str, Parameter] = {}
    missing: list[str] = []
    misshapen: list[str] = []
    left_over = dict.fromkeys(tensors)
    for canonical, shape in parameter_shapes(spec).items():
        name = names.checkpoint_name(canonical)
        raw = tensors.get(name)
        if raw is None:
            missing.append(name)
            continue
        del left_over[name]
        if raw.shape != shape:
            misshapen.append(f"{name} is {list(raw.shape)} instead of {list(shape)}")
            continue
        if len(shape) == 1 and raw.qtype.block_size > 1:
            misshapen.append(f"{name} is {raw.qtype.name}, but norms and biases must be F32, F16 or BF16")
            continue
        parameters[canonical] = _parameter(canonical, raw, spec.head_dim if interleaved else None)
    unknown = [name for name in left_over if not harmless(name)]
    if missing or misshapen or unknown:
        problems = (
            _listed("missing", missing) + _listed("wrong shape or type", misshapen) + _listed("not part of it", unknown)
        )
        raise ModelFormatError(
            f"{source}: the tensors do not fit the {spec.family} model that its configuration describes: "
            + "; ".join(problems)
        )
    return Weights(parameters)


def _parameter(canonical: str, raw: RawTensor, interleaved_head_dim: int | None) -> Parameter:
    module = canonical.split(".")[-2]
    if interleaved_head_dim is None or module not in ("q", "k"):
        return Parameter(raw.shape, raw.qtype, lambda: raw)
    head_dim = interleaved_head_dim
    return Parameter(raw.shape, raw.qtype, lambda: _halves_from_pairs(raw, head_dim))


def _halves_from_pairs(raw: RawTensor, head_dim: int) -> RawTensor:
    """Rows of each head reordered from (0, d/2, 1, d/2 + 1, …) to (0, 1, 2, …): lossless."""
    rows = np.arange(raw.shape[0]).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
    if len(raw.shape) > 1:
        return raw.take_rows(rows)
    values = raw.data.reshape(raw.shape[0], raw.qtype.block_bytes)[rows]
    return RawTensor(raw.name, raw.shape, raw.qtype, values.reshape(1, -1))


def _listed(what: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(names[:_SHOWN])}{more}"]
