// Attention over one tile of an int16 cache: products of 16-bit integers, exact in 32-bit sums.
//
// Queries and keys have at most the Euclidean norm 32767, so no sum of theirs exceeds 2^30 (Cauchy-Schwarz), and no
// integer above 16383. Values are at most 8191; softmax weights, multiplied by their position's unit, are scaled to at
// most 24576 and a sum of at most 2^18 a tile. A weight's rounding depends on the row and on what it sees of the tile,
// never on other rows.
//
// Cost: head_dim / 16 dot instructions per (query row, position), half of what float takes, or two thirds of that time
// where dots are paired; about 30 instructions for 16 weights.
#pragma once
#include "attention_rows.h"

namespace aph {
namespace {

constexpr int64_t kKvUnitBytes = 2 * kKvBlock * sizeof(float);  // of a block, before its keys
constexpr int kAhead = 4;  // blocks of keys or values between reading and prefetching

// What of the cache a tile reads: words as in KvType::Int16.
struct IntBlocks {
    int count;
    const float* key_units[kTileBlocks];
    const float* value_units[kTileBlocks];
    const int16_t* keys[kTileBlocks];
    const int16_t* values[kTileBlocks];
    // Keys and values in the order of reading, then the keys of the next tile, or of the next task's first: blocks are
    // scattered, so that the processor cannot guess what comes next.
    const char* order[2 * kTileBlocks + kAhead];
};

// Of all query rows of a task.
struct IntRows {
    int32_t* queries;       // [rows][head_dim / 2] words of two dimensions
    float* query_units;     // [rows]
    int32_t* weights;       // [rows][kKvTile / 2] words of two positions
    float* weight_units;
    // What paired dots add for rows alone, negated, for the tile's keys and, up to each block, values alone.
    int32_t* query_pairs;   // [rows]
    int32_t* weight_pairs;  // [rows]
    int32_t* key_pairs;     // [kKvTile]
    int32_t* value_pairs;   // [kTileBlocks + 1][head_dim]
    bool paired;            // whether the task's dots are
};

// What paired_attention.h defines, where there are paired dots: those of 6 of 8 neighbouring words are paired.
bool pairs_rows(int rows);
void add_key_pairs(const IntBlocks& in, int head_dim, int32_t* pairs);
void add_value_pairs(const IntBlocks& in, int head_dim, int32_t* pairs);
template <int kRows, int kBlocks>
void dot_key_pairs(const int32_t* queries, const int32_t* query_pairs, const int32_t* key_pairs, const IntBlocks& in,
                   int block, int head_dim, float* scores);
template <int kRows, int kVecs>
void sum_value_pairs(const IntRows& rows, int first, const IntBlocks& in, int begin, int end, int head_dim, int column,
                     float* out);

// Blocks of the tile that is read after `tile`, if it is known which.
inline int next_blocks(const AttentionShape& shape, const AttentionTask& task, int64_t tile, const char** blocks) {
    if (tile + 1 < end_tile(task)) return tile_blocks(shape, task, tile + 1, blocks);
    return task.next == nullptr ? 0 : tile_blocks(shape, *task.next, first_tile(shape, *task.next), blocks);
}

inline IntBlocks int_blocks(const AttentionShape& shape, const AttentionTask& task, int64_t tile) {
    const char* blocks[kTileBlocks];
    IntBlocks in;
    in.count = tile_blocks(shape, task, tile, blocks);
    for (int b = 0; b < in.count; ++b) {
        in.key_units[b] = reinterpret_cast<const float*>(blocks[b]);
        in.value_units[b] = in.key_units[b] + kKvBlock;
        in.keys[b] = reinterpret_cast<const int16_t*>(in.key_units[b] + 2 * kKvBlock);
        in.values[b] = in.keys[b] + shape.head_dim * kKvBlock;
        for (int64_t byte = 0; byte < kKvUnitBytes; byte += 64) bring(blocks[b] + byte);
        in.order[b] = reinterpret_cast<const char*>(in.keys[b]);
        in.order[in.count + b] = reinterpret_cast<const char*>(in.values[b]);
    }
    const int next = next_blocks(shape, task, tile, blocks);
    for (int i = 0; i < kAhead; ++i)
        in.order[2 * in.count + i] = i < next ? blocks[i] + kKvUnitBytes : in.order[2 * in.count - 1];
    return in;
}

void quantize_queries(const AttentionShape& shape, const AttentionTask& task, const IntRows& out) {
    const int rows = task.count * (shape.heads / shape.kv_heads), head_dim = shape.head_dim;
    for (int r = 0; r < rows; ++r) {
        const float* q = query_row(shape, task, r);
        const float unit = key_unit(q, head_dim);
        const Vec inverse = inverse_unit(unit);
        int16_t* words = reinterpret_cast<int16_t*>(out.queries + r * head_dim / 2);
        WordPairs pairs;
        for (int d = 0; d < head_dim; d += 16) {
            const IVec quants = to_int(mul(load(q + d), inverse));
            store_shorts(words + d, quants);
            pairs.add(quants);
        }
        out.query_units[r] = unit;
        out.query_pairs[r] = pairs.negated();
    }
}

// Sums of products of kRows rows with the kBlocks blocks of keys from `block` on, without their units.
template <int kRows, int kBlocks, bool kPrefetch>
inline void dot_key_words(const int32_t* queries, const IntBlocks& in, int block, int head_dim, float* scores) {
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
            if constexpr (kPrefetch) bring(in.order[block + kAhead + b] + 4 * pair * kKvBlock);
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
            store(scores + r * kKvTile + (block + b) * kKvBlock, to_float(sums[r][b]));
}

// What an integer score, times its key's unit, is multiplied by to become the logarithm of a weight.
inline float score_factor(const AttentionShape& shape, float query_unit) {
    return shape.bound > 0 ? kLog2E : query_unit * shape.scale * kLog2E;
}

// Multiplies sums by their keys' units, bounds them where asked for, and finds each row's largest.
template <int kRows, bool kMasked>
inline void finish_scores(const AttentionShape& shape, const Visible (&seen)[kRows], int blocks, const IntBlocks& in,
                          const float* query_units, float* scores, float (&tops)[kRows]) {
    const Vec hidden = splat(-__builtin_inff());
    Vec largest[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
        largest[r] = hidden;
        for (int b = 0; b < blocks; ++b) {
            float* place = scores + r * kKvTile + b * kKvBlock;
            Vec x = mul(load(place), load(in.key_units[b]));
            if (shape.bound > 0) x = soft_bound(mul(x, splat(query_units[r] * shape.scale)), shape.bound);
            store(place, x);
            if constexpr (kMasked) x = select_lanes(seen[r].low - b * kKvBlock, seen[r].high - b * kKvBlock, x, hidden);
            largest[r] = max(largest[r], x);
        }
    }
    maxima(largest, tops);
}

// What a row's softmax weights times the units of their values come to in a tile.
template <int kRows>
struct Weights {
    float total[kRows];  // of weights alone
    float most[kRows], all[kRows];
};

// Scores to weights, times the units of their values.
template <int kRows, bool kMasked>
inline Weights<kRows> weigh(const Visible (&seen)[kRows], int blocks, const IntBlocks& in,
                            const float (&factors)[kRows], const float (&shifts)[kRows], float* scores) {
    Vec total[kRows], most[kRows], all[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
        total[r] = most[r] = all[r] = zero();
        for (int b = 0; b < blocks; ++b) {
            float* place = scores + r * kKvTile + b * kKvBlock;
            const int low = seen[r].low - b * kKvBlock, high = seen[r].high - b * kKvBlock;
            Vec x = fma(load(place), splat(factors[r]), splat(shifts[r]));
            if constexpr (kMasked) x = select_lanes(low, high, x, splat(kLeastPower));
            const Vec p = exp2_of_finite(x);
            Vec w = mul(p, load(in.value_units[b]));
            // What lies behind the last position seen may not be finite.
            if constexpr (kMasked) w = select_lanes(low, high, w, zero());
            total[r] = add(total[r], p);
            most[r] = max(most[r], w);
            all[r] = add(all[r], w);
            store(place, w);
        }
    }
    Weights<kRows> out;
    sums(total, out.total);
    maxima(most, out.most);
    sums(all, out.all);
    return out;
}

constexpr float kWeightSum = 262000.0f;  // 2^18 less rounding up

// What one of a row's integer weights stands for. Not finite if a weight is not.
inline float weight_unit(float most, float all) {
    constexpr float kLargest = kLargestWeight;
    return most * kWeightSum > all * kLargest ? most / kLargest : all / kWeightSum;
}

// Sums of products to integer weights, words[kKvTile / 2] a row, and each row's maximum and sum in `partial`.
template <int kRows, bool kMasked>
inline void soften_int_rows(const AttentionShape& shape, const Visible (&seen)[kRows], int blocks, const IntBlocks& in,
                            const IntRows& rows, int first, float* scores, float* partial) {
    float tops[kRows], factors[kRows], shifts[kRows];
    const float* query_units = rows.query_units + first;
    finish_scores<kRows, kMasked>(shape, seen, blocks, in, query_units, scores, tops);
    for (int r = 0; r < kRows; ++r) {
        factors[r] = score_factor(shape, query_units[r]);
        // Of a row that sees nothing all weights are 0.
        const bool sees = seen[r].low < seen[r].high;
        shifts[r] = sees ? -(tops[r] * factors[r]) : 0.0f;
        partial[r * (shape.head_dim + 2) + shape.head_dim] = sees ? -shifts[r] : -__builtin_inff();
    }
    const Weights<kRows> weights = weigh<kRows, kMasked>(seen, blocks, in, factors, shifts, scores);
    for (int r = 0; r < kRows; ++r) {
        partial[r * (shape.head_dim + 2) + shape.head_dim + 1] = weights.total[r];
        const float unit = weight_unit(weights.most[r], weights.all[r]);
        const Vec inverse = inverse_unit(unit);
        int32_t* words = rows.weights + (first + r) * (kKvTile / 2);
        WordPairs pairs;
        for (int b = 0; b < blocks; ++b) {
            const IVec quants = to_int(mul(load(scores + r * kKvTile + b * kKvBlock), inverse));
            store_shorts(reinterpret_cast<int16_t*>(words) + b * kKvBlock, quants);
            pairs.add(quants);
        }
        rows.weight_units[first + r] = unit;
        rows.weight_pairs[first + r] = pairs.negated();
    }
}

template <int kRows, bool kPrefetch>
void score_int_rows(const AttentionShape& shape, const AttentionTask& task, int64_t tile, int first,
                    const IntBlocks& in, const IntRows& rows, float* scores, float* partial) {
    const int group = shape.heads / shape.kv_heads, head_dim = shape.head_dim;
    const RowStep step = row_step(shape, task, tile, first, kRows);
    const int blocks = (step.end + kKvBlock - 1) / kKvBlock;
    const int32_t* queries = rows.queries + first * head_dim / 2;
    constexpr int kBlocks = lanes_beside(kRows);
    int b = 0;
    if constexpr (kPairedDots && kRows == 4) {
        for (; rows.paired && b + kBlocks <= blocks; b += kBlocks)
            dot_key_pairs<kRows, kBlocks>(queries, rows.query_pairs + first, rows.key_pairs, in, b, head_dim, scores);
    }
    for (; b + kBlocks <= blocks; b += kBlocks)
        dot_key_words<kRows, kBlocks, kPrefetch>(queries, in, b, head_dim, scores);
    for (; b < blocks; ++b) dot_key_words<kRows, 1, kPrefetch>(queries, in, b, head_dim, scores);
    Visible seen[kRows];
    bool masked = false;
    for (int r = 0; r < kRows; ++r) {
        seen[r] = visible(shape, task, tile, (first + r) / group);
        masked = masked || seen[r].low > 0 || seen[r].high < blocks * kKvBlock;
    }
    const auto soften = masked ? soften_int_rows<kRows, true> : soften_int_rows<kRows, false>;
    soften(shape, seen, blocks, in, rows, first, scores, partial);
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
            if constexpr (kPrefetch) bring(in.order[in.count + block + kAhead] + 2 * offset + 64 * v);
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
    if constexpr (kPairedDots && kRows == 4) {
        for (; rows.paired && column + 16 * kVecs <= shape.head_dim; column += 16 * kVecs)
            sum_value_pairs<kRows, kVecs>(rows, first, in, step.begin, step.end, shape.head_dim, column, partial);
    }
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
    // The first to read the cache's lines brings the next ones for the others.
    if constexpr (kPairedDots)
        if (rows.paired) add_key_pairs(in, shape.head_dim, rows.key_pairs);
    for_row_steps(count, [&](auto step, int first) {
        constexpr int kRows = decltype(step)::value;
        const auto score = first == 0 && !rows.paired ? score_int_rows<kRows, true> : score_int_rows<kRows, false>;
        score(shape, task, tile, first, in, rows, scores, partial + first * stride);
    });
    if constexpr (kPairedDots)
        if (rows.paired) add_value_pairs(in, shape.head_dim, rows.value_pairs);
    for_row_steps(count, [&](auto step, int first) {
        constexpr int kRows = decltype(step)::value;
        const auto add_values = first == 0 && !rows.paired ? value_int_rows<kRows, true> : value_int_rows<kRows, false>;
        add_values(shape, task, tile, first, in, rows, partial + first * stride);
    });
}

}  // namespace
}  // namespace aph
