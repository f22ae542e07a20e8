// Matrix products of packed rows with tiles of 16 weight rows. Included after a simd_*.h, lane_math.h and rows.h.
//
// Cost: a tile of C columns costs C / 2 16-bit or C / 4 8-bit dot instructions a row, and its bytes once per group
// of rows. Quants are unpacked in registers, once for every kDotRows rows; integer sums of a block of 32 are exact.
#pragma once
#include <utility>

#include "kernels.h"

namespace aph {
namespace {

constexpr int kPrefetchBytes = 4096;

// Groups i and i + 4 of a block's quants.
template <Type kType>
inline void load_groups(const uint8_t* block, int i, Bytes& first, Bytes& second) {
    constexpr TypeInfo info = type_info(kType);
    const uint8_t* quants = block + info.quants_offset();
    if constexpr (info.bits == 8) {
        first = load_bytes(quants + 64 * i);
        second = load_bytes(quants + 64 * (i + 4));
    } else {
        const Bytes raw = load_bytes(quants + 64 * i);
        first = low_nibbles(raw);
        second = high_nibbles(raw);
        if constexpr (info.bits == 5) {
            first = add_fifth_bit(first, block + info.high_offset() + 8 * i);
            second = add_fifth_bit(second, block + info.high_offset() + 8 * (i + 4));
        }
    }
}

// Adds the products of one group of 4 columns; words are the block's, of a group of kWidth rows.
template <Activation kKind, bool kFullRange, int kWidth, int kRows>
inline void dot_group(const Bytes& group, int index, const int32_t* words, IVec* sums) {
    if constexpr (kKind == Activation::Int16) {
        const Shorts even = even_bytes(group), odd = odd_bytes(group);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) sums[m] = dot(sums[m], even, words + 2 * index * kWidth + m);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) sums[m] = dot(sums[m], odd, words + (2 * index + 1) * kWidth + m);
    } else {
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) sums[m] = dot<kFullRange>(sums[m], group, words + index * kWidth + m);
    }
}

constexpr int log2_of(int power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

// Results of kRows rows of a group of kWidth, out[kRows][16].
template <Type kType, Activation kKind, int kWidth, int kRows>
inline void dot_rows(const uint8_t* tile, int64_t blocks, const int32_t* words, const float* meta, float* out) {
    constexpr TypeInfo info = type_info(kType);
    constexpr int kWords = kKind == Activation::Int16 ? 16 : 8;
    Vec result[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) result[m] = zero();
    for (int64_t b = 0; b < blocks; ++b) {
        for (int line = 0; line < info.block_bytes(); line += 64) __builtin_prefetch(tile + kPrefetchBytes + line);
        IVec sums[kRows];
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
            if constexpr (info.offset == 0) sums[m] = izero();
            else sums[m] = splat_shifted<log2_of(info.offset)>(reinterpret_cast<const int32_t*>(meta) + 2 * kWidth + m);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            Bytes first, second;
            load_groups<kType>(tile, i, first, second);
            dot_group<kKind, info.bits == 8, kWidth, kRows>(first, i, words, sums);
            dot_group<kKind, info.bits == 8, kWidth, kRows>(second, i + 4, words, sums);
        }
        const Vec scale = load(reinterpret_cast<const uint16_t*>(tile));
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m)
            result[m] = fma(to_float(sums[m]), mul(scale, splat(meta[m])), result[m]);
        if constexpr (info.minimum) {
            const Vec minimum = load(reinterpret_cast<const uint16_t*>(tile + 32));
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m) result[m] = fma(minimum, splat(meta[kWidth + m]), result[m]);
        }
        tile += info.block_bytes();
        words += kWords * kWidth;
        meta += 3 * kWidth;
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) store(out + 16 * m, result[m]);
}

// Column c of a block as floats of the 16 rows, in the order that byte_to_float reads them.
template <Type kType, class F>
inline void for_each_column(const uint8_t* block, F&& f) {
    constexpr TypeInfo info = type_info(kType);
    if constexpr (!info.quantized) {
        for (int column = 0; column < kBlock; column += 4)
            for (int chain = 0; chain < 4; ++chain) {
                const int64_t at = static_cast<int64_t>(column + chain) * kTileRows;
                if constexpr (kType == Type::F32) f(chain, column + chain, load(reinterpret_cast<const float*>(block) + at));
                else if constexpr (kType == Type::F16)
                    f(chain, column + chain, load(reinterpret_cast<const uint16_t*>(block) + at));
                else f(chain, column + chain, load_bfloat(reinterpret_cast<const uint16_t*>(block) + at));
            }
    } else {
        const Vec scale = load(reinterpret_cast<const uint16_t*>(block));
        const Vec offset = info.minimum ? load(reinterpret_cast<const uint16_t*>(block + 32))
                                        : mul(scale, splat(-static_cast<float>(info.offset)));
        for (int i = 0; i < 4; ++i) {
            Bytes groups[2];
            load_groups<kType>(block, i, groups[0], groups[1]);
            for (int half = 0; half < 2; ++half) {
                const int column = 4 * (i + 4 * half);
                f(0, column, fma(byte_to_float<0>(groups[half]), scale, offset));
                f(1, column + 2, fma(byte_to_float<1>(groups[half]), scale, offset));
                f(2, column + 1, fma(byte_to_float<2>(groups[half]), scale, offset));
                f(3, column + 3, fma(byte_to_float<3>(groups[half]), scale, offset));
            }
        }
    }
}

// The same for float activations: the dequantized weights are exact, four sums a row run side by side.
template <Type kType, int kWidth, int kRows>
inline void float_rows(const uint8_t* tile, int64_t blocks, const float* words, float* out) {
    Vec sums[kRows][4];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m)
        for (int chain = 0; chain < 4; ++chain) sums[m][chain] = zero();
    for (int64_t b = 0; b < blocks; ++b) {
        for_each_column<kType>(tile, [&](int chain, int column, Vec weight) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int m = 0; m < kRows; ++m)
                sums[m][chain] = fma(weight, splat(words[column * kWidth + m]), sums[m][chain]);
        });
        tile += type_info(kType).block_bytes();
        words += kBlock * kWidth;
    }
    for (int m = 0; m < kRows; ++m)
        store(out + 16 * m, add(add(sums[m][0], sums[m][1]), add(sums[m][2], sums[m][3])));
}

// A tile times the group of kWidth rows: out[kWidth][16].
using GroupKernel = void (*)(const uint8_t* tile, int64_t blocks, const int32_t* words, const float* meta, float* out);

template <Type kType, Activation kKind, int kWidth>
void group_kernel(const uint8_t* tile, int64_t blocks, const int32_t* words, const float* meta, float* out) {
    if constexpr (kKind == Activation::Float) {
        constexpr int kRows = kWidth < kFloatRows ? kWidth : kFloatRows;
        for (int m = 0; m < kWidth; m += kRows)
            float_rows<kType, kWidth, kRows>(tile, blocks, reinterpret_cast<const float*>(words) + m, out + 16 * m);
    } else {
        constexpr int kRows = kWidth < kDotRows ? kWidth : kDotRows;
        for (int m = 0; m < kWidth; m += kRows)
            dot_rows<kType, kKind, kWidth, kRows>(tile, blocks, words + m, meta + m, out + 16 * m);
    }
}

template <Type kType, Activation kKind>
GroupKernel kernel_of_width(int width) {
    switch (width) {
        case 8: return group_kernel<kType, kKind, 8>;
        case 4: return group_kernel<kType, kKind, 4>;
        case 2: return group_kernel<kType, kKind, 2>;
        default: return group_kernel<kType, kKind, 1>;
    }
}

template <Type kType>
GroupKernel kernel_of_kind(Activation kind, int width) {
    if constexpr (type_info(kType).quantized) {
        if (kind == Activation::Int16) return kernel_of_width<kType, Activation::Int16>(width);
        if (kind == Activation::Int8) return kernel_of_width<kType, Activation::Int8>(width);
    }
    return kernel_of_width<kType, Activation::Float>(width);
}

GroupKernel find_kernel(Type type, Activation kind, int width) {
    switch (type) {
        case Type::F16: return kernel_of_kind<Type::F16>(kind, width);
        case Type::BF16: return kernel_of_kind<Type::BF16>(kind, width);
        case Type::Q4_0: return kernel_of_kind<Type::Q4_0>(kind, width);
        case Type::Q4_1: return kernel_of_kind<Type::Q4_1>(kind, width);
        case Type::Q5_0: return kernel_of_kind<Type::Q5_0>(kind, width);
        case Type::Q5_1: return kernel_of_kind<Type::Q5_1>(kind, width);
        case Type::Q8_0: return kernel_of_kind<Type::Q8_0>(kind, width);
        default: return kernel_of_kind<Type::F32>(kind, width);
    }
}

inline const int32_t* group_words(const PackedRows& in, int64_t row) { return in.words + row * in.row_words(); }
inline const float* group_meta(const PackedRows& in, int64_t row) { return in.meta + row * in.row_meta(); }

// Adds bias and the old value where asked for; a weight's last tile may end in rows of padding.
inline void write_tile(const float* result, const TileWeight& weight, int64_t tile, const LinearOut& out, int64_t row) {
    const int64_t column = tile * kTileRows;
    const int64_t left = weight.rows - column;
    float* target = out.data + row * out.stride + weight.out_column + column;
    if (left >= kTileRows) {
        Vec value = load(result);
        if (weight.bias != nullptr) value = add(value, load(weight.bias + column));
        if (out.accumulate) value = add(load(target), value);
        store(target, value);
        return;
    }
    for (int64_t i = 0; i < left; ++i) {
        const float value = weight.bias != nullptr ? result[i] + weight.bias[column + i] : result[i];
        target[i] = out.accumulate ? target[i] + value : value;
    }
}

void linear(const PackedRows& in, const TileWeight& weight, Range tiles, Range rows, const LinearOut& out) {
    const int64_t bytes = tile_bytes(weight.type, weight.columns), blocks = weight.columns / kBlock;
    float result[kGroupRows * kTileRows];
    for (int64_t row = rows.begin; row < rows.end;) {
        const int width = group_width(row, in.rows);
        const GroupKernel kernel = find_kernel(weight.type, in.kind, width);
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
            kernel(weight.tiles + tile * bytes, blocks, group_words(in, row), group_meta(in, row), result);
            for (int m = 0; m < width; ++m) write_tile(result + m * kTileRows, weight, tile, out, row + m);
        }
        row += width;
    }
}

inline Vec biased(const float* result, const TileWeight& weight, int64_t tile) {
    const Vec value = load(result);
    return weight.bias == nullptr ? value : add(value, load(weight.bias + tile * kTileRows));
}

// Two tiles of both weights for one group of rows: product[width][32].
inline void gated_block(const GatedPair& pair, int64_t block, int64_t row, int width, float* product) {
    const int64_t blocks = pair.gate.columns / kBlock;
    const GroupKernel gate_kernel = find_kernel(pair.gate.type, pair.gate_in.kind, width);
    const GroupKernel up_kernel = find_kernel(pair.up.type, pair.up_in.kind, width);
    float gates[kGroupRows * kTileRows], ups[kGroupRows * kTileRows];
    for (int64_t tile = 2 * block; tile < 2 * block + 2; ++tile) {
        gate_kernel(pair.gate.tiles + tile * tile_bytes(pair.gate.type, pair.gate.columns), blocks,
                    group_words(pair.gate_in, row), group_meta(pair.gate_in, row), gates);
        up_kernel(pair.up.tiles + tile * tile_bytes(pair.up.type, pair.up.columns), blocks,
                  group_words(pair.up_in, row), group_meta(pair.up_in, row), ups);
        for (int m = 0; m < width; ++m) {
            const Vec gate = biased(gates + m * kTileRows, pair.gate, tile);
            const Vec activated = pair.kind == GateKind::Silu ? silu(gate) : gelu_tanh(gate);
            store(product + m * kBlock + (tile % 2) * kTileRows,
                  mul(activated, biased(ups + m * kTileRows, pair.up, tile)));
        }
    }
}

void gated(const GatedPair& pair, Range blocks, Range rows, const PackedRows* packs, int pack_count) {
    float product[kGroupRows * kBlock];
    for (int64_t row = rows.begin; row < rows.end;) {
        const int width = group_width(row, pair.gate_in.rows);
        for (int64_t block = blocks.begin; block < blocks.end; ++block) {
            gated_block(pair, block, row, width, product);
            for (int i = 0; i < pack_count; ++i) pack_block(product, kBlock, row, block, packs[i]);
        }
        row += width;
    }
}

}  // namespace
}  // namespace aph
