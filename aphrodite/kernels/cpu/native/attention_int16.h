// Attention over one tile of an int16 cache: products of 16-bit integers, exact in 32-bit sums.
//
// Queries and keys have the Euclidean norm 32767, so no sum of theirs exceeds 2^30 (Cauchy-Schwarz). Values are at most
// 8191; softmax weights, multiplied by their position's unit, are scaled to at most 32767 and a sum of at most 2^18 a
// tile. A weight's rounding depends on the row and on what it sees of the tile, never on other rows.
//
// Cost: head_dim / 16 dot instructions per (query row, position), half of what float takes.
#pragma once
#include "attention_rows.h"

namespace aph {
namespace {

// Of all query rows of a task.
struct IntRows {
    int32_t* queries;    // [rows][head_dim / 2] words of two dimensions
    float* query_units;  // [rows]
    int32_t* weights;    // [rows][kKvTile / 2] words of two positions
    float* weight_units;
};

constexpr int kAhead = 4;  // blocks of keys or values between reading and prefetching

// What of the cache a tile reads: words as in KvType::Int16.
struct IntBlocks {
    int count;
    const float* key_units[kTileBlocks];
    const float* value_units[kTileBlocks];
    const int16_t* keys[kTileBlocks];
    const int16_t* values[kTileBlocks];
    // All of it in the order of reading, then the keys of the next tile: blocks are scattered, so that the processor
    // cannot guess what comes next.
    const char* order[2 * kTileBlocks + kAhead];
};

inline IntBlocks int_blocks(const AttentionShape& shape, const AttentionTask& task, int64_t tile) {
    const char* blocks[kTileBlocks];
    IntBlocks in;
    in.count = tile_blocks(shape, task, tile, blocks);
    for (int b = 0; b < in.count; ++b) {
        in.key_units[b] = reinterpret_cast<const float*>(blocks[b]);
        in.value_units[b] = in.key_units[b] + kKvBlock;
        in.keys[b] = reinterpret_cast<const int16_t*>(in.key_units[b] + 2 * kKvBlock);
        in.values[b] = in.keys[b] + shape.head_dim * kKvBlock;
        in.order[b] = blocks[b];
        in.order[in.count + b] = reinterpret_cast<const char*>(in.values[b]);
    }
    const int next = tile + 1 < end_tile(task) ? tile_blocks(shape, task, tile + 1, blocks) : 0;
    for (int i = 0; i < kAhead; ++i) in.order[2 * in.count + i] = i < next ? blocks[i] : in.order[2 * in.count - 1];
    return in;
}

void quantize_queries(const AttentionShape& shape, const AttentionTask& task, const IntRows& out) {
    const int rows = task.count * (shape.heads / shape.kv_heads), head_dim = shape.head_dim;
    for (int r = 0; r < rows; ++r) {
        const float* q = query_row(shape, task, r);
        const float unit = norm_unit(q, head_dim);
        const Vec inverse = inverse_unit(unit);
        int16_t* quants = reinterpret_cast<int16_t*>(out.queries + r * head_dim / 2);
        for (int d = 0; d < head_dim; d += 16) store_shorts(quants + d, to_int(mul(load(q + d), inverse)));
        out.query_units[r] = unit;
    }
}

// Scores of kRows rows with the kBlocks blocks of keys from `block` on.
template <int kRows, int kBlocks, bool kPrefetch>
inline void dot_key_words(const int32_t* queries, const float* query_units, const IntBlocks& in, int block,
                          int head_dim, float* scores) {
    const int16_t* const* keys = in.keys + block;
    IVec sums[kRows][kBlocks];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) sums[r][b] = izero();
    for (int pair = 0; pair < head_dim / 2; ++pair) {
        Shorts k[kBlocks];
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) {
            k[b] = load_shorts(keys[b] + 2 * pair * kKvBlock);
            if constexpr (kPrefetch) __builtin_prefetch(in.order[block + kAhead + b] + 4 * pair * kKvBlock);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int b = 0; b < kBlocks; ++b) sums[r][b] = dot(sums[r][b], k[b], queries + r * head_dim / 2 + pair);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b)
            store(scores + r * kKvTile + (block + b) * kKvBlock,
                  mul(to_float(sums[r][b]), mul(load(in.key_units[block + b]), splat(query_units[r]))));
}

constexpr float kWeightSum = 262000.0f;  // 2^18 less rounding up

// Softmax weights, times the units of their values, to integers of at most `most_together`: words[kKvTile / 2]; returns
// what one stands for.
inline float quantize_weights(float* weights, const float* const* value_units, Visible seen, int blocks,
                              int32_t* words, float most_together = kWeightSum) {
    constexpr float kLargest = 32767.0f;
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
    const float unit = most * most_together > all * kLargest ? most / kLargest : all / most_together;
    const Vec inverse = inverse_unit(unit);
    int16_t* quants = reinterpret_cast<int16_t*>(words);
    for (int b = 0; b < blocks; ++b)
        store_shorts(quants + b * kKvBlock, to_int(mul(load(weights + b * kKvBlock), inverse)));
    return unit;
}

template <int kRows, bool kPrefetch>
void score_int_rows(const AttentionShape& shape, const AttentionTask& task, int64_t tile, int first,
                    const IntBlocks& in, const IntRows& rows, float* scores, float* partial) {
    const int group = shape.heads / shape.kv_heads, head_dim = shape.head_dim;
    const RowStep step = row_step(shape, task, tile, first, kRows);
    const int blocks = (step.end + kKvBlock - 1) / kKvBlock;
    const int32_t* queries = rows.queries + first * head_dim / 2;
    const float* units = rows.query_units + first;
    constexpr int kBlocks = lanes_beside(kRows);
    int b = 0;
    for (; b + kBlocks <= blocks; b += kBlocks)
        dot_key_words<kRows, kBlocks, kPrefetch>(queries, units, in, b, head_dim, scores);
    for (; b < blocks; ++b) dot_key_words<kRows, 1, kPrefetch>(queries, units, in, b, head_dim, scores);
    for (int r = 0; r < kRows; ++r) {
        const Visible seen = visible(shape, task, tile, (first + r) / group);
        float* weights = scores + r * kKvTile;
        float* maximum_and_sum = partial + r * (head_dim + 2) + head_dim;
        soften(shape, weights, seen, blocks, maximum_and_sum, maximum_and_sum + 1);
        rows.weight_units[first + r] = quantize_weights(weights, in.value_units, seen, blocks,
                                                        rows.weights + (first + r) * (kKvTile / 2));
    }
}

// Adds weight * value over pairs of positions [begin, end) for kVecs * 16 dimensions from `column` on.
template <int kRows, int kVecs, bool kPrefetch>
inline void sum_value_words(const int32_t* weights, const float* weight_units, const IntBlocks& in, int begin, int end,
                            int head_dim, int column, float* out) {
    IVec sums[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sums[r][v] = izero();
    for (int pair = begin; pair < end; ++pair) {
        const int block = 2 * pair / kKvBlock, offset = (pair % (kKvBlock / 2) * head_dim + column) * 2;
        const int16_t* value = in.values[block] + offset;
        Shorts x[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
            x[v] = load_shorts(value + 32 * v);
            if constexpr (kPrefetch) __builtin_prefetch(in.order[in.count + block + kAhead] + 2 * offset + 64 * v);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) sums[r][v] = dot(sums[r][v], x[v], weights + r * (kKvTile / 2) + pair);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v)
            store(out + r * (head_dim + 2) + column + 16 * v, mul(to_float(sums[r][v]), splat(weight_units[r])));
}

template <int kRows, bool kPrefetch>
void value_int_rows(const AttentionShape& shape, const AttentionTask& task, int64_t tile, int first,
                    const IntBlocks& in, const IntRows& rows, float* partial) {
    constexpr int kVecs = lanes_beside(kRows);
    const RowStep step = row_step(shape, task, tile, first, kRows);
    const int begin = step.begin / 2, end = (step.end + 1) / 2;
    const int32_t* weights = rows.weights + first * (kKvTile / 2);
    const float* units = rows.weight_units + first;
    int column = 0;
    for (; column + 16 * kVecs <= shape.head_dim; column += 16 * kVecs)
        sum_value_words<kRows, kVecs, kPrefetch>(weights, units, in, begin, end, shape.head_dim, column, partial);
    for (; column < shape.head_dim; column += 16)
        sum_value_words<kRows, 1, kPrefetch>(weights, units, in, begin, end, shape.head_dim, column, partial);
}

// `rows` holds the queries already.
void attend_tile_int16(const AttentionShape& shape, const AttentionTask& task, int64_t tile, const IntRows& rows,
                       float* scores, float* partial) {
    const IntBlocks in = int_blocks(shape, task, tile);
    const int count = task.count * (shape.heads / shape.kv_heads);
    const int64_t stride = shape.head_dim + 2;
    // The first rows bring the cache's lines for the others.
    for_row_steps(count, [&](auto step, int first) {
        constexpr int kRows = decltype(step)::value;
        const auto score = first == 0 ? score_int_rows<kRows, true> : score_int_rows<kRows, false>;
        score(shape, task, tile, first, in, rows, scores + first * kKvTile, partial + first * stride);
    });
    for_row_steps(count, [&](auto step, int first) {
        constexpr int kRows = decltype(step)::value;
        const auto add_values = first == 0 ? value_int_rows<kRows, true> : value_int_rows<kRows, false>;
        add_values(shape, task, tile, first, in, rows, partial + first * stride);
    });
}

}  // namespace
}  // namespace aph
