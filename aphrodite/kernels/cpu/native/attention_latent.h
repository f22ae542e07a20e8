// Attention over latents (DeepSeek-V2's MLA, arXiv 2405.04434, section 2.1.2), included after a simd_*.h and rows.h.
//
// A position has one vector for all heads: a latent of head_dim dimensions, which is the value and the first part of
// the key, and `turning` dimensions of the key behind it. Queries were taken to the latent before ("absorbed"). The
// rest is as in attention.h, which calls this for one tile: partial results, and which sums are exact.
//
// Integers: latent and turning part have a unit each, for either may be much the larger; so have those of a query. The
// Euclidean norms are 32767 but for that of latents, which may be 65000: no sum exceeds 2^31 - 1, even if rounding makes
// both longer by half the root of 100,000 dimensions. A latent's integers are at most 16383, for they are values too, and
// a tile's weights are half of attention_int16.h's together.
// They lie as keys do, in words of two dimensions; as values, words of two positions, they are turned around in the
// first-level cache, 64 dimensions of a tile at a time, for all rows of the task.
//
// Cost: (2 * head_dim + turning) / 32 dot instructions per (query row, position), and head_dim / 16 * 32 shuffles and
// moves per block of positions and task. Floats: (2 * head_dim + turning) / 16 fused multiply-adds.
#pragma once
#include "attention_float.h"
#include "attention_int16.h"

namespace aph {
namespace {

constexpr int kTurnedVecs = kTurnedColumns / 16;

inline int latent_dim(const AttentionShape& shape) { return shape.head_dim + shape.turning; }

// What of the cache a tile reads.
struct LatentBlocks {
    int count;
    const float* units[kTileBlocks];          // of latents
    const float* turning_units[kTileBlocks];
    const int16_t* words[kTileBlocks];
};

inline LatentBlocks latent_blocks(const AttentionShape& shape, const AttentionTask& task, int64_t tile) {
    const char* blocks[kTileBlocks];
    LatentBlocks in;
    in.count = tile_blocks(shape, task, tile, blocks);
    for (int b = 0; b < in.count; ++b) {
        in.units[b] = reinterpret_cast<const float*>(blocks[b]);
        in.turning_units[b] = in.units[b] + kKvBlock;
        in.words[b] = reinterpret_cast<const int16_t*>(in.units[b] + 2 * kKvBlock);
    }
    return in;
}

// One part of a query row to integers; returns what one stands for.
inline float quantize_part(const float* q, int dim, int16_t* quants) {
    const float unit = norm_unit(q, dim);
    const Vec inverse = inverse_unit(unit);
    for (int d = 0; d < dim; d += 16) store_shorts(quants + d, to_int(mul(load(q + d), inverse)));
    return unit;
}

// query_units holds those of the latent parts of all rows, then those of their turning parts.
void quantize_latent_queries(const AttentionShape& shape, const AttentionTask& task, const IntRows& out) {
    const int rows = task.count * (shape.heads / shape.kv_heads), dim = latent_dim(shape);
    for (int r = 0; r < rows; ++r) {
        const float* q = query_row(shape, task, r);
        int16_t* quants = reinterpret_cast<int16_t*>(out.queries + r * dim / 2);
        out.query_units[r] = quantize_part(q, shape.head_dim, quants);
        out.query_units[kMaxQueryRows + r] =
            quantize_part(q + shape.head_dim, shape.turning, quants + shape.head_dim);
    }
}

// Sums of products over `pairs` words of kRows rows with kBlocks blocks of 16 positions.
template <int kRows, int kBlocks>
inline __attribute__((always_inline)) void dot_pairs(const int32_t* queries, int64_t stride,
                                                     const int16_t* const* words, int pairs,
                                                     IVec (&sums)[kRows][kBlocks]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) sums[r][b] = izero();
    for (int pair = 0; pair < pairs; ++pair) {
        Shorts k[kBlocks];
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) k[b] = load_shorts(words[b] + 2 * pair * kKvBlock);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int b = 0; b < kBlocks; ++b) sums[r][b] = dot(sums[r][b], k[b], queries + r * stride + pair);
    }
}

// Scores of kRows rows with the kBlocks blocks from `block` on.
template <int kRows, int kBlocks>
inline void dot_latents(const AttentionShape& shape, const int32_t* queries, const float* query_units,
                        const LatentBlocks& in, int block, float* scores) {
    const int64_t stride = latent_dim(shape) / 2;
    const int16_t* turning[kBlocks];
    for (int b = 0; b < kBlocks; ++b) turning[b] = in.words[block + b] + shape.head_dim * kKvBlock;
    IVec sums[kRows][kBlocks];
    dot_pairs<kRows, kBlocks>(queries, stride, in.words + block, shape.head_dim / 2, sums);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b)
            store(scores + r * kKvTile + (block + b) * kKvBlock,
                  mul(to_float(sums[r][b]), mul(load(in.units[block + b]), splat(query_units[r]))));
    dot_pairs<kRows, kBlocks>(queries + shape.head_dim / 2, stride, turning, shape.turning / 2, sums);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) {
            float* score = scores + r * kKvTile + (block + b) * kKvBlock;
            const Vec unit = mul(load(in.turning_units[block + b]), splat(query_units[kMaxQueryRows + r]));
            store(score, fma(to_float(sums[r][b]), unit, load(score)));
        }
}

// Softmax weights, times the units of their values, to integers: words[kKvTile / 2]; returns what one stands for.
inline float quantize_weights(float* weights, const float* const* value_units, Visible seen, int blocks,
                              int32_t* words) {
    constexpr float kLargest = 32767.0f, kSum = kWeightSum / 2;
    Vec largest = zero(), total = zero();
    for (int b = 0; b < blocks; ++b) {
        const int base = b * kKvBlock;
        // What lies behind the last position seen may not be finite.
        const Vec w = select_lanes(seen.low - base, seen.high - base, mul(load(weights + base), load(value_units[b])),
                                   zero());
        largest = max(largest, w);
        total = add(total, w);
        store(weights + base, w);
    }
    const float most = maximum(largest), all = sum(total);
    // One that is not finite gets a unit that is not either.
    const float unit = most * kSum > all * kLargest ? most / kLargest : all / kSum;
    const Vec inverse = inverse_unit(unit);
    int16_t* quants = reinterpret_cast<int16_t*>(words);
    for (int b = 0; b < blocks; ++b)
        store_shorts(quants + b * kKvBlock, to_int(mul(load(weights + b * kKvBlock), inverse)));
    return unit;
}

template <int kRows>
void score_latent_rows(const AttentionShape& shape, const AttentionTask& task, int64_t tile, int first,
                       const LatentBlocks& in, const IntRows& rows, float* scores, float* partial) {
    const int group = shape.heads / shape.kv_heads;
    const RowStep step = row_step(shape, task, tile, first, kRows);
    const int blocks = (step.end + kKvBlock - 1) / kKvBlock;
    const int32_t* queries = rows.queries + static_cast<int64_t>(first) * latent_dim(shape) / 2;
    constexpr int kBlocks = lanes_beside(kRows);
    int b = 0;
    for (; b + kBlocks <= blocks; b += kBlocks)
        dot_latents<kRows, kBlocks>(shape, queries, rows.query_units + first, in, b, scores);
    for (; b < blocks; ++b) dot_latents<kRows, 1>(shape, queries, rows.query_units + first, in, b, scores);
    for (int r = 0; r < kRows; ++r) {
        const Visible seen = visible(shape, task, tile, (first + r) / group);
        float* weights = scores + r * kKvTile;
        float* maximum_and_sum = partial + r * (shape.head_dim + 2) + shape.head_dim;
        soften(shape, weights, seen, blocks, maximum_and_sum, maximum_and_sum + 1);
        rows.weight_units[first + r] = quantize_weights(weights, in.units, seen, blocks,
                                                        rows.weights + (first + r) * (kKvTile / 2));
    }
}

// Columns [column, column + 16 * vecs) of a tile's latents as words of two positions: [pairs][kTurnedVecs][16].
inline void turn_latents(const LatentBlocks& in, int column, int vecs, int16_t* values) {
    constexpr int kVecShorts = 32, kPairShorts = kTurnedVecs * kVecShorts;
    for (int b = 0; b < in.count; ++b)
        for (int v = 0; v < vecs; ++v)
            transpose_pairs(in.words[b] + (column + 16 * v) * kKvBlock,
                            values + b * (kKvBlock / 2) * kPairShorts + v * kVecShorts, kPairShorts);
}

// Adds weight * value over the first `pairs` pairs of positions, for kVecs * 16 columns.
template <int kRows, int kVecs>
inline void sum_latents(const int32_t* weights, const float* weight_units, const int16_t* values, int pairs, float* out,
                        int64_t out_stride) {
    IVec sums[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sums[r][v] = izero();
    for (int pair = 0; pair < pairs; ++pair) {
        Shorts x[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) x[v] = load_shorts(values + (pair * kTurnedVecs + v) * 32);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) sums[r][v] = dot(sums[r][v], x[v], weights + r * (kKvTile / 2) + pair);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v)
            store(out + r * out_stride + 16 * v, mul(to_float(sums[r][v]), splat(weight_units[r])));
}

// The rows from `first` on, for `vecs` times 16 columns that were turned around.
template <int kRows>
void value_latent_rows(const AttentionShape& shape, const AttentionTask& task, int64_t tile, int first, int vecs,
                       const IntRows& rows, const int16_t* values, float* out) {
    constexpr int kVecs = lanes_beside(kRows);
    const int pairs = (row_step(shape, task, tile, first, kRows).end + 1) / 2;
    const int32_t* weights = rows.weights + first * (kKvTile / 2);
    const float* units = rows.weight_units + first;
    const int64_t stride = shape.head_dim + 2;
    int v = 0;
    for (; v + kVecs <= vecs; v += kVecs)
        sum_latents<kRows, kVecs>(weights, units, values + 32 * v, pairs, out + 16 * v, stride);
    for (; v < vecs; ++v) sum_latents<kRows, 1>(weights, units, values + 32 * v, pairs, out + 16 * v, stride);
}

// `rows` holds the queries already; `values` has room for kKvTile * kTurnedColumns.
void attend_latents_int16(const AttentionShape& shape, const AttentionTask& task, int64_t tile, const IntRows& rows,
                          float* scores, int16_t* values, float* partial) {
    const LatentBlocks in = latent_blocks(shape, task, tile);
    const int count = task.count * (shape.heads / shape.kv_heads);
    const int64_t stride = shape.head_dim + 2;
    for_row_steps(count, [&](auto step, int first) {
        score_latent_rows<decltype(step)::value>(shape, task, tile, first, in, rows, scores + first * kKvTile,
                                                 partial + first * stride);
    });
    for (int column = 0; column < shape.head_dim; column += kTurnedColumns) {
        const int left = shape.head_dim - column, vecs = (left < kTurnedColumns ? left : kTurnedColumns) / 16;
        turn_latents(in, column, vecs, values);
        for_row_steps(count, [&](auto step, int first) {
            value_latent_rows<decltype(step)::value>(shape, task, tile, first, vecs, rows, values,
                                                     partial + first * stride + column);
        });
    }
}

// Scores of kRows rows with kPositions positions; a lane is a dimension.
template <class Element, int kRows, int kPositions>
inline void dot_positions(const float* const* q, const Element* vectors, int dim, float* scores) {
    Vec sums[kRows][kPositions];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < kPositions; ++p) sums[r][p] = zero();
    for (int d = 0; d < dim; d += 16) {
        Vec k[kPositions];
#pragma GCC unroll 8
        for (int p = 0; p < kPositions; ++p) k[p] = load(vectors + p * dim + d);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const Vec x = load(q[r] + d);
#pragma GCC unroll 8
            for (int p = 0; p < kPositions; ++p) sums[r][p] = fma(x, k[p], sums[r][p]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int p = 0; p < kPositions; ++p) scores[r * kKvTile + p] = sum(sums[r][p]);
}

template <class Element, int kRows>
void score_float_latents(const AttentionShape& shape, const AttentionTask& task, int64_t tile, int first,
                         const Element* const* vectors, float* scores, float* partial) {
    constexpr int kPositions = lanes_beside(kRows);  // a power of two, so that it divides a block
    const int group = shape.heads / shape.kv_heads, dim = latent_dim(shape);
    const int blocks = (row_step(shape, task, tile, first, kRows).end + kKvBlock - 1) / kKvBlock;
    const float* q[kRows];
    for (int r = 0; r < kRows; ++r) q[r] = query_row(shape, task, first + r);
    for (int p = 0; p < blocks * kKvBlock; p += kPositions)
        dot_positions<Element, kRows, kPositions>(q, vectors[p / kKvBlock] + p % kKvBlock * dim, dim, scores + p);
    for (int r = 0; r < kRows; ++r) {
        float* maximum_and_sum = partial + r * (shape.head_dim + 2) + shape.head_dim;
        soften(shape, scores + r * kKvTile, visible(shape, task, tile, (first + r) / group), blocks, maximum_and_sum,
               maximum_and_sum + 1);
    }
}

template <class Element, int kRows>
void value_float_latents(const AttentionShape& shape, const AttentionTask& task, int64_t tile, int first,
                         const Element* const* vectors, const float* scores, float* partial) {
    constexpr int kVecs = lanes_beside(kRows);
    const int end = row_step(shape, task, tile, first, kRows).end, dim = latent_dim(shape);
    const int64_t stride = shape.head_dim + 2;
    const Element* shifted[kTileBlocks];
    for (int d = 0; d < shape.head_dim;) {
        for (int b = 0; b * kKvBlock < end; ++b) shifted[b] = vectors[b] + d;
        const bool wide = shape.head_dim - d >= 16 * kVecs;
        if (wide) sum_values<Element, kRows, kVecs>(scores, shifted, 0, end, dim, partial + d, stride);
        else sum_values<Element, kRows, 1>(scores, shifted, 0, end, dim, partial + d, stride);
        d += wide ? 16 * kVecs : 16;
    }
}

template <class Element>
void attend_latents_as(const AttentionShape& shape, const AttentionTask& task, int64_t tile, float* scores,
                       float* partial) {
    const char* blocks[kTileBlocks];
    const Element* vectors[kTileBlocks];
    for (int b = tile_blocks(shape, task, tile, blocks) - 1; b >= 0; --b)
        vectors[b] = reinterpret_cast<const Element*>(blocks[b]);
    const int rows = task.count * (shape.heads / shape.kv_heads);
    const int64_t stride = shape.head_dim + 2;
    for_row_steps(rows, [&](auto count, int first) {
        score_float_latents<Element, decltype(count)::value>(shape, task, tile, first, vectors,
                                                             scores + first * kKvTile, partial + first * stride);
    });
    for_row_steps(rows, [&](auto count, int first) {
        value_float_latents<Element, decltype(count)::value>(shape, task, tile, first, vectors,
                                                             scores + first * kKvTile, partial + first * stride);
    });
}

// Writes one position's vector of latent and turning part into its block.
template <class Element>
void store_latent_as(const float* vector, int dim, Element* block, int offset) {
    for (int d = 0; d < dim; d += 16) store(block + offset * dim + d, load(vector + d));
}

void store_latent(const float* vector, int rank, int turning, KvType type, void* block, int offset) {
    if (type == KvType::Float32) return store_latent_as(vector, rank + turning, static_cast<float*>(block), offset);
    if (type == KvType::Float16) return store_latent_as(vector, rank + turning, static_cast<uint16_t*>(block), offset);
    float* units = static_cast<float*>(block);
    const float by_norm = norm_unit(vector, rank) * (32767.0f / 65000.0f);
    const float by_largest = largest_unit(vector, rank) * (8191.0f / 16383.0f);
    // A value that is not finite makes both so.
    units[offset] = by_norm < by_largest ? by_largest : by_norm;
    units[kKvBlock + offset] = norm_unit(vector + rank, turning);
    const Vec to_latent = inverse_unit(units[offset]), to_turning = inverse_unit(units[kKvBlock + offset]);
    int16_t* words = reinterpret_cast<int16_t*>(units + 2 * kKvBlock) + 2 * offset;
    int16_t quants[16];
    for (int d = 0; d < rank + turning; d += 16) {
        store_shorts(quants, to_int(mul(load(vector + d), d < rank ? to_latent : to_turning)));
        for (int lane = 0; lane < 16; lane += 2) std::memcpy(words + (d + lane) * kKvBlock, quants + lane, 4);
    }
}

}  // namespace
}  // namespace aph
