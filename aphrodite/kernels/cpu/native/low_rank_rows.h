// Kernels of adapters (low_rank.h). Included after a simd_*.h and rows.h.
//
// Cost: 2 * rank * (in + out) operations a row; the pair's bytes are read once for every block of rows (A), and once for
// every row (B), whose 16-row tiles stay in the cache beside the weight's. Of a row every value is summed in one order.
#pragma once
#include "kernels.h"

namespace aph {
namespace {

template <Type kType>
inline Vec load_dense(const void* values, int64_t at) {
    if constexpr (kType == Type::F32) return load(static_cast<const float*>(values) + at);
    else if constexpr (kType == Type::F16) return load(static_cast<const uint16_t*>(values) + at);
    else return load_bfloat(static_cast<const uint16_t*>(values) + at);
}

// First row of the group that a row belongs to.
inline int64_t group_begin(int64_t row, int64_t rows) {
    int64_t begin = row / kGroupRows * kGroupRows;
    while (row >= begin + group_width(begin, rows)) begin += group_width(begin, rows);
    return begin;
}

// The values that a packed row stands for.
inline void unpack_row(const PackedRows& in, int64_t row, float* out) {
    const int64_t begin = group_begin(row, in.rows), m = row - begin;
    const int width = group_width(begin, in.rows);
    const int32_t* words = in.words + begin * in.row_words() + m;
    if (in.kind == Activation::Float) {
        for (int64_t i = 0; i < in.columns; ++i) std::memcpy(out + i, words + i * width, sizeof *out);
        return;
    }
    const float* meta = in.meta + begin * in.row_meta() + m;
    const bool shorts = in.kind == Activation::Int16;
    const int64_t count = shorts ? 16 : 8;  // words of a block
    for (int64_t block = 0; block < in.columns / kBlock; ++block) {
        const float scale = meta[block * kMeta * width];
        const int32_t* own = words + block * count * width;
        float* values = out + block * kBlock;
        if (shorts) {
            for (int i = 0; i < 16; ++i) {
                const int32_t word = own[i * width];
                values[2 * i] = scale * static_cast<float>(static_cast<int16_t>(word));
                values[2 * i + 1] = scale * static_cast<float>(word >> 16);
            }
        } else {  // bytes of a word hold columns 0 2 1 3
            for (int i = 0; i < 8; ++i) {
                const int32_t word = own[i * width];
                values[4 * i] = scale * static_cast<float>(static_cast<int8_t>(word));
                values[4 * i + 2] = scale * static_cast<float>(static_cast<int8_t>(word >> 8));
                values[4 * i + 1] = scale * static_cast<float>(static_cast<int8_t>(word >> 16));
                values[4 * i + 3] = scale * static_cast<float>(word >> 24);
            }
        }
    }
}

// Products of rows of A with kRows rows x[kRows][columns].
template <Type kType, int kRows>
inline void shrink_rows(const LowRank& pair, int64_t columns, Range ranks, const float* x, const AdapterBlock& block,
                        float* low, int64_t width) {
    for (int64_t rank = ranks.begin; rank < ranks.end; ++rank) {
        Vec even[kRows], odd[kRows];
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) even[m] = odd[m] = zero();
        for (int64_t i = 0; i < columns; i += 32) {
            const Vec a = load_dense<kType>(pair.a, rank * columns + i);
            const Vec b = load_dense<kType>(pair.a, rank * columns + i + 16);
#pragma GCC unroll 4
            for (int m = 0; m < kRows; ++m) {
                even[m] = fma(a, load(x + m * columns + i), even[m]);
                odd[m] = fma(b, load(x + m * columns + i + 16), odd[m]);
            }
        }
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) low[block.rows[m] * width + rank] = pair.scale * sum(add(even[m], odd[m]));
    }
}

template <Type kType>
inline void shrink_block(const LowRank& pair, int64_t columns, Range ranks, const float* x, const AdapterBlock& block,
                         float* low, int64_t width) {
    switch (block.count) {
        case 4: return shrink_rows<kType, 4>(pair, columns, ranks, x, block, low, width);
        case 3: return shrink_rows<kType, 3>(pair, columns, ranks, x, block, low, width);
        case 2: return shrink_rows<kType, 2>(pair, columns, ranks, x, block, low, width);
        default: return shrink_rows<kType, 1>(pair, columns, ranks, x, block, low, width);
    }
}

void shrink(const PackedRows& in, const LowRank& pair, Range ranks, const AdapterBlock& block, float* scratch,
            float* low, int64_t width) {
    for (int m = 0; m < block.count; ++m) unpack_row(in, block.rows[m], scratch + m * in.columns);
    switch (static_cast<Type>(pair.type)) {
        case Type::F16: return shrink_block<Type::F16>(pair, in.columns, ranks, scratch, block, low, width);
        case Type::BF16: return shrink_block<Type::BF16>(pair, in.columns, ranks, scratch, block, low, width);
        default: return shrink_block<Type::F32>(pair, in.columns, ranks, scratch, block, low, width);
    }
}

template <Type kType>
inline Vec expand_tile(const LowRank& pair, const float* low, int64_t tile) {
    Vec a = zero(), b = zero(), c = zero(), d = zero();
    const int64_t first = tile * pair.rank * kTileRows;
    const auto add_rank = [&](Vec& part, int64_t rank) __attribute__((always_inline)) {
        part = fma(load_dense<kType>(pair.b, first + rank * kTileRows), splat(low[rank]), part);
    };
    int64_t rank = 0;
    for (; rank + 4 <= pair.rank; rank += 4) {
        add_rank(a, rank);
        add_rank(b, rank + 1);
        add_rank(c, rank + 2);
        add_rank(d, rank + 3);
    }
    for (; rank < pair.rank; ++rank) add_rank(a, rank);
    return add(add(a, b), add(c, d));
}

// `value`, sixteen columns of a row's product, with what the row's adapter adds to them.
inline Vec adapted(Vec value, const AdapterRows& adapters, int64_t tile, int64_t row) {
    const int32_t slot = adapters.slots[row];
    if (slot < 0) return value;
    const LowRank& pair = adapters.pairs[slot * adapters.stride];
    if (pair.b == nullptr) return value;
    const float* low = adapters.low + row * adapters.width;
    switch (static_cast<Type>(pair.type)) {
        case Type::F16: return add(value, expand_tile<Type::F16>(pair, low, tile));
        case Type::BF16: return add(value, expand_tile<Type::BF16>(pair, low, tile));
        default: return add(value, expand_tile<Type::F32>(pair, low, tile));
    }
}

}  // namespace
}  // namespace aph
