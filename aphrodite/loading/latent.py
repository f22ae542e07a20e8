"""Parameters of latent attention (`MlaSpec`) as checkpoints keep them.

The decoder wants two stacks of matrices, one a head: `k_b` `[heads, kv_lora_rank, qk_nope_head_dim]`, which takes a
query to the latent, and `v_b` `[heads, v_head_dim, kv_lora_rank]`, which takes the latent to a value. safetensors files
and older GGUF files hold both in one matrix whose rows are, head by head, those of the key, then those of the value.
Rows of the turning dimensions pair neighbours in all files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from aphrodite.models.spec import MlaSpec
from aphrodite.quantization.dense_types import numbers_of
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.packed import PackedTensor
from aphrodite.quantization.types import ComputedTensor, QuantType, RawTensor


@dataclass(frozen=True, slots=True)
class LatentPart:
    """Makes `k_b` or `v_b` of the matrix `[heads * (nope + value), kv_lora_rank]` that holds both.

    Dense types keep their type. Blocks of a quantized one lie along the columns: the value's rows keep them, but the
    transposition of the key's cuts them, so that those are expanded to float16, whose rounding (2^-11) is far below
    theirs. Other packings are expanded to float32.
    """

    raw: RawTensor
    mla: MlaSpec
    is_key: bool

    @property
    def qtype(self) -> QuantType:
        if isinstance(self.raw, PackedTensor):
            return QuantType.F32
        return QuantType.F16 if self.is_key and self.raw.qtype.block_size > 1 else self.raw.qtype

    def __call__(self) -> RawTensor:
        mla, raw = self.mla, self.raw
        rows = np.arange(raw.shape[0]).reshape(-1, mla.qk_nope_head_dim + mla.v_head_dim)
        keys, values = np.split(rows, [mla.qk_nope_head_dim], axis=1)
        if self.is_key:
            shape = (len(keys), mla.kv_lora_rank, mla.qk_nope_head_dim)
            return ComputedTensor(raw.name, shape, self.qtype, partial(self._read_keys, keys))
        shape = (len(values), mla.v_head_dim, mla.kv_lora_rank)
        if not isinstance(raw, PackedTensor):
            return raw.regrouped(shape, values.reshape(-1))
        return ComputedTensor(raw.name, shape, self.qtype, partial(self._read_values, values.reshape(-1)))

    def _read_keys(self, keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Bytes of rows of `k_b`, counted over all heads, of which each is expanded once; `keys` `[heads, rows]` says
        where the heads' lie."""
        heads, within = np.divmod(numbers, self.mla.kv_lora_rank)
        out = np.empty((len(numbers), self.qtype.row_bytes(self.mla.qk_nope_head_dim)), np.uint8)
        for head in np.unique(heads):
            chosen = heads == head
            expanded = _numbers(self.raw.take_rows(keys[head]), self.qtype)
            out[chosen] = np.ascontiguousarray(expanded.T[within[chosen]]).view(np.uint8)
        return out

    def _read_values(self, values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        return _numbers(self.raw.take_rows(values[numbers]), self.qtype).view(np.uint8)


def _numbers(raw: RawTensor, qtype: QuantType) -> np.ndarray:
    """A matrix's values in a dense type; those of the type itself as they are."""
    if raw.qtype is qtype and not isinstance(raw, PackedTensor):
        return numbers_of(raw)
    return dequantize(raw).astype("<f2" if qtype is QuantType.F16 else "<f4")


def latent_row_order(mla: MlaSpec, module: str, rows: int) -> np.ndarray | None:
    """How the rows of a projection are reordered so that turning dimensions come in halves; None for those that have
    none."""
    turning = np.arange(mla.qk_rope_head_dim).reshape(-1, 2).T.reshape(-1)
    if module in ("q", "q_b"):
        head = np.concatenate((np.arange(mla.qk_nope_head_dim), mla.qk_nope_head_dim + turning))
        order: np.ndarray = (np.arange(0, rows, mla.head_dim)[:, None] + head).reshape(-1)
        return order
    if module == "kv_a":
        return np.concatenate((np.arange(mla.kv_lora_rank), mla.kv_lora_rank + turning))
    return None
