"""A layer of latent attention over a scattered paged cache, and what it must be, for tests on every device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from paged_case import PagedStep, make_step

from aphrodite.attention.backend import KVCache
from aphrodite.attention.latent import LatentShape, LatentTransform
from aphrodite.kernels import reference
from aphrodite.models.spec import MlaSpec
from aphrodite.runner.inputs import DeviceInputs, HostLengths

EPS = 1e-6
FP8 = torch.float8_e4m3fn


class LatentCase(NamedTuple):
    """The second of two layers; `step` has one KV head, whose keys are the cached latents."""

    step: PagedStep
    shape: LatentShape
    transform: LatentTransform
    qkv: torch.Tensor

    @property
    def cache(self) -> KVCache:
        latents = torch.stack([self.step.keys[:, 0]] * 2)
        return KVCache(latents, latents[..., : self.shape.mla.kv_lora_rank])

    def inputs(self, lengths: HostLengths | None, table: np.ndarray) -> DeviceInputs:
        step = self.step
        return DeviceInputs(
            token_ids=step.positions,
            positions=step.positions,
            slot_mapping=step.slot_mapping,
            query_start=step.query_start,
            context_lens=step.context_lens,
            rows=step.rows,
            block_tables=step.block_tables,
            logits_index=step.rows,
            lengths=lengths,
            attention_table=torch.from_numpy(table).to(self.qkv.device),
        )

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, heads * v_head_dim]` float64 with keys and values expanded, zeros for sequences without context; and the
        layer's cache, float64."""
        step, mla, heads = self.step, self.shape.mla, self.shape.num_heads
        cos, sin = self.transform.cos.double(), self.transform.sin.double()
        tokens = len(step.positions)
        wide = self.qkv.double()
        query, latent = wide[:, : heads * mla.head_dim].view(tokens, heads, -1), wide[:, heads * mla.head_dim :]
        turned = reference.apply_rotary(query[..., mla.qk_nope_head_dim :], step.positions, cos, sin)
        query = torch.cat((query[..., : mla.qk_nope_head_dim], turned), -1)
        normed = reference.rms_norm(latent[:, : mla.kv_lora_rank], self.transform.norms[1].double(), EPS)
        shared = reference.apply_rotary(latent[:, None, mla.kv_lora_rank :], step.positions, cos, sin)[:, 0]
        written = torch.cat((normed, shared), 1)
        if self.shape.cache_dtype == FP8:
            written = written.clamp(-448, 448)
        cache = self.step.keys[:, 0].clone()
        kept = step.slot_mapping >= 0
        flat = cache.view(torch.uint8).flatten(0, 1) if cache.dtype == FP8 else cache.flatten(0, 1)
        values = written.float().to(cache.dtype)
        flat[step.slot_mapping[kept]] = (values.view(torch.uint8) if cache.dtype == FP8 else values)[kept]
        numbers = cache.float().double().flatten(0, 1)
        out = torch.zeros((tokens, heads, mla.v_head_dim), dtype=torch.float64, device=self.qkv.device)
        starts = step.query_start.tolist()
        for index, context in enumerate(step.context_lens.tolist()):
            if not context:
                continue
            where = torch.arange(context, device=numbers.device)
            table, size = step.block_tables[step.rows[index]].long(), step.keys.shape[2]
            mine = numbers[table[where // size] * size + where % size]
            latents, turning = mine[:, : mla.kv_lora_rank], mine[:, mla.kv_lora_rank :]
            rows = slice(starts[index], starts[index + 1])
            at = context - (rows.stop - rows.start) + torch.arange(rows.stop - rows.start, device=numbers.device)
            for head in range(heads):
                keys = torch.cat((latents @ self.transform.key_up[1][head].double(), turning), 1)
                scores = query[rows, head] @ keys.T * self.shape.scale
                weights = torch.softmax(scores.masked_fill(where > at[:, None], float("-inf")), -1)
                out[rows, head] = weights @ latents @ self.transform.value_up[1][head].double().T
        return out.flatten(1), cache.float().double()


def make_latent_case(
    lengths: list[tuple[int, int]],
    mla: MlaSpec,
    *,
    heads: int,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LatentCase:
    """A layer of sequences of (query rows, context); context 0 is padding."""
    cache_dtype = cache_dtype or dtype
    step = make_step(
        lengths, heads=1, kv_heads=1, head_dim=mla.latent_dim, dtype=dtype, kv_dtype=cache_dtype, device=device
    )
    longest = max(context for _, context in lengths)
    generator = torch.Generator().manual_seed(9)

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(dtype).to(device)

    angles = torch.outer(torch.arange(float(longest + 1)), torch.rand(mla.qk_rope_head_dim // 2, generator=generator))
    transform = LatentTransform(
        angles.cos().to(device),
        angles.sin().to(device),
        norms=tuple((torch.rand(mla.kv_lora_rank, generator=generator) + 0.5).to(dtype).to(device) for _ in range(2)),
        norm_eps=EPS,
        key_up=tuple(
            random(heads, mla.kv_lora_rank, mla.qk_nope_head_dim, scale=mla.kv_lora_rank**-0.5) for _ in range(2)
        ),
        value_up=tuple(random(heads, mla.v_head_dim, mla.kv_lora_rank, scale=mla.kv_lora_rank**-0.5) for _ in range(2)),
    )
    shape = LatentShape(
        num_layers=2,
        num_heads=heads,
        mla=mla,
        block_size=16,
        dtype=dtype,
        cache_dtype=cache_dtype,
        device=torch.device(device),
        scale=mla.head_dim**-0.5,
    )
    return LatentCase(step, shape, transform, random(len(step.positions), heads * mla.head_dim + mla.latent_dim))


def lengths_of(pairs: list[tuple[int, int]]) -> HostLengths:
    query, context = np.array(pairs, dtype=np.int32).T
    return HostLengths(query, context)
