// Attention over the paged cache. Included after a simd_*.h and lane_math.h.
//
// Softmax runs over tiles of 128 positions, counted from position 0 of the sequence: each gives an unnormalised
// output, a maximum and a sum (the online softmax of arXiv 1805.02867), merged in the order of tiles. A query's
// arithmetic is thus the same in decode and prefill and under any split over workers or steps. Keys lie transposed in
// their block, so that a lane is a position in q.k and a dimension in p.v.
//
// Cost: 2 * head_dim / 16 fused multiply-adds per (query row, position); the cache is read once per 4 rows, from L1.
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

template <class Element, int kRows, int kBlocks>
inline void dot_keys(const float* const* q, const Element* const* keys, int head_dim, float* scores) {
    Vec sums[kRows][kBlocks];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) sums[r][b] = zero();
    for (int d = 0; d < head_dim; ++d) {
        Vec k[kBlocks];
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) k[b] = load(keys[b] + d * kKvBlock);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const Vec x = splat(q[r][d]);
#pragma GCC unroll 8
            for (int b = 0; b < kBlocks; ++b) sums[r][b] = fma(x, k[b], sums[r][b]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) store(scores + r * kKvTile + b * kKvBlock, sums[r][b]);
}

// How many lanes' worth of results beside each other stay in registers for so many rows: a power of two.
constexpr int lanes_beside(int rows) {
    int beside = 4;
    while (beside > 1 && rows * beside > kResultVecs) beside /= 2;
    return beside;
}

template <class Element, int kRows>
inline void dot_key_blocks(const float* const* q, const Element* const* keys, int blocks, int head_dim, float* scores) {
    constexpr int kBlocks = lanes_beside(kRows);
    int b = 0;
    for (; b + kBlocks <= blocks; b += kBlocks)
        dot_keys<Element, kRows, kBlocks>(q, keys + b, head_dim, scores + b * kKvBlock);
    for (; b < blocks; ++b) dot_keys<Element, kRows, 1>(q, keys + b, head_dim, scores + b * kKvBlock);
}

// Adds p.v over positions [begin, end) for kVecs * 16 dimensions; values point at each block's first such dimension.
template <class Element, int kRows, int kVecs>
inline void sum_values(const float* p, const Element* const* values, int begin, int end, int head_dim, float* out,
                       int64_t out_stride) {
    Vec sums[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sums[r][v] = zero();
    for (int j = begin; j < end; ++j) {
        const Element* value = values[j / kKvBlock] + (j % kKvBlock) * head_dim;
        Vec x[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) x[v] = load(value + 16 * v);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const Vec weight = splat(p[r * kKvTile + j]);
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) sums[r][v] = fma(weight, x[v], sums[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) store(out + r * out_stride + 16 * v, sums[r][v]);
}

template <class Element, int kRows>
inline void sum_value_blocks(const float* p, const Element* const* values, int begin, int end, int head_dim,
                             float* out, int64_t out_stride) {
    constexpr int kVecs = lanes_beside(kRows);
    const Element* shifted[kTileBlocks];
    for (int d = 0; d < head_dim;) {
        for (int b = begin / kKvBlock; b * kKvBlock < end; ++b) shifted[b] = values[b] + d;
        const bool wide = head_dim - d >= 16 * kVecs;
        if (wide) sum_values<Element, kRows, kVecs>(p, shifted, begin, end, head_dim, out + d, out_stride);
        else sum_values<Element, kRows, 1>(p, shifted, begin, end, head_dim, out + d, out_stride);
        d += wide ? 16 * kVecs : 16;
    }
}

// Scores to weights exp2(scale * score - maximum), 0 where the row does not see; writes the maximum and the sum.
inline void soften(float* scores, Visible seen, int blocks, float scale, float* maximum_out, float* sum_out) {
    const Vec hidden = splat(-__builtin_inff()), factor = splat(scale);
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

template <class Element, int kRows>
void score_rows(const AttentionShape& shape, const AttentionTask& task, int64_t tile, int first,
                const Element* const* keys, float* scores, float* partial) {
    const int group = shape.heads / shape.kv_heads, head_dim = shape.head_dim;
    const RowStep step = row_step(shape, task, tile, first, kRows);
    const int blocks = (step.end + kKvBlock - 1) / kKvBlock;
    const float* q[kRows];
    for (int r = 0; r < kRows; ++r) {
        const int query = (first + r) / group, head = task.kv_head * group + (first + r) % group;
        q[r] = task.q + query * shape.q_stride + static_cast<int64_t>(head) * head_dim;
    }
    dot_key_blocks<Element, kRows>(q, keys, blocks, head_dim, scores);
    for (int r = 0; r < kRows; ++r) {
        float* maximum_and_sum = partial + r * (head_dim + 2) + head_dim;
        soften(scores + r * kKvTile, visible(shape, task, tile, (first + r) / group), blocks, shape.scale * kLog2E,
               maximum_and_sum, maximum_and_sum + 1);
    }
}

template <class Element, int kRows>
void value_rows(const AttentionShape& shape, const AttentionTask& task, int64_t tile, int first,
                const Element* const* values, const float* scores, float* partial) {
    const RowStep step = row_step(shape, task, tile, first, kRows);
    sum_value_blocks<Element, kRows>(scores, values, step.begin, step.end, shape.head_dim, partial,
                                     shape.head_dim + 2);
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

// All keys of the tile are read before its values: either fits the first-level cache, both may not.
template <class Element>
void attend_tile_as(const AttentionShape& shape, const AttentionTask& task, int64_t tile, float* scratch,
                    float* partial) {
    const Element* keys[kTileBlocks];
    const Element* values[kTileBlocks];
    const int64_t seen = task.position + task.count - tile * kKvTile;
    const int64_t block_size = 2 * static_cast<int64_t>(shape.head_dim) * kKvBlock;
    for (int b = 0; b < kTileBlocks && b * kKvBlock < seen; ++b) {
        const int64_t block = task.blocks[tile * kTileBlocks + b];
        keys[b] = static_cast<const Element*>(task.cache) + block * shape.block_stride + task.kv_head * block_size;
        values[b] = keys[b] + block_size / 2;
    }
    const int rows = task.count * (shape.heads / shape.kv_heads);
    const int64_t stride = shape.head_dim + 2;
    for_row_steps(rows, [&](auto count, int first) {
        score_rows<Element, decltype(count)::value>(shape, task, tile, first, keys, scratch + first * kKvTile,
                                                    partial + first * stride);
    });
    for_row_steps(rows, [&](auto count, int first) {
        value_rows<Element, decltype(count)::value>(shape, task, tile, first, values, scratch + first * kKvTile,
                                                    partial + first * stride);
    });
}

void attend_tile(const AttentionShape& shape, const AttentionTask& task, int64_t tile, float* scratch,
                 float* partial) {
    if (shape.half) attend_tile_as<uint16_t>(shape, task, tile, scratch, partial);
    else attend_tile_as<float>(shape, task, tile, scratch, partial);
}

// Merges a row's partial into the running one; a tile of which the row sees nothing changes no bit.
inline void merge_row(float* running, const float* partial, int head_dim) {
    const float top = partial[head_dim];
    if (top == -__builtin_inff()) return;
    const float old_top = running[head_dim];
    const float new_top = top < old_top ? old_top : top;
    const Vec keep = exp2(splat(old_top - new_top)), gain = exp2(splat(top - new_top));
    for (int d = 0; d < head_dim; d += 16)
        store(running + d, fma(load(partial + d), gain, mul(load(running + d), keep)));
    float factors[16];
    store(factors, keep);
    const float kept = running[head_dim + 1] * factors[0];
    store(factors, gain);
    running[head_dim + 1] = kept + partial[head_dim + 1] * factors[0];
    running[head_dim] = new_top;
}

inline void start_rows(float* running, int rows, int head_dim) {
    const int64_t stride = head_dim + 2;
    for (int64_t i = 0; i < rows * stride; ++i) running[i] = 0;
    for (int r = 0; r < rows; ++r) running[r * stride + head_dim] = -__builtin_inff();
}

inline void finish_rows(const AttentionShape& shape, const AttentionTask& task, const float* running) {
    const int group = shape.heads / shape.kv_heads;
    for (int r = 0; r < task.count * group; ++r) {
        const float* row = running + r * (static_cast<int64_t>(shape.head_dim) + 2);
        const int64_t head = task.kv_head * group + r % group;
        float* out = task.out + r / group * shape.out_stride + head * shape.head_dim;
        const Vec inverse = splat(1.0f / row[shape.head_dim + 1]);
        for (int d = 0; d < shape.head_dim; d += 16) store(out + d, mul(load(row + d), inverse));
    }
}

void attend(const AttentionShape& shape, const AttentionTask& task, float* scratch) {
    const int rows = task.count * (shape.heads / shape.kv_heads);
    const int64_t stride = shape.head_dim + 2;
    float* partial = scratch + kMaxQueryRows * kKvTile;
    float* running = partial + kMaxQueryRows * stride;
    start_rows(running, rows, shape.head_dim);
    for (int64_t tile = first_tile(shape, task); tile < end_tile(task); ++tile) {
        attend_tile(shape, task, tile, scratch, partial);
        for (int r = 0; r < rows; ++r) merge_row(running + r * stride, partial + r * stride, shape.head_dim);
    }
    finish_rows(shape, task, running);
}

void merge_tiles(const AttentionShape& shape, const AttentionTask& task, const float* partials, int64_t stride,
                 int64_t tiles, float* running) {
    const int rows = task.count * (shape.heads / shape.kv_heads);
    const int64_t row_stride = shape.head_dim + 2;
    start_rows(running, rows, shape.head_dim);
    for (int64_t tile = 0; tile < tiles; ++tile)
        for (int r = 0; r < rows; ++r)
            merge_row(running + r * row_stride, partials + tile * stride + r * row_stride, shape.head_dim);
    finish_rows(shape, task, running);
}

}  // namespace
}  // namespace aph
