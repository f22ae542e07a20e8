"""Products of tokens with the experts that they chose, whose weights lie in one tensor.

Few pairs of token and expert, as when single chats decode: each is a product of one row, on the vector units, by blocks
that own whole rows of an expert's matrix. The second product of a token goes over its experts in their order, weighs
and adds, so that nothing but the result is written. Bound by reading `pairs * out * in` weights.

Many pairs are put together by expert (`routing.group_tokens`), in tiles that the matrix units multiply: W is the M
operand, the tile's rows of x are the N operand and are fetched from where the tokens lie. Tiles are launched for the
worst case and the unused ones end at once, so that launches depend on shapes only. Bound by reading the weights of
the chosen experts once, or by `2 * pairs * out * in` operations. Another kernel weighs each token's results and adds
them, in their order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.activation import Activation, gated
from aphrodite.kernels.triton.expert_weights import ExpertWeights, dot_expert_rows, dot_expert_tiles
from aphrodite.kernels.triton.launch import (
    ceil_div,
    direct_launch,
    launch_dependents,
    launch_options,
    next_power_of_2,
    pdl_supported,
    wait_for_producer,
)
from aphrodite.kernels.triton.routing import TokenTiles

# Tokens up to which each pair is a product of its own. Pairs that share an expert run side by side and share its
# weights in the L2 cache.
ALONE_TOKENS = 4
COMBINE_BLOCK = 1024


class PairConfig(NamedTuple):
    """How the products of single pairs are cut: weight rows a block, values of `in` a chunk, warps, and chunks of
    packed weights in flight."""

    rows: int
    chunk: int
    warps: int
    stages: int = 3


class TileConfig(NamedTuple):
    """How grouped products are cut: weight rows and pairs a tile, values of `in` a step, steps in flight, warps."""

    rows: int
    pairs: int
    chunk: int
    stages: int
    warps: int


@functools.cache
def pair_config(out_features: int, in_features: int, packed: bool) -> PairConfig:
    """The cut of products of single pairs; packed weights want whole runs of 32 columns or more a thread."""
    longest = next_power_of_2(in_features)
    if packed:
        return PairConfig(4, min(2048 if in_features >= 2048 else 1024, longest), 2 if in_features >= 2048 else 1)
    chunk = next((chunk for chunk in (1024, 512, 256) if in_features % chunk == 0), min(256, longest))
    return PairConfig(8 if out_features >= 1024 else 4, chunk, 4)


@functools.cache
def pairs_of_tile(pairs: int, experts: int) -> int:
    """Pairs a tile, by how many an expert has on average."""
    each = pairs / experts
    return 16 if each <= 8 else 32 if each <= 24 else 64 if each <= 64 else 128


@functools.cache
def tile_config(size: int, in_features: int, itemsize: int, packed: bool, hip: bool = False) -> TileConfig:
    """The cut of grouped products with tiles of `size` pairs.

    AMD's processors have 64 KiB of shared memory; float32 operands take twice the room of others.
    """
    if packed and size <= 32:
        return TileConfig(64, size, 128, 2 if hip else 4, 4)
    if packed:
        return TileConfig(64 if itemsize == 4 else 128, size, 64, 2 if hip else 3, 8)
    if itemsize == 4:
        return TileConfig(32, size, 32, 2, 4)
    if size <= 32:
        chunk = 128 if in_features % 128 == 0 and not hip else 64
        return TileConfig(64, size, chunk, 2 if hip else 4 if chunk == 128 else 6, 4)
    return TileConfig(128, size, 64, 2 if hip else 3, 8 if size == 128 else 4)


@direct_launch
@triton.jit
def _pair_gate_up_kernel(
    x,  # [T, in]
    chosen,  # [T * TOP_K] int32
    low,  # `expert_weights.ExpertWeights.operands`
    high,
    scales,
    super_scales,
    offsets,
    super_offsets,
    table,
    bias,  # [experts, out] float32, or anything when not HAS_BIAS
    out,  # [T * TOP_K, out / 2]
    out_features,
    in_features: tl.constexpr,
    TOP_K: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    pair = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    wait_for_producer(PDL)
    expert = tl.load(chosen + pair).to(tl.int64)
    rows = expert * out_features + tl.minimum(first + tl.arange(0, ROWS), out_features - 1)
    from_x = x + (pair // TOP_K).to(tl.int64) * in_features
    total = dot_expert_rows(
        from_x, low, high, scales, super_scales, offsets, super_offsets, table, rows, in_features, LOW_BITS, HIGH_BITS,
        GROUP, SUPER, OFFSET, ZERO, KIND, ROWS, CHUNK, STAGES,
    )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias + rows)
    gate, up = tl.split(tl.reshape(total, (ROWS // 2, 2)))
    index = first // 2 + tl.arange(0, ROWS // 2)
    result = gated(gate, up, ACTIVATION).to(out.dtype.element_ty)
    tl.store(out + pair.to(tl.int64) * (out_features // 2) + index, result, mask=index < out_features // 2)


@direct_launch
@triton.jit
def _pair_down_kernel(
    x,  # [T * TOP_K, in]
    chosen,  # [T * TOP_K] int32
    weights,  # [T * TOP_K] float32
    low,  # `expert_weights.ExpertWeights.operands`
    high,
    scales,
    super_scales,
    offsets,
    super_offsets,
    table,
    bias,  # [experts, out] float32, or anything when not HAS_BIAS
    residual,  # [T, out], or anything when not HAS_RESIDUAL
    out,  # [T, out]
    out_features,
    in_features: tl.constexpr,
    TOP_K: tl.constexpr,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    token = tl.program_id(0)
    index = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    clamped = tl.minimum(index, out_features - 1)
    result = tl.zeros((ROWS,), tl.float32)
    wait_for_producer(PDL)
    for number in tl.static_range(TOP_K):
        pair = token.to(tl.int64) * TOP_K + number
        rows = tl.load(chosen + pair).to(tl.int64) * out_features + clamped
        total = dot_expert_rows(
            x + pair * in_features, low, high, scales, super_scales, offsets, super_offsets, table, rows, in_features,
            LOW_BITS, HIGH_BITS, GROUP, SUPER, OFFSET, ZERO, KIND, ROWS, CHUNK, STAGES,
        )  # fmt: skip
        if HAS_BIAS:
            total += tl.load(bias + rows)
        result += tl.load(weights + pair) * total
    at = token.to(tl.int64) * out_features + index
    inside = index < out_features
    if HAS_RESIDUAL:
        result += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@direct_launch
@triton.jit
def _grouped_kernel(
    x,  # [T, in], or [T * TOP_K, in] with SPREAD 1
    order,  # [T * TOP_K] int32
    tile_experts,  # [tiles] int32
    tile_starts,  # [tiles] int32
    tile_ends,  # [tiles] int32
    low,  # `expert_weights.ExpertWeights.operands`
    high,
    scales,
    super_scales,
    offsets,
    super_offsets,
    table,
    bias,  # [experts, out] float32, or anything when not HAS_BIAS
    out,  # [T * TOP_K, out], or half as wide with an activation
    out_features,
    in_features: tl.constexpr,
    SPREAD: tl.constexpr,  # pairs that share a row of x
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SUPER: tl.constexpr,
    OFFSET: tl.constexpr,
    ZERO: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    first = tl.program_id(0) * ROWS
    number = tl.program_id(1)
    wait_for_producer(PDL)
    expert = tl.load(tile_experts + number).to(tl.int64)
    if expert >= 0:
        start = tl.load(tile_starts + number)
        end = tl.load(tile_ends + number)
        at = start + tl.arange(0, PAIRS)
        pairs = tl.load(order + tl.minimum(at, end - 1)).to(tl.int64)
        rows = expert * out_features + tl.minimum(first + tl.arange(0, ROWS), out_features - 1)
        from_x = x + (pairs // SPREAD)[None, :] * in_features
        total = dot_expert_tiles(
            from_x, low, high, scales, super_scales, offsets, super_offsets, table, rows, in_features, LOW_BITS,
            HIGH_BITS, GROUP, SUPER, OFFSET, ZERO, KIND, ROWS, CHUNK, PAIRS, STAGES,
        )  # fmt: skip
        if HAS_BIAS:
            total += tl.load(bias + rows)[:, None]
        if ACTIVATION is None:
            width = out_features
            index = first + tl.arange(0, ROWS)
            result = total
        else:
            width = out_features // 2
            index = first // 2 + tl.arange(0, ROWS // 2)
            gate, up = tl.split(tl.permute(tl.reshape(total, (ROWS // 2, 2, PAIRS)), (0, 2, 1)))
            result = gated(gate, up, ACTIVATION)
        inside = (index < width)[:, None] & (at < end)[None, :]
        tl.store(out + pairs[None, :] * width + index[:, None], result.to(out.dtype.element_ty), mask=inside)


@direct_launch
@triton.jit
def _combine_kernel(
    results,  # [T * TOP_K, hidden]
    weights,  # [T * TOP_K] float32
    residual,  # [T, hidden], or anything when not HAS_RESIDUAL
    out,  # [T, hidden]
    hidden: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < hidden
    total = tl.zeros((BLOCK,), tl.float32)
    wait_for_producer(PDL)
    for number in tl.static_range(TOP_K):
        pair = token * TOP_K + number
        values = tl.load(results + pair * hidden + index, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(weights + pair) * values
    if HAS_RESIDUAL:
        total += tl.load(residual + token * hidden + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + index, total.to(out.dtype.element_ty), mask=inside)


@direct_launch
@triton.jit
def _gate_kernel(
    x,  # [T, hidden]
    weight,  # [hidden] float32
    inner,  # [T, width], scaled in place
    width,
    hidden: tl.constexpr,
    HIDDEN: tl.constexpr,  # power of two >= hidden
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, HIDDEN)
    factors = tl.load(weight + k, mask=k < hidden, other=0.0)
    wait_for_producer(PDL)
    product = tl.sum(tl.load(x + token * hidden + k, mask=k < hidden, other=0.0).to(tl.float32) * factors, axis=0)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = inner + token * width + index
    values = tl.load(at, mask=index < width, other=0.0).to(tl.float32) / (1.0 + tl.exp(-product))
    tl.store(at, values.to(inner.dtype.element_ty), mask=index < width)


def experts_of_pairs(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    activation: Activation,
    residual: torch.Tensor | None,
    config: PairConfig | None = None,
) -> torch.Tensor:
    """Sum over a token's experts of weight * down(act(gate(x)) * up(x)), plus the residual, for few tokens.

    Args:
        x: `[T, hidden]` contiguous, T > 0.
        chosen, weights: `[T, top_k]`, int32 and float32.
        gate_up: hidden -> 2 * intermediate, rows of gate and up alternating.
        residual: `[T, hidden]`, which the result replaces.
        config: how to cut the work; chosen by shape when None.

    Returns:
        `[T, hidden]` of x's dtype.
    """
    tokens, top_k = chosen.shape
    twice, hidden = gate_up.out_features, gate_up.in_features
    inner = torch.empty((tokens * top_k, twice // 2), dtype=x.dtype, device=x.device)
    cut = config or pair_config(twice, hidden, gate_up.packed)
    pdl = pdl_supported(x.device)
    _pair_gate_up_kernel[(tokens * top_k, ceil_div(twice, cut.rows))](
        x,
        chosen,
        *gate_up.operands,
        inner,
        twice,
        in_features=hidden,
        TOP_K=top_k,
        **gate_up.constants,
        ROWS=cut.rows,
        CHUNK=cut.chunk,
        ACTIVATION=activation,
        STAGES=cut.stages,
        PDL=pdl,
        num_warps=cut.warps,
        **launch_options(pdl),
    )
    out = torch.empty_like(x) if residual is None else residual
    cut = config or pair_config(hidden, twice // 2, down.packed)
    _pair_down_kernel[(tokens, ceil_div(hidden, cut.rows))](
        inner,
        chosen,
        weights,
        *down.operands,
        out,
        out,
        hidden,
        in_features=twice // 2,
        TOP_K=top_k,
        **down.constants,
        ROWS=cut.rows,
        CHUNK=cut.chunk,
        HAS_RESIDUAL=residual is not None,
        STAGES=cut.stages,
        PDL=pdl,
        num_warps=cut.warps,
        **launch_options(pdl),
    )
    return out


def grouped_product(
    x: torch.Tensor, tiles: TokenTiles, weight: ExpertWeights, cut: TileConfig, activation: Activation | None = None
) -> torch.Tensor:
    """Each pair's row of x times its expert's matrix.

    Args:
        x: `[T, in]`, or `[T * top_k, in]` with a row for every pair; contiguous.
        tiles: of `cut.pairs` pairs.
        weight: with an activation its rows are gate and up, alternating.

    Returns:
        `[T * top_k, out]`, or `[T * top_k, out / 2]` with an activation, of x's dtype.
    """
    pairs = tiles.order.shape[0]
    out_features, in_features = weight.out_features, weight.in_features
    width = out_features if activation is None else out_features // 2
    out = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    pdl = pdl_supported(x.device)
    _grouped_kernel[(ceil_div(out_features, cut.rows), tiles.experts.shape[0])](
        x,
        tiles.order,
        tiles.experts,
        tiles.starts,
        tiles.ends,
        *weight.operands,
        out,
        out_features,
        in_features=in_features,
        SPREAD=pairs // x.shape[0],
        **weight.constants,
        ROWS=cut.rows,
        PAIRS=cut.pairs,
        CHUNK=cut.chunk,
        STAGES=cut.stages,
        ACTIVATION=activation,
        PDL=pdl,
        num_warps=cut.warps,
        **launch_options(pdl),
    )
    return out


def combine(results: torch.Tensor, weights: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The weighted sum of each token's results in their order, plus the residual.

    Args:
        results: `[T * top_k, hidden]`.
        weights: `[T, top_k]` float32.
        residual: `[T, hidden]`, which the result replaces.
    """
    (tokens, top_k), hidden = weights.shape, results.shape[1]
    out = results.new_empty((tokens, hidden)) if residual is None else residual
    pdl = pdl_supported(results.device)
    _combine_kernel[(tokens, ceil_div(hidden, COMBINE_BLOCK))](
        results,
        weights,
        out,
        out,
        hidden=hidden,
        TOP_K=top_k,
        BLOCK=COMBINE_BLOCK,
        HAS_RESIDUAL=residual is not None,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return out


def scale_by_gate(inner: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`inner` `[T, width]` times sigmoid(x weight^T), in place.

    Args:
        x: `[T, hidden]` contiguous.
        weight: `[1, hidden]` float32.
    """
    (tokens, width), hidden = inner.shape, x.shape[1]
    pdl = pdl_supported(x.device)
    _gate_kernel[(tokens, ceil_div(width, COMBINE_BLOCK))](
        x,
        weight,
        inner,
        width,
        hidden=hidden,
        HIDDEN=next_power_of_2(hidden),
        BLOCK=COMBINE_BLOCK,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return inner
