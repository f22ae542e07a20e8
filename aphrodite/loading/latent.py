"""Parameters of latent attention (`MlaSpec`) as checkpoints keep them.

The decoder wants two stacks of matrices, one a head: `k_b` `[heads, kv_lora_rank, qk_nope_head_dim]`, which takes a
query to the latent, and `v_b` `[heads, v_head_dim, kv_lora_rank]`, which takes the latent to a value. safetensors files
and older GGUF files hold both in one matrix whose rows are, head by head, those of the key, then those of the value.
Rows of the turning dimensions pair neighbours in all files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aphrodite.models.spec import MlaSpec
from aphrodite.quantization.dequantize import dequantize
from aphrodite.quantization.packed import PackedTensor
from aphrodite.quantization.types import QuantType, RawTensor


@dataclass(frozen=True, slots=True)
class LatentPart:
    """Makes `k_b` or `v_b` of the matrix `[heads * (nope + value), kv_lora_rank]` that holds both.

    Dense types keep their type; blocks of a quantized one lie along the columns, which a transposition cuts, so that
    they are expanded to float32.
    """

    raw: RawTensor
    mla: MlaSpec
    is_key: bool

    @property
    def qtype(self) -> QuantType:
        return self.raw.qtype if self._is_dense else QuantType.F32

    @property
    def _is_dense(self) -> bool:
        return self.raw.qtype.block_size == 1 and not isinstance(self.raw, PackedTensor)

    def __call__(self) -> RawTensor:
        mla, raw = self.mla, self.raw
        if self._is_dense:
            values = np.ascontiguousarray(raw.data).view(f"<u{raw.qtype.block_bytes}")
        else:
            values = dequantize(raw).astype("<f4", copy=False)
        heads = values.reshape(-1, mla.qk_nope_head_dim + mla.v_head_dim, mla.kv_lora_rank)
        if self.is_key:
            own = np.ascontiguousarray(heads[:, : mla.qk_nope_head_dim].transpose(0, 2, 1))
        else:
            own = np.ascontiguousarray(heads[:, mla.qk_nope_head_dim :])
        rows = own.reshape(-1, own.shape[-1]).view(np.uint8)
        return RawTensor(raw.name, own.shape, self.qtype, rows)


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
