// Matrix products of packed rows with tiles of 16 weight rows. Included after a simd_*.h, lane_math.h and rows.h.
//
// Cost: a tile of C columns costs C / 2 16-bit or C / 4 8-bit dot instructions a row, and its bytes once per group
// of rows. Quants are unpacked in registers, once for every kDotRows rows; integer sums of a block of 32 are exact.
#pragma once
#include <utility>

#include "kernels.h"

namespace aph {
namespace {

constexpr int kPrefetchBytes = 8192;

// Calls f with the compile-time numbers 0 to kCount - 1.
template <int... kIndices, class F>
inline __attribute__((always_inline)) void unroll(std::integer_sequence<int, kIndices...>, F&& f) {
    (f(std::integral_constant<int, kIndices>()), ...);
}
template <int kCount, class F>
inline __attribute__((always_inline)) void unroll(F&& f) {
    unroll(std::make_integer_sequence<int, kCount>(), f);
}

// Columns of a tile, and of its blocks where the type does not say.
struct BlockShape {
    int64_t columns, group;
};
inline BlockShape block_shape(const TileWeight& weight) { return {weight.columns, weight.group}; }

// Where a block keeps what belongs to 32 of its columns.
struct Step {
    const uint8_t* block;
    const uint8_t* factors;
    const uint8_t* high;
    const uint8_t* quants;
    const float* table = nullptr;  // of a tile whose codes have one
};

template <Type kType>
inline Step step_of(const uint8_t* block, int step) {
    constexpr TypeInfo info = type_info(kType);
    if constexpr (info.grouped()) {
        const uint8_t* high = block + info.factors_offset() + step * info.group_step_bytes();
        return {block, block, high, high + info.high_bytes()};
    }
    return {block, block + info.factors_offset() + step * info.parts() * info.part_bytes(),
            block + info.high_offset() + step * info.high_bytes(),
            block + info.quants_offset() + step * info.quant_bytes()};
}

// The two groups of a pair, as unsigned bytes.
template <Type kType, int kPair>
inline void load_groups(const Step& step, Bytes (&groups)[2]) {
    constexpr TypeInfo info = type_info(kType);
    constexpr int kFirst = pair_group(info, kPair, 0), kSecond = pair_group(info, kPair, 1);
    if constexpr (info.low_bits() == 8) {
        groups[0] = load_bytes(step.quants + 64 * kFirst);
        groups[1] = load_bytes(step.quants + 64 * kSecond);
    } else if constexpr (info.low_bits() == 4) {
        const Bytes raw = load_bytes(step.quants + 64 * kPair);
        groups[0] = low_nibbles(raw);
        groups[1] = high_nibbles(raw);
    } else {
        groups[0] = bit_pairs<2 * (kFirst % 4)>(load_bytes(step.quants + 64 * (kFirst / 4)));
        groups[1] = bit_pairs<2 * (kSecond % 4)>(load_bytes(step.quants + 64 * (kSecond / 4)));
    }
    if constexpr (info.high_bits() == 1) {
        groups[0] = add_bit<1 << info.low_bits()>(groups[0], step.high + 8 * kFirst);
        groups[1] = add_bit<1 << info.low_bits()>(groups[1], step.high + 8 * kSecond);
    } else if constexpr (info.high_bits() == 2) {
        const Bytes pairs = load_bytes(step.high + 64 * (kPair / 2));
        groups[0] = add_pairs<kFirst % 4>(groups[0], pairs);
        groups[1] = add_pairs<kSecond % 4>(groups[1], pairs);
    }
    if constexpr (info.values != nullptr) {
        groups[0] = look_up(groups[0], info.values);
        groups[1] = look_up(groups[1], info.values);
    }
}

inline Vec load_units(const uint8_t* units) { return load(reinterpret_cast<const uint16_t*>(units)); }

// What quants of a part are multiplied by.
template <Type kType>
inline Vec part_scale(const Step& step, int part) {
    constexpr TypeInfo info = type_info(kType);
    const uint8_t* factors = step.factors + part * info.part_bytes();
    if constexpr (info.scales == Scales::Power) return load_power(step.block);
    else if constexpr (info.scales == Scales::SingleGroup) return load(reinterpret_cast<const float*>(step.block));
    else if constexpr (info.scales == Scales::BfloatGroup)
        return load_bfloat(reinterpret_cast<const uint16_t*>(step.block));
    else if constexpr (info.scales == Scales::Signed) return mul(load_units(step.block), load_signed(factors));
    else if constexpr (info.scales == Scales::Pair) return mul(load_units(step.block), load_unsigned(factors));
    else if constexpr (info.scales == Scales::NibblePair) return mul(load_units(step.block), load_low(factors));
    else return load_units(step.block);
}

template <Type kType>
inline Vec part_minimum(const Step& step, int part) {
    constexpr TypeInfo info = type_info(kType);
    const uint8_t* factors = step.factors + part * info.part_bytes();
    if constexpr (info.scales == Scales::Pair) return mul(load_units(step.block + 32), load_unsigned(factors + 16));
    else if constexpr (info.scales == Scales::NibblePair) return mul(load_units(step.block + 32), load_high(factors));
    else if constexpr (info.grouped())
        return mul(part_scale<kType>(step, part), mul(load_unsigned(step.block + info.unit_bytes()), splat(-1.0f)));
    else return load_units(step.block + 32);
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

// Whether paired dots can take the place of some of a type's: they need the sums of a whole block, and in bytes room
// beside the activation.
template <Type kType, Activation kKind>
constexpr bool pairs_dots() {
    constexpr TypeInfo info = type_info(kType);
    if (!kPairedDots || !info.quantized() || kKind == Activation::Float || info.parts() != 1) return false;
    return kKind == Activation::Int16 || info.largest() <= 15;
}

// What paired_dots.h defines, where there are paired dots.
template <Activation kKind, int kFirst, int kSecond, int kRows>
void dot_pair(const Bytes (&groups)[2], const int32_t* words, IVec& own, IVec (&sums)[kRows]);
bool adds_beside_dots();

constexpr int log2_of(int power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

// Adds the products of 32 columns of kRows rows of a group of kWidth to `results`.
template <Type kType, Activation kKind, bool kPaired, int kWidth, int kRows>
inline __attribute__((always_inline)) void dot_step(const Step& step, const int32_t* words, const float* meta,
                                                    Vec (&results)[kRows]) {
    constexpr TypeInfo info = type_info(kType);
    constexpr int kParts = info.parts(), kPairs = 4 / kParts;
    unroll<kParts>([&](auto part) __attribute__((always_inline)) {
        constexpr int kPart = decltype(part)::value;
        const int32_t* negative_sums = reinterpret_cast<const int32_t*>(meta) + (kParts == 1 ? 2 : 3 + kPart) * kWidth;
        IVec sums[kRows], own;
        if constexpr (kPaired) own = izero();
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
            if constexpr (kPaired && info.offset == 0)
                sums[m] = splat_shifted<0>(reinterpret_cast<const int32_t*>(meta) + 5 * kWidth + m);
            else if constexpr (info.offset == 0) sums[m] = izero();
            else sums[m] = splat_shifted<log2_of(info.offset)>(negative_sums + m);
        }
        unroll<kPairs>([&](auto index) __attribute__((always_inline)) {
            constexpr int kPair = kPart * kPairs + decltype(index)::value;
            Bytes groups[2];
            constexpr int kFirst = pair_group(info, kPair, 0), kSecond = pair_group(info, kPair, 1);
            load_groups<kType, kPair>(step, groups);
            if constexpr (kPaired && (kKind == Activation::Int16 || kPair < kPairedBytes)) {
                dot_pair<kKind, kFirst, kSecond>(groups, words, own, sums);
            } else {
                dot_group<kKind, (info.largest() > 128), kWidth, kRows>(groups[0], kFirst, words, sums);
                dot_group<kKind, (info.largest() > 128), kWidth, kRows>(groups[1], kSecond, words, sums);
            }
        });
        if constexpr (kPaired) {
            if constexpr (info.offset != 0)
#pragma GCC unroll 8
                for (int m = 0; m < kRows; ++m)
                    sums[m] = add(sums[m], splat_shifted<0>(reinterpret_cast<const int32_t*>(meta) + 5 * kWidth + m));
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m) sums[m] = sub(sums[m], own);
        }
        const Vec scale = part_scale<kType>(step, kPart);
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m)
            results[m] = fma(to_float(sums[m]), mul(scale, splat(meta[m])), results[m]);
        if constexpr (info.minimum) {
            const Vec minimum = part_minimum<kType>(step, kPart);
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m) {
                if constexpr (kParts == 1) results[m] = fma(minimum, splat(meta[kWidth + m]), results[m]);
                else {
                    const Vec total = mul(to_float(splat_shifted<0>(negative_sums + m)), splat(-meta[m]));
                    results[m] = fma(minimum, total, results[m]);
                }
            }
        }
    });
}

// Results of kRows rows of a group of kWidth, out[kRows][16].
template <Type kType, Activation kKind, bool kPaired, int kWidth, int kRows>
inline void dot_rows(const uint8_t* tile, BlockShape shape, const int32_t* words, const float* meta, float* out) {
    constexpr TypeInfo info = type_info(kType);
    constexpr int kWords = kKind == Activation::Int16 ? 16 : 8;
    constexpr int kStepBytes = info.step_bytes();
    const int64_t block_bytes = info.block_bytes(shape.group);
    const int steps = info.grouped() ? static_cast<int>(shape.group / kBlock) : info.steps();
    Vec results[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) results[m] = zero();
    for (const uint8_t* end = tile + info.tile_bytes(shape.columns, shape.group); tile < end; tile += block_bytes) {
#pragma GCC unroll 1
        for (int i = 0; i < steps; ++i) {
            for (int line = 0; line < kStepBytes; line += 64) bring(tile + i * kStepBytes + kPrefetchBytes + line);
            dot_step<kType, kKind, kPaired, kWidth, kRows>(step_of<kType>(tile, i), words, meta, results);
            words += kWords * kWidth;
            meta += kMeta * kWidth;
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) store(out + 16 * m, results[m]);
}

// Columns of a dense tile's block as floats of the 16 rows: f(chain, column, values).
template <Type kType, class F>
inline void for_each_dense_column(const uint8_t* block, F&& f) {
    for (int column = 0; column < kBlock; column += 4)
        unroll<4>([&](auto chain) __attribute__((always_inline)) {
            const int64_t at = static_cast<int64_t>(column + chain) * kTileRows;
            if constexpr (kType == Type::F32) f(chain, column + chain, load(reinterpret_cast<const float*>(block) + at));
            else if constexpr (kType == Type::F16)
                f(chain, column + chain, load(reinterpret_cast<const uint16_t*>(block) + at));
            else f(chain, column + chain, load_bfloat(reinterpret_cast<const uint16_t*>(block) + at));
        });
}

// The same for 32 columns of floats of 8 bits.
template <Type kType, class F>
inline void for_each_float8_column(const Step& step, F&& f) {
    const Vec scale = mul(part_scale<kType>(step, 0), splat(kFloat8Unit));
    for (int column = 0; column < kBlock; column += 4)
        unroll<4>([&](auto chain) __attribute__((always_inline)) {
            f(chain, column + chain, mul(load_float8(step.quants + (column + chain) * kTileRows), scale));
        });
}

// The same for 32 columns whose codes stand for numbers of a table.
template <Type kType, class F>
inline void for_each_table_column(const Step& step, F&& f) {
    const Table table = load_table(step.table);
    const Vec scale = part_scale<kType>(step, 0);
    unroll<4>([&](auto pair) __attribute__((always_inline)) {
        Bytes groups[2];
        load_groups<kType, decltype(pair)::value>(step, groups);
        for (int which = 0; which < 2; ++which) {
            const int column = 4 * pair_group(type_info(kType), pair, which);
            f(0, column, mul(byte_of_table<0>(groups[which], table), scale));
            f(1, column + 2, mul(byte_of_table<1>(groups[which], table), scale));
            f(2, column + 1, mul(byte_of_table<2>(groups[which], table), scale));
            f(3, column + 3, mul(byte_of_table<3>(groups[which], table), scale));
        }
    });
}

// The same for 32 quantized columns, in the order that byte_to_float reads them.
template <Type kType, class F>
inline void for_each_column(const Step& step, F&& f) {
    constexpr TypeInfo info = type_info(kType);
    constexpr int kPairs = 4 / info.parts();
    unroll<info.parts()>([&](auto part) {
        constexpr int kPart = decltype(part)::value;
        const Vec scale = part_scale<kType>(step, kPart);
        Vec offset;
        if constexpr (info.minimum) offset = part_minimum<kType>(step, kPart);
        else offset = mul(scale, splat(-static_cast<float>(info.offset)));
        unroll<kPairs>([&](auto index) {
            constexpr int kPair = kPart * kPairs + decltype(index)::value;
            Bytes groups[2];
            load_groups<kType, kPair>(step, groups);
            for (int which = 0; which < 2; ++which) {
                const int column = 4 * pair_group(info, kPair, which);
                f(0, column, fma(byte_to_float<0>(groups[which]), scale, offset));
                f(1, column + 2, fma(byte_to_float<1>(groups[which]), scale, offset));
                f(2, column + 1, fma(byte_to_float<2>(groups[which]), scale, offset));
                f(3, column + 3, fma(byte_to_float<3>(groups[which]), scale, offset));
            }
        });
    });
}

// The same for float activations: the dequantized weights are exact, four sums a row run side by side.
template <Type kType, int kWidth, int kRows>
inline void float_rows(const uint8_t* tile, BlockShape shape, const float* words, float* out) {
    constexpr TypeInfo info = type_info(kType);
    const int64_t block_bytes = info.block_bytes(shape.group);
    const int steps = info.grouped() ? static_cast<int>(shape.group / kBlock) : info.steps();
    Vec sums[kRows][4];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m)
        for (int chain = 0; chain < 4; ++chain) sums[m][chain] = zero();
    const auto add_column = [&](int chain, int column, Vec weight) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m)
            sums[m][chain] = fma(weight, splat(words[column * kWidth + m]), sums[m][chain]);
    };
    const float* table = reinterpret_cast<const float*>(tile);
    const uint8_t* end = tile + info.tile_bytes(shape.columns, shape.group);
    for (tile += info.table_bytes(); tile < end; tile += block_bytes)
        for (int i = 0; i < steps; ++i) {
            if constexpr (info.codes == Codes::Float8) {
                for_each_float8_column<kType>(step_of<kType>(tile, i), add_column);
            } else if constexpr (info.codes == Codes::Table) {
                Step step = step_of<kType>(tile, i);
                step.table = table;
                for_each_table_column<kType>(step, add_column);
            } else if constexpr (info.quantized()) for_each_column<kType>(step_of<kType>(tile, i), add_column);
            else for_each_dense_column<kType>(tile, add_column);
            words += kBlock * kWidth;
        }
    for (int m = 0; m < kRows; ++m)
        store(out + 16 * m, add(add(sums[m][0], sums[m][1]), add(sums[m][2], sums[m][3])));
}

// A tile times the group of kWidth rows: out[kWidth][16].
using GroupKernel = void (*)(const uint8_t* tile, BlockShape shape, const int32_t* words, const float* meta, float* out);

template <Type kType, Activation kKind, int kWidth, bool kPaired = false>
void group_kernel(const uint8_t* tile, BlockShape shape, const int32_t* words, const float* meta, float* out) {
    if constexpr (kKind == Activation::Float) {
        constexpr int kRows = kWidth < kFloatRows ? kWidth : kFloatRows;
        for (int m = 0; m < kWidth; m += kRows)
            float_rows<kType, kWidth, kRows>(tile, shape, reinterpret_cast<const float*>(words) + m, out + 16 * m);
    } else {
        constexpr int kRows = kWidth < kDotRows ? kWidth : kDotRows;
        for (int m = 0; m < kWidth; m += kRows)
            dot_rows<kType, kKind, kPaired, kWidth, kRows>(tile, shape, words + m, meta + m, out + 16 * m);
    }
}

template <Type kType, Activation kKind>
GroupKernel kernel_of_width(int width) {
    if constexpr (pairs_dots<kType, kKind>()) {
        if (width == 8 && adds_beside_dots()) return group_kernel<kType, kKind, 8, true>;
    }
    switch (width) {
        case 8: return group_kernel<kType, kKind, 8>;
        case 4: return group_kernel<kType, kKind, 4>;
        case 2: return group_kernel<kType, kKind, 2>;
        default: return group_kernel<kType, kKind, 1>;
    }
}

template <Type kType>
GroupKernel kernel_of_kind(Activation kind, int width) {
    if constexpr (type_info(kType).integers()) {
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
        case Type::Q2_K: return kernel_of_kind<Type::Q2_K>(kind, width);
        case Type::Q3_K: return kernel_of_kind<Type::Q3_K>(kind, width);
        case Type::Q4_K: return kernel_of_kind<Type::Q4_K>(kind, width);
        case Type::Q5_K: return kernel_of_kind<Type::Q5_K>(kind, width);
        case Type::Q6_K: return kernel_of_kind<Type::Q6_K>(kind, width);
        case Type::IQ4_NL: return kernel_of_kind<Type::IQ4_NL>(kind, width);
        case Type::IQ4_XS: return kernel_of_kind<Type::IQ4_XS>(kind, width);
        case Type::MXFP4: return kernel_of_kind<Type::MXFP4>(kind, width);
        case Type::TQ2_0: return kernel_of_kind<Type::TQ2_0>(kind, width);
        case Type::Int4F16: return kernel_of_kind<Type::Int4F16>(kind, width);
        case Type::Int4BF16: return kernel_of_kind<Type::Int4BF16>(kind, width);
        case Type::Int8F16: return kernel_of_kind<Type::Int8F16>(kind, width);
        case Type::Int8BF16: return kernel_of_kind<Type::Int8BF16>(kind, width);
        case Type::Int2F16: return kernel_of_kind<Type::Int2F16>(kind, width);
        case Type::Int2BF16: return kernel_of_kind<Type::Int2BF16>(kind, width);
        case Type::Int3F16: return kernel_of_kind<Type::Int3F16>(kind, width);
        case Type::Int3BF16: return kernel_of_kind<Type::Int3BF16>(kind, width);
        case Type::Int4F32: return kernel_of_kind<Type::Int4F32>(kind, width);
        case Type::Int8F32: return kernel_of_kind<Type::Int8F32>(kind, width);
        case Type::Float8F32: return kernel_of_kind<Type::Float8F32>(kind, width);
        case Type::Table4F16: return kernel_of_kind<Type::Table4F16>(kind, width);
        case Type::Table4F32: return kernel_of_kind<Type::Table4F32>(kind, width);
        default: return kernel_of_kind<Type::F32>(kind, width);
    }
}

inline const int32_t* group_words(const PackedRows& in, int64_t row) { return in.words + row * in.row_words(); }
inline const float* group_meta(const PackedRows& in, int64_t row) { return in.meta + row * in.row_meta(); }

// A tile's result for a row, with the weight's bias and what an adapter adds.
inline Vec completed(const float* result, const TileWeight& weight, int64_t tile, int64_t row) {
    Vec value = load(result);
    if (weight.bias != nullptr) value = add(value, load(weight.bias + tile * kTileRows));
    return weight.adapters == nullptr ? value : adapted(value, *weight.adapters, tile, row);
}

// Adds bias, bounds, and adds the old value where asked for; a weight's last tile may end in rows of padding.
inline void write_tile(const float* result, const TileWeight& weight, int64_t tile, const LinearOut& out, int64_t row) {
    const int64_t column = tile * kTileRows;
    const int64_t left = weight.rows - column;
    float* target = out.data + row * out.stride + weight.out_column + column;
    Vec value = completed(result, weight, tile, row);
    if (out.bound > 0) value = soft_bound(value, out.bound);
    if (left >= kTileRows) {
        store(target, out.accumulate ? add(load(target), value) : value);
        return;
    }
    float values[kTileRows];
    store(values, value);
    for (int64_t i = 0; i < left; ++i) target[i] = out.accumulate ? target[i] + values[i] : values[i];
}

// decoded.h
void decoded_products(const PackedRows& in, const TileWeight& weight, int64_t tile, Range rows, float* results);

// Rows for which a tile is read once: a group, of types that are decoded first as many as decoding should serve.
constexpr int kSpanRows = 64;
inline int64_t span_end(const TileWeight& weight, const PackedRows& in, int64_t row, int64_t end) {
    if (!type_info(weight.type).decoded()) return row + group_width(row, in.rows);
    return row + kSpanRows < end ? row + kSpanRows : end;
}

// Results of a tile for the rows of a span: results[rows][16].
inline void tile_products(const PackedRows& in, const TileWeight& weight, int64_t tile, Range rows, float* results) {
    if (type_info(weight.type).decoded()) return decoded_products(in, weight, tile, rows, results);
    const uint8_t* data = weight.tiles + tile * weight.tile_bytes();
    for (int64_t row = rows.begin; row < rows.end;) {
        const int width = group_width(row, in.rows);
        find_kernel(weight.type, in.kind, width)(data, block_shape(weight), group_words(in, row), group_meta(in, row),
                                                 results + (row - rows.begin) * kTileRows);
        row += width;
    }
}

void linear(const PackedRows& in, const TileWeight& weight, Range tiles, Range rows, const LinearOut& out) {
    float results[kSpanRows * kTileRows];
    for (int64_t row = rows.begin; row < rows.end;) {
        const Range span{row, span_end(weight, in, row, rows.end)};
        for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
            tile_products(in, weight, tile, span, results);
            for (int64_t i = row; i < span.end; ++i)
                write_tile(results + (i - row) * kTileRows, weight, tile, out, i);
        }
        row = span.end;
    }
}

inline Vec gate_values(GateKind kind, Vec gate, Vec up) {
    switch (kind) {
        case GateKind::Silu: return mul(silu(gate), up);
        case GateKind::GeluTanh: return mul(gelu_tanh(gate), up);
        case GateKind::BoundedSwiglu: return bounded_swiglu(gate, up);
    }
    return gate;
}

// Two tiles of both weights for a span of rows: product[rows][32].
inline void gated_block(const GatedPair& pair, int64_t block, Range rows, float* product) {
    float gates[kSpanRows * kTileRows], ups[kSpanRows * kTileRows];
    for (int64_t tile = 2 * block; tile < 2 * block + 2; ++tile) {
        tile_products(pair.gate_in, pair.gate, tile, rows, gates);
        tile_products(pair.up_in, pair.up, tile, rows, ups);
        for (int64_t m = 0; m < rows.end - rows.begin; ++m) {
            store(product + m * kBlock + (tile % 2) * kTileRows,
                  gate_values(pair.kind, completed(gates + m * kTileRows, pair.gate, tile, rows.begin + m),
                              completed(ups + m * kTileRows, pair.up, tile, rows.begin + m)));
        }
    }
}

void gated(const GatedPair& pair, Range blocks, Range rows, const PackedRows* packs, int pack_count) {
    float product[kSpanRows * kBlock];
    for (int64_t row = rows.begin; row < rows.end;) {
        const TileWeight& decoded = type_info(pair.up.type).decoded() ? pair.up : pair.gate;
        const int64_t end = span_end(decoded, pair.gate_in, row, rows.end);
        for (int64_t block = blocks.begin; block < blocks.end; ++block) {
            gated_block(pair, block, {row, end}, product);
            for (int64_t first = row; first < end; first += group_width(first, pair.gate_in.rows))
                for (int i = 0; i < pack_count; ++i)
                    pack_block(product + (first - row) * kBlock, kBlock, first, block, packs[i]);
        }
        row = end;
    }
}

}  // namespace
}  // namespace aph
