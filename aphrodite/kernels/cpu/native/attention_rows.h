// What attention kernels of all cache types share: which positions a query row sees, softmax within a tile.
#pragma once
#include <type_traits>

#include "kernels.h"

namespace aph {
namespace {

constexpr int kTileBlocks = kKvTile / kKvBlock;

// What of a tile a query row sees: positions [low, high) of it.
struct Visible {
    int low, high;
};

inline Visible visible(const AttentionShape& shape, const AttentionTask& task, int64_t tile, int query) {
    const int64_t position = task.position + query - tile * kKvTile;
    const int64_t low = shape.window > 0 ? position - shape.window + 1 : 0;
    const int64_t high = position + 1;
    const auto clamp = [](int64_t x) { return static_cast<int>(x < 0 ? 0 : x > kKvTile ? kKvTile : x); };
    return {clamp(low), clamp(high)};
}

// How many lanes' worth of results beside each other stay in registers for so many rows: a power of two.
constexpr int lanes_beside(int rows) {
    int beside = 4;
    while (beside > 1 && rows * beside > kResultVecs) beside /= 2;
    return beside;
}

// Of a simd_*.h that reduces four vectors at once.
void sums_of_four(const Vec (&rows)[4], float* out);
void maxima_of_four(const Vec (&rows)[4], float* out);

// Each row's maximum, and each row's sum in the order of `sum`.
template <int kRows>
inline void maxima(const Vec (&rows)[kRows], float (&out)[kRows]) {
    if constexpr (kRows == 4 && kFoursReduced) maxima_of_four(rows, out);
    else
        for (int r = 0; r < kRows; ++r) out[r] = maximum(rows[r]);
}
template <int kRows>
inline void sums(const Vec (&rows)[kRows], float (&out)[kRows]) {
    if constexpr (kRows == 4 && kFoursReduced) sums_of_four(rows, out);
    else
        for (int r = 0; r < kRows; ++r) out[r] = sum(rows[r]);
}

// Products q.k to weights exp2(score - maximum), 0 where the row does not see; writes the maximum and the sum.
inline void soften(const AttentionShape& shape, float* scores, Visible seen, int blocks, float* maximum_out,
                   float* sum_out) {
    const bool bounded = shape.bound > 0;
    const Vec hidden = splat(-__builtin_inff()), factor = splat(bounded ? kLog2E : shape.scale * kLog2E);
    for (int b = 0; bounded && b < blocks; ++b) {
        float* block = scores + b * kKvBlock;
        store(block, soft_bound(mul(load(block), splat(shape.scale)), shape.bound));
    }
    Vec largest = hidden;
    for (int b = 0; b < blocks; ++b) {
        const int base = b * kKvBlock;
        const Vec x = select_lanes(seen.low - base, seen.high - base, mul(load(scores + base), factor), hidden);
        largest = max(largest, x);
        store(scores + base, x);
    }
    const float top = maximum(largest);
    // Of a row that sees nothing all scores are -inf; with 0 as their maximum all weights become 0.
    const Vec shift = splat(seen.low < seen.high ? top : 0.0f);
    Vec total = zero();
    for (int b = 0; b < blocks; ++b) {
        const Vec p = exp2(sub(load(scores + b * kKvBlock), shift));
        total = add(total, p);
        store(scores + b * kKvBlock, p);
    }
    *maximum_out = top;
    *sum_out = sum(total);
}

// The rows of a step of register tiles, and where in the tile they see anything.
struct RowStep {
    int first, begin, end;
};

inline RowStep row_step(const AttentionShape& shape, const AttentionTask& task, int64_t tile, int first, int rows) {
    const int group = shape.heads / shape.kv_heads;
    RowStep step{first, kKvTile, 0};
    for (int r = first; r < first + rows; ++r) {
        const Visible seen = visible(shape, task, tile, r / group);
        if (seen.low < step.begin) step.begin = seen.low;
        if (seen.high > step.end) step.end = seen.high;
    }
    return step;
}

// Calls f with a compile-time number of rows for steps of 4 rows and the rest.
template <class F>
inline void for_row_steps(int rows, F&& f) {
    int first = 0;
    for (; first + 4 <= rows; first += 4) f(std::integral_constant<int, 4>(), first);
    switch (rows - first) {
        case 3: return f(std::integral_constant<int, 3>(), first);
        case 2: return f(std::integral_constant<int, 2>(), first);
        case 1: return f(std::integral_constant<int, 1>(), first);
        default: return;
    }
}

// Where one kv head's share of a tile's blocks lies, as far as a query sees it; returns how many blocks that is.
inline int tile_blocks(const AttentionShape& shape, const AttentionTask& task, int64_t tile, const char** blocks) {
    const bool latent = shape.turning > 0;
    const int64_t bytes = latent ? latent_block_bytes(shape.kv, shape.head_dim + shape.turning)
                                 : kv_head_bytes(shape.kv, shape.head_dim);
    const int64_t seen = task.position + task.count - tile * kKvTile;
    int count = 0;
    for (; count < kTileBlocks && count * kKvBlock < seen; ++count) {
        const int64_t block = task.blocks[tile * kTileBlocks + count];
        const int64_t index = latent ? block : block * shape.kv_heads + task.kv_head;
        blocks[count] = static_cast<const char*>(task.cache) + index * bytes;
    }
    return count;
}

// A query row's vector, as long as a key.
inline const float* query_row(const AttentionShape& shape, const AttentionTask& task, int row) {
    const int group = shape.heads / shape.kv_heads;
    const int64_t head = task.kv_head * group + row % group;
    return task.q + row / group * shape.q_stride + head * (shape.head_dim + shape.turning);
}

}  // namespace
}  // namespace aph
