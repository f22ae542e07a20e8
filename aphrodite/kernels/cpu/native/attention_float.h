// Attention over one tile of a float cache: f32 or f16.
//
// Cost: 2 * head_dim / 16 fused multiply-adds per (query row, position); the cache is read once per 4 rows, from L1.
#pragma once
#include "attention_rows.h"

namespace aph {
namespace {

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

template <class Element, int kRows>
void score_rows(const AttentionShape& shape, const AttentionTask& task, int64_t tile, int first,
                const Element* const* keys, float* scores, float* partial) {
    const int group = shape.heads / shape.kv_heads, head_dim = shape.head_dim;
    const RowStep step = row_step(shape, task, tile, first, kRows);
    const int blocks = (step.end + kKvBlock - 1) / kKvBlock;
    const float* q[kRows];
    for (int r = 0; r < kRows; ++r) q[r] = query_row(shape, task, first + r);
    dot_key_blocks<Element, kRows>(q, keys, blocks, head_dim, scores);
    for (int r = 0; r < kRows; ++r) {
        float* maximum_and_sum = partial + r * (head_dim + 2) + head_dim;
        soften(shape, scores + r * kKvTile, visible(shape, task, tile, (first + r) / group), blocks, maximum_and_sum,
               maximum_and_sum + 1);
    }
}

template <class Element, int kRows>
void value_rows(const AttentionShape& shape, const AttentionTask& task, int64_t tile, int first,
                const Element* const* values, const float* scores, float* partial) {
    const RowStep step = row_step(shape, task, tile, first, kRows);
    sum_value_blocks<Element, kRows>(scores, values, step.begin, step.end, shape.head_dim, partial,
                                     shape.head_dim + 2);
}

// All keys of the tile are read before its values: either fits the first-level cache, both may not.
template <class Element>
void attend_tile_as(const AttentionShape& shape, const AttentionTask& task, int64_t tile, float* scores,
                    float* partial) {
    const char* blocks[kTileBlocks];
    const Element* keys[kTileBlocks];
    const Element* values[kTileBlocks];
    for (int b = tile_blocks(shape, task, tile, blocks) - 1; b >= 0; --b) {
        keys[b] = reinterpret_cast<const Element*>(blocks[b]);
        values[b] = keys[b] + shape.head_dim * kKvBlock;
    }
    const int rows = task.count * (shape.heads / shape.kv_heads);
    const int64_t stride = shape.head_dim + 2;
    for_row_steps(rows, [&](auto count, int first) {
        score_rows<Element, decltype(count)::value>(shape, task, tile, first, keys, scores + first * kKvTile,
                                                    partial + first * stride);
    });
    for_row_steps(rows, [&](auto count, int first) {
        value_rows<Element, decltype(count)::value>(shape, task, tile, first, values, scores + first * kKvTile,
                                                    partial + first * stride);
    });
}

}  // namespace
}  // namespace aph
