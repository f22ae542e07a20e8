// Paired dots (paired_dots.h) in attention over an int16 cache. Included after simd_avx512.h and attention.h.
//
// Of 8 neighbouring words the dots of 6 are paired. What belongs to keys and values alone is summed up once a tile,
// what belongs to queries and weights once a row, so that pairing pays from some rows on.
#pragma once
#include "attention_int16.h"
#include "paired_dots.h"

namespace aph {
namespace {

constexpr int kPairedRows = 8;   // of a task, from which on pairing pays
constexpr int kPairedWords = 6;  // of 8

bool pairs_rows(int rows) { return rows >= kPairedRows && adds_beside_dots(); }

// f(word) for the first of every two paired words among the 8 from `word` on.
template <class F>
inline __attribute__((always_inline)) void for_paired_words(int word, F&& f) {
#pragma GCC unroll 8
    for (int i = 0; i < kPairedWords; i += 2) f(word + i);
}

inline IVec load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_ints(int32_t* p, IVec a) { _mm512_storeu_si512(p, a.v); }

// pairs[kKvTile]
void add_key_pairs(const IntBlocks& in, int head_dim, int32_t* pairs) {
    for (int b = 0; b < in.count; ++b) {
        IVec sum = izero();
        for (int word = 0; word < head_dim / 2; word += 8) {
            for (int line = word; line < word + 8; ++line) bring(in.order[b + kAhead] + 64 * line);
            for_paired_words(word, [&](int i) {
                const int16_t* keys = in.keys[b] + 2 * i * kKvBlock;
                sum = dot(sum, load_shorts(keys), load_shorts(keys + 2 * kKvBlock));
            });
        }
        store_ints(pairs + b * kKvBlock, sum);
    }
}

// pairs[kTileBlocks + 1][head_dim], of all blocks before
void add_value_pairs(const IntBlocks& in, int head_dim, int32_t* pairs) {
    for (int d = 0; d < head_dim; d += 16) store_ints(pairs + d, izero());
    for (int b = 0; b < in.count; ++b, pairs += head_dim)
        for (int d = 0; d < head_dim; d += 16) {
            IVec sum = load_ints(pairs + d);
            for (int line = 0; line < 8; ++line)
                bring(in.order[in.count + b + kAhead] + 4 * (line * head_dim + d));
            for_paired_words(0, [&](int i) {
                const int16_t* values = in.values[b] + (i * head_dim + d) * 2;
                sum = dot(sum, load_shorts(values), load_shorts(values + 2 * head_dim));
            });
            store_ints(pairs + head_dim + d, sum);
        }
}

// sums[r][v] += the dots of 8 words of rows, [kRows][stride], with vectors at `vectors` + v * width + word * step.
template <int kRows, int kVecs>
inline __attribute__((always_inline)) void dot_eight_words(const int32_t* words, int stride,
                                                           const int16_t* const (&vectors)[kVecs], int step,
                                                           IVec (&sums)[kRows][kVecs]) {
    for_paired_words(0, [&](int i) __attribute__((always_inline)) {
        Shorts first[kVecs], second[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) {
            first[v] = load_shorts(vectors[v] + i * step);
            second[v] = load_shorts(vectors[v] + (i + 1) * step);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v)
                sums[r][v] = dot(sums[r][v], add_word(first[v], words + r * stride + i + 1),
                                 add_word(second[v], words + r * stride + i));
    });
#pragma GCC unroll 8
    for (int i = kPairedWords; i < 8; ++i) {
        Shorts x[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) x[v] = load_shorts(vectors[v] + i * step);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) sums[r][v] = dot(sums[r][v], x[v], words + r * stride + i);
    }
}

template <int kRows, int kBlocks>
void dot_key_pairs(const int32_t* queries, const int32_t* query_pairs, const int32_t* key_pairs, const IntBlocks& in,
                   int block, int head_dim, float* scores) {
    IVec sums[kRows][kBlocks];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) sums[r][b] = splat_shifted<0>(query_pairs + r);
    const int16_t* keys[kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) keys[b] = in.keys[block + b];
    for (int word = 0; word < head_dim / 2; word += 8) {
        dot_eight_words<kRows, kBlocks>(queries + word, head_dim / 2, keys, 2 * kKvBlock, sums);
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) keys[b] += 8 * 2 * kKvBlock;
    }
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
        const IVec own = load_ints(key_pairs + (block + b) * kKvBlock);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
            store(scores + r * kKvTile + (block + b) * kKvBlock, to_float(sub(sums[r][b], own)));
    }
}

// Over all positions of the blocks of [begin, end): the weights of those that a row does not see are 0.
template <int kRows, int kVecs>
void sum_value_pairs(const IntRows& rows, int first, const IntBlocks& in, int begin, int end, int head_dim, int column,
                     float* out) {
    const int32_t* weights = rows.weights + first * (kKvTile / 2);
    IVec sums[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) sums[r][v] = splat_shifted<0>(rows.weight_pairs + first + r);
    const int end_block = (end + kKvBlock - 1) / kKvBlock;
    const int first_block = begin < end ? begin / kKvBlock : end_block;
    for (int b = first_block; b < end_block; ++b) {
        const int16_t* values[kVecs];
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) values[v] = in.values[b] + (column + 16 * v) * 2;
        dot_eight_words<kRows, kVecs>(weights + b * (kKvBlock / 2), kKvTile / 2, values, 2 * head_dim, sums);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
        const int32_t* own = rows.value_pairs + column + 16 * v;
        const IVec sum = sub(load_ints(own + end_block * head_dim), load_ints(own + first_block * head_dim));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
            store(out + r * (head_dim + 2) + column + 16 * v,
                  mul(to_float(sub(sums[r][v], sum)), splat(rows.weight_units[first + r])));
    }
}

}  // namespace
}  // namespace aph
