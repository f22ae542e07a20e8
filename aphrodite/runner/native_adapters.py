"""Adapters for the native library: a table of pairs, one for each slot and weight of its program.

A and B keep the type that their file has; B's rows lie in tiles of 16, as those of weights do. A slot takes an adapter
by taking over its addresses. A step reads one table from its beginning to its end: changes make a new one.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from aphrodite.kernels.cpu.program import TILE_ROWS, LowRankDesc
from aphrodite.loading.lora import Adapter, LowRank
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.types import RawTensor
from aphrodite.runner.native_weights import TiledWeights


class _Held(NamedTuple):
    """An adapter's row of the table, and the arrays that it points to."""

    pairs: ctypes.Array[LowRankDesc]
    arrays: tuple[np.ndarray, ...]


class PairTable(NamedTuple):
    """`[slots][weights]` pairs; whoever reads them holds on to this."""

    pairs: ctypes.Array[LowRankDesc]
    held: tuple[_Held | None, ...]


class NativeAdapters:
    """The adapters of one program. Implements `AdapterStore`.

    Args:
        weights: numbers of the program's weights, by the names of `Adapter.pairs`.
        num_weights: all that the program has.
        orders: of the weights' rows and columns.

    Attributes:
        table: what a step that begins now is computed with.
    """

    def __init__(self, num_slots: int, weights: Mapping[str, int], num_weights: int, orders: TiledWeights) -> None:
        self._weights = weights
        self._orders = orders
        self._num_weights = num_weights
        self._known: dict[int, _Held] = {}
        self._changing = threading.Lock()
        self.num_slots = num_slots
        self.table = self._table((None,) * num_slots)

    def add(self, number: int, adapter: Adapter) -> None:
        pairs = (LowRankDesc * self._num_weights)()
        arrays: list[np.ndarray] = []
        for name, pair in adapter.pairs.items():
            weight = f"{name}.weight"
            columns, rows = self._orders.column_orders.get(weight), self._orders.row_orders.get(weight)
            a, b, kind = _matrices(pair, columns, rows)
            arrays += [a, b]
            pairs[self._weights[name]] = LowRankDesc(a.ctypes.data, b.ctypes.data, pair.rank, kind, pair.scale)
        self._known[number] = _Held(pairs, tuple(arrays))

    def remove(self, number: int) -> None:
        gone = self._known.pop(number)
        with self._changing:
            self.table = self._table(tuple(None if held is gone else held for held in self.table.held))

    def place(self, slot: int, number: int) -> None:
        with self._changing:
            held = list(self.table.held)
            held[slot] = self._known[number]
            self.table = self._table(tuple(held))

    def _table(self, held: tuple[_Held | None, ...]) -> PairTable:
        pairs = (LowRankDesc * (len(held) * self._num_weights))()
        row = ctypes.sizeof(LowRankDesc) * self._num_weights
        for slot, own in enumerate(held):
            if own is not None:
                ctypes.memmove(ctypes.addressof(pairs) + slot * row, own.pairs, row)
        return PairTable(pairs, held)


def _matrices(pair: LowRank, columns: np.ndarray | None, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, int]:
    """A as it is, B as `[tiles, rank, 16]`, and the number of their type; A's columns and B's rows in the orders of
    those of their weight."""
    same = pair.a.qtype is pair.b.qtype
    a, b = (_values(raw) if same else dequantize(raw).astype(np.float32) for raw in (pair.a, pair.b))
    a = a if columns is None else a[:, columns]
    b = b if rows is None else b[rows]
    rows, rank = b.shape
    padded = np.zeros((-(-rows // TILE_ROWS) * TILE_ROWS, rank), b.dtype)
    padded[:rows] = b
    tiles = np.ascontiguousarray(padded.reshape(-1, TILE_ROWS, rank).swapaxes(1, 2))
    return np.ascontiguousarray(a), tiles, pair.a.qtype.gguf_id if same else 0


def _values(raw: RawTensor) -> np.ndarray:
    """A stored matrix as numbers of its width; 16-bit ones by their bits."""
    bits: np.ndarray = raw.data.view("<f4" if raw.qtype.block_bytes == 4 else "<u2").reshape(raw.shape)
    return bits
