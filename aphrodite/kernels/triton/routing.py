"""Which experts compute which tokens: the router's product, its choice, and tokens put together by expert.

The product is bound by latency: `experts * hidden` weights are read from the L2 cache by every tile of tokens; for a
few tokens they are requested before the kernel waits for its predecessor. Operands keep their 16 bits and sums are
float32, which is the float32 product where the weight fits the type; what it loses in that type is a second weight of
its own. The choice is one warp a token. Grouping reads all choices once for each expert, one block an expert:
`4 * experts * pairs` bytes of L2 traffic, and no order depends on who is first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from aphrodite.kernels.triton.launch import (
    ceil_div,
    direct_launch,
    launch_dependents,
    launch_options,
    next_power_of_2,
    pdl_supported,
    wait_for_producer,
)
from aphrodite.models.spec import MoeSpec

ROW_TOKENS = 8  # up to which the product is made on the vector units
FEW_TOKENS = 64
# Pairs that every block of the grouping counts by itself; more are counted by a kernel of their own.
COUNTED_ALONE = 1024
BLOCK_PAIRS = 4096


class TokenTiles(NamedTuple):
    """(token, choice) pairs ordered by expert, cut into tiles of one expert each.

    Attributes:
        order: `[pairs]` int32, numbers into the flattened `[T, top_k]`.
        experts: `[tiles]` int32, -1 for tiles that are not used; how many there are depends on shapes only.
        starts, ends: `[tiles]` int32, which part of `order` a tile is.
        size: pairs a tile at most.
    """

    order: torch.Tensor
    experts: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    size: int


@direct_launch
@triton.jit
def _router_row_kernel(
    x,  # [T, hidden]
    weight,  # [experts, hidden] of x's dtype
    rest,  # what weight lost, alike; or anything when not HAS_REST
    bias,  # [experts] float32, or anything when not HAS_BIAS
    logits,  # [T, experts] float32
    experts: tl.constexpr,
    hidden: tl.constexpr,
    HIDDEN: tl.constexpr,  # power of two >= hidden
    EXPERTS: tl.constexpr,
    HAS_REST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    row = tl.program_id(1)
    columns = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    k = tl.arange(0, HIDDEN)
    inside = k < hidden
    at = tl.minimum(columns, experts - 1)[:, None] * hidden + k[None, :]
    tile = tl.load(weight + at, mask=inside[None, :], other=0.0)
    wait_for_producer(PDL)
    values = tl.load(x + row * hidden + k, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(tile.to(tl.float32) * values[None, :], axis=1)
    if HAS_REST:
        tile = tl.load(rest + at, mask=inside[None, :], other=0.0)
        total += tl.sum(tile.to(tl.float32) * values[None, :], axis=1)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < experts, other=0.0)
    tl.store(logits + row * experts + columns, total, mask=columns < experts)


@direct_launch
@triton.jit(do_not_specialize=["tokens"])
def _router_kernel(
    x,  # [T, hidden]
    weight,  # [experts, hidden] of x's dtype
    rest,  # what weight lost, alike; or anything when not HAS_REST
    bias,  # [experts] float32, or anything when not HAS_BIAS
    logits,  # [T, experts] float32
    tokens,
    experts: tl.constexpr,
    hidden: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_REST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    rows = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    columns = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    from_x = x + tl.minimum(rows, tokens - 1).to(tl.int64)[:, None] * hidden
    from_weight = tl.minimum(columns, experts - 1)[None, :] * hidden
    total = tl.zeros((TOKENS, EXPERTS), tl.float32)
    wait_for_producer(PDL)
    for start in tl.range(0, hidden, CHUNK):
        k = start + tl.arange(0, CHUNK)
        inside = k < hidden
        values = tl.load(from_x + k[None, :], mask=inside[None, :], other=0.0)
        tile = tl.load(weight + from_weight + k[:, None], mask=inside[:, None], other=0.0)
        total = tl.dot(values, tile, total, input_precision="ieee")
        if HAS_REST:
            tile = tl.load(rest + from_weight + k[:, None], mask=inside[:, None], other=0.0)
            total = tl.dot(values, tile, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=columns < experts, other=0.0)[None, :]
    within = (rows < tokens)[:, None] & (columns < experts)[None, :]
    tl.store(logits + rows.to(tl.int64)[:, None] * experts + columns[None, :], total, mask=within)


@triton.jit
def _of_best_groups(
    wanted,
    groups: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BY_TWO: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """`wanted` `[GROUPS, SIZE]`, -inf for groups that are not among the best."""
    best, at = tl.max(wanted, axis=1, return_indices=True, return_indices_tie_break_left=True)
    if BY_TWO:
        others = tl.where(tl.arange(0, SIZE)[None, :] == at[:, None], float("-inf"), wanted)
        best += tl.max(others, axis=1)
    index = tl.arange(0, GROUPS)
    best = tl.where(index < groups, best, float("-inf"))
    allowed = index < 0
    for _ in tl.static_range(TOP_GROUPS):
        _, chosen = tl.max(best, axis=0, return_indices=True, return_indices_tie_break_left=True)
        allowed = allowed | (index == chosen)
        best = tl.where(index == chosen, float("-inf"), best)
    return tl.where(allowed[:, None], wanted, float("-inf"))


@direct_launch
@triton.jit
def _route_kernel(
    logits,  # [T, experts] float32
    correction,  # [experts] float32, or anything when not HAS_CORRECTION
    experts_out,  # [T, TOP_K] int32
    weights_out,  # [T, TOP_K] float32
    weight_scale,
    experts: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,  # power of two >= TOP_K
    groups: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,  # power of two >= groups
    SIZE: tl.constexpr,  # power of two >= experts / groups
    BY_TWO: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)[:, None]
    member = tl.arange(0, SIZE)[None, :]
    size: tl.constexpr = experts // groups
    index = group * size + member
    inside = (group < groups) & (member < size)
    wait_for_producer(PDL)
    values = tl.load(logits + row * experts + index, mask=inside, other=float("-inf"))
    if SCORING == "sigmoid":
        scores = tl.where(inside, 1.0 / (1.0 + tl.exp(-values)), float("-inf"))
    elif SCORING == "softmax":
        exponentials = tl.exp(values - tl.max(tl.max(values, axis=1), axis=0))
        total = tl.sum(tl.sum(exponentials, axis=1), axis=0)
        scores = tl.where(inside, exponentials / total, float("-inf"))
    else:
        scores = values
    wanted = scores
    if HAS_CORRECTION:
        wanted += tl.load(correction + index, mask=inside, other=0.0)
    if groups > TOP_GROUPS:
        wanted = _of_best_groups(wanted, groups, TOP_GROUPS, BY_TWO, GROUPS, SIZE)
    wanted = tl.reshape(wanted, (GROUPS * SIZE,))
    scores = tl.reshape(scores, (GROUPS * SIZE,))
    flat = tl.arange(0, GROUPS * SIZE)
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((SLOTS,), tl.int32)
    weights = tl.full((SLOTS,), float("-inf"), tl.float32)
    for number in tl.static_range(TOP_K):
        _, at = tl.max(wanted, axis=0, return_indices=True, return_indices_tie_break_left=True)
        score = tl.max(tl.where(flat == at, scores, float("-inf")), axis=0)
        # Logits that are no numbers must not lead beyond the experts.
        chosen = tl.where(slot == number, tl.minimum(at // SIZE * size + at % SIZE, experts - 1), chosen)
        weights = tl.where(slot == number, score, weights)
        wanted = tl.where(flat == at, float("-inf"), wanted)
    if SCORING == "softmax_of_chosen":
        weights = tl.exp(weights - tl.max(weights, axis=0))
        weights /= tl.sum(weights, axis=0)
    weights = tl.where(slot < TOP_K, weights, 0.0)
    if NORMALIZE:
        weights /= tl.sum(weights, axis=0) + 1e-20
    tl.store(experts_out + row * TOP_K + slot, chosen, mask=slot < TOP_K)
    tl.store(weights_out + row * TOP_K + slot, weights * weight_scale, mask=slot < TOP_K)


@direct_launch
@triton.jit(do_not_specialize=["pairs"])
def _count_kernel(
    chosen,  # [pairs] int32
    counts,  # [experts] int32
    pairs,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    expert = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    wait_for_producer(PDL)
    for start in tl.range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found += (tl.load(chosen + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts + expert, tl.sum(found, axis=0))


@direct_launch
@triton.jit(do_not_specialize=["pairs", "tiles"])
def _group_kernel(
    chosen,  # [pairs] int32
    counts,  # [experts] int32, or anything when not COUNTED
    order,  # [pairs] int32
    tile_experts,  # [tiles] int32
    tile_starts,  # [tiles] int32
    tile_ends,  # [tiles] int32
    pairs,
    tiles,
    experts: tl.constexpr,
    EXPERTS: tl.constexpr,  # power of two >= experts
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_dependents(PDL)
    expert = tl.program_id(0)
    each = tl.arange(0, EXPERTS)
    wait_for_producer(PDL)
    if COUNTED:
        sizes = tl.load(counts + each, mask=each < experts, other=0)
    else:
        at = tl.arange(0, BLOCK)
        sizes = tl.histogram(tl.load(chosen + at, mask=at < pairs, other=0), EXPERTS, mask=at < pairs)
    tile_counts = (sizes + TILE - 1) // TILE
    first = tl.sum(tl.where(each < expert, sizes, 0), axis=0)
    own = tl.sum(tl.where(each == expert, sizes, 0), axis=0)
    first_tile = tl.sum(tl.where(each < expert, tile_counts, 0), axis=0)
    for tile in tl.range(0, (own + TILE - 1) // TILE):
        tl.store(tile_experts + first_tile + tile, expert)
        tl.store(tile_starts + first_tile + tile, first + tile * TILE)
        tl.store(tile_ends + first_tile + tile, first + tl.minimum(tile * TILE + TILE, own))
    if expert == 0:
        used = tl.sum(tile_counts, axis=0)
        for start in tl.range(used, tiles, BLOCK):
            unused = start + tl.arange(0, BLOCK)
            tl.store(tile_experts + unused, tl.full((BLOCK,), -1, tl.int32), mask=unused < tiles)
    placed = first
    for start in tl.range(0, pairs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mine = (tl.load(chosen + at, mask=at < pairs, other=-1) == expert).to(tl.int32)
        tl.store(order + placed + tl.cumsum(mine, axis=0) - 1, at, mask=mine != 0)
        placed += tl.sum(mine, axis=0)


def router_logits(
    x: torch.Tensor, weight: torch.Tensor, rest: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """x (weight + rest)^T + bias in float32.

    Args:
        x: `[T, hidden]` contiguous, T > 0.
        weight: `[experts, hidden]` of x's dtype.
        rest: what the weight lost in that type, alike; None where it lost nothing.
        bias: `[experts]` float32.

    Returns:
        `[T, experts]` float32.
    """
    tokens, (experts, hidden) = x.shape[0], weight.shape
    logits = torch.empty((tokens, experts), dtype=torch.float32, device=x.device)
    if tokens <= ROW_TOKENS:
        _router_rows(x, weight, rest, bias, logits)
        return logits
    few = tokens <= FEW_TOKENS
    rows, columns = (16, 16) if few else (64, 64)
    pdl = pdl_supported(x.device)
    _router_kernel[(ceil_div(experts, columns), ceil_div(tokens, rows))](
        x,
        weight,
        x if rest is None else rest,
        x if bias is None else bias,
        logits,
        tokens,
        experts=experts,
        hidden=hidden,
        TOKENS=rows,
        EXPERTS=columns,
        CHUNK=256 if few and x.itemsize == 2 else 64,
        HAS_REST=rest is not None,
        HAS_BIAS=bias is not None,
        PDL=pdl,
        num_warps=4,
        **launch_options(pdl),
    )
    return logits


def _router_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    rest: torch.Tensor | None,
    bias: torch.Tensor | None,
    logits: torch.Tensor,
) -> None:
    experts, hidden = weight.shape
    padded = next_power_of_2(hidden)
    columns = 4 if padded <= 2048 else 2
    pdl = pdl_supported(x.device)
    _router_row_kernel[(ceil_div(experts, columns), x.shape[0])](
        x,
        weight,
        x if rest is None else rest,
        x if bias is None else bias,
        logits,
        experts=experts,
        hidden=hidden,
        HIDDEN=padded,
        EXPERTS=columns,
        HAS_REST=rest is not None,
        HAS_BIAS=bias is not None,
        PDL=pdl,
        num_warps=4 if padded <= 4096 else 8,
        **launch_options(pdl),
    )


def choose_experts(
    logits: torch.Tensor, correction: torch.Tensor | None, moe: MoeSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's choice; of experts with equal scores the first.

    Args:
        logits: `[T, experts]` float32, T > 0.
        correction: `[experts]` float32, added for the choice only.

    Returns:
        The experts, best first, `[T, top_k]` int32, and what their results are multiplied by, alike in float32.
    """
    tokens, experts = logits.shape
    chosen = torch.empty((tokens, moe.top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((tokens, moe.top_k), dtype=torch.float32, device=logits.device)
    pdl = pdl_supported(logits.device)
    _route_kernel[(tokens,)](
        logits,
        logits if correction is None else correction,
        chosen,
        weights,
        moe.weight_scale,
        experts=experts,
        TOP_K=moe.top_k,
        SLOTS=next_power_of_2(moe.top_k),
        groups=moe.num_groups,
        TOP_GROUPS=moe.top_groups,
        GROUPS=next_power_of_2(moe.num_groups),
        SIZE=next_power_of_2(experts // moe.num_groups),
        BY_TWO=moe.group_score == "top2_sum",
        SCORING=moe.scoring,
        NORMALIZE=moe.normalize,
        HAS_CORRECTION=correction is not None,
        PDL=pdl,
        num_warps=1,
        **launch_options(pdl),
    )
    return chosen, weights


def group_tokens(chosen: torch.Tensor, experts: int, tile: int) -> TokenTiles:
    """Put the pairs of each expert together, in the order of the tokens, without waiting for how many there are.

    Args:
        chosen: `[T, top_k]` int32, T > 0.
        tile: pairs a tile at most.
    """
    pairs, device = chosen.numel(), chosen.device
    most = min(experts, pairs) + pairs // tile
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    tables = torch.empty((3, most), dtype=torch.int32, device=device)
    counted = pairs > COUNTED_ALONE
    block = BLOCK_PAIRS if counted else max(32, next_power_of_2(pairs))
    pdl = pdl_supported(device)
    counts = torch.empty(experts, dtype=torch.int32, device=device) if counted else order
    if counted:
        _count_kernel[(experts,)](chosen, counts, pairs, BLOCK=block, PDL=pdl, num_warps=8, **launch_options(pdl))
    _group_kernel[(experts,)](
        chosen,
        counts,
        order,
        tables[0],
        tables[1],
        tables[2],
        pairs,
        most,
        experts=experts,
        EXPERTS=next_power_of_2(experts),
        TILE=tile,
        BLOCK=block,
        COUNTED=counted,
        PDL=pdl,
        num_warps=8 if counted else 4,
        **launch_options(pdl),
    )
    return TokenTiles(order, tables[0], tables[1], tables[2], tile)
