// Products with blocks that are decoded as a whole (grids.h). Included after a simd_*.h and rows.h.
//
// Cost: decoding 32 columns of a tile takes about 80 vector instructions and the looking up of 64 or 128 points, once for
// up to kSpanRows rows of activations; then a product costs what one of 8-bit quants does. A single group of rows is
// multiplied as steps are decoded, which keeps all units of the processor busy.
#pragma once
#include "grids.h"

namespace aph {
namespace {

// 256 columns of 16 rows, decoded (`decode_step`).
struct DecodedBlock {
    alignas(64) uint8_t quants[kGridSteps][8][64];
    alignas(64) float scales[2 * kGridSteps][kTileRows];
};

// The sign planes of 32 columns whose last signs are implied: completes them, and returns the bits in their places, a
// nibble a row.
inline uint64_t complete_signs(uint64_t (&planes)[8]) {
    constexpr uint64_t kOnes = 0x1111111111111111, kKept = 7 * kOnes;
    uint64_t nibbles = 0;
    for (int point = 0; point < 4; ++point) {
        uint64_t &first = planes[2 * point], &last = planes[2 * point + 1];
        nibbles |= last >> (3 - point) & kOnes << point;
        uint64_t parity = first ^ (last & kKept);
        parity ^= parity >> 2;
        parity ^= parity >> 1;
        last = (last & kKept) | (parity & kOnes) << 3;
    }
    return nibbles;
}

// The numbers of 64 points: those in even bytes of the indices' words, then the others'.
template <Type kType>
inline __attribute__((always_inline)) void point_numbers(const uint8_t* block, int plane, const Bytes& upper, Shorts (&numbers)[2]) {
    constexpr GridInfo grid = grid_info(kType);
    const Bytes low = load_bytes(block + kUnitBytes + 64 * plane);
    if constexpr (grid.upper_bits == 0) {
        numbers[0] = even_bytes(low);
        numbers[1] = odd_bytes(low);
    } else {
        numbers[0] = join_even(low, upper);
        numbers[1] = join_odd(low, upper);
    }
}

// Codes of a point of every row, in one group or two; those of IQ1 with what its shift adds to them.
template <Type kType, int kPoint>
inline __attribute__((always_inline)) void point_codes(const Bytes& spread, const Bytes& upper, Bytes* groups) {
    constexpr GridInfo grid = grid_info(kType);
    if constexpr (grid.dimensions == 4) {
        groups[0] = low_nibbles(spread);
    } else {
        groups[0] = bit_pairs<0>(spread);
        groups[1] = bit_pairs<4>(spread);
    }
    if constexpr (grid.signs == Signs::Shift) {
        // IQ1_S has one shift for 32 columns, which lies with the last point.
        constexpr int kBit = 8 * (kType == Type::IQ1_S ? 3 : kPoint) + 3;
        const Bytes shift = words_where<kBit>(upper, grid.sign_code() * 0x01010101u);
        groups[0] = either(groups[0], shift);
        groups[1] = either(groups[1], shift);
    }
}

// The codes of 64 points, plane `plane` of the indices, in the order of their columns.
template <Type kType>
inline __attribute__((always_inline)) void plane_codes(const uint8_t* block, int plane, const Bytes& upper, Bytes* groups) {
    constexpr GridInfo grid = grid_info(kType);
    constexpr int kGroups = grid.dimensions / 4, kBits = 16 / grid.dimensions;
    constexpr int kHigh = (1 << (grid.signs == Signs::Shift ? 3 : grid.upper_bits)) - 1;
    const uint16_t* points = grids[grid_index(kType)].words;
    Shorts numbers[2];
    point_numbers<kType>(block, plane, masked<kHigh>(upper), numbers);
    const Shorts even = look_up_words<grid.points>(numbers[0], points);
    const Shorts odd = look_up_words<grid.points>(numbers[1], points);
    point_codes<kType, 0>(spread_low<kBits>(even), upper, groups);
    point_codes<kType, 1>(spread_low<kBits>(odd), upper, groups + kGroups);
    point_codes<kType, 2>(spread_high<kBits>(even), upper, groups + 2 * kGroups);
    point_codes<kType, 3>(spread_high<kBits>(odd), upper, groups + 3 * kGroups);
}

// 32 columns of 16 rows: groups of 4 columns as in a tile of 8-bit quants, with kDecodedOffset, and scales of parts.
template <Type kType>
inline __attribute__((always_inline)) void decode_step(const uint8_t* block, int step, Vec unit, Bytes (&groups)[8],
                                                       Vec (&scales)[type_info(kType).parts()]) {
    constexpr GridInfo grid = grid_info(kType);
    constexpr int kPlanes = grid.index_planes() / kGridSteps, kParts = type_info(kType).parts();
    Bytes upper{};
    unroll<kPlanes>([&](auto plane) __attribute__((always_inline)) {
        const int index = step * kPlanes + plane;
        if constexpr (grid.upper_bits > 0) {
            const int bit = index * grid.upper_bits;
            upper = shift_right(load_bytes(block + grid.upper_offset() + bit / 8 * 64), bit % 8);
        }
        plane_codes<kType>(block, index, upper, groups + 4 * plane);
    });
    const uint8_t* signs = block + grid.signs_offset() + 64 * step;
    uint64_t planes[8];
    if constexpr (grid.signs == Signs::Even) {
        std::memcpy(planes, signs, sizeof planes);
        scales[0] = nibbles_to_float(complete_signs(planes));
        signs = reinterpret_cast<const uint8_t*>(planes);
    }
    if constexpr (kType == Type::IQ1_S)
        scales[0] = add(add(floats_where<3>(upper, 1), floats_where<11>(upper, 2)), floats_where<19>(upper, 4));
    unroll<8>([&](auto group) __attribute__((always_inline)) {
        if constexpr (grid.signs != Signs::Shift) groups[group] = add_bit<grid.sign_code()>(groups[group], signs + 8 * group);
        groups[group] = look_up(groups[group], grid.values);
    });
    if constexpr (has_scale_bytes(kType)) {
        const uint8_t* codes = block + grid.scales_offset() + step * kParts / 2 * kTileRows;
        scales[0] = kParts == 1 && step % 2 == 1 ? load_high(codes) : load_low(codes);
        if constexpr (kParts == 2) scales[1] = load_high(codes);
    }
    for (Vec& scale : scales) scale = mul(unit, fma(scale, splat(2 * grid.unit), splat(grid.unit)));
}

inline Vec block_unit(const uint8_t* block) { return load(reinterpret_cast<const uint16_t*>(block)); }

template <Type kType>
void decode_grid(const uint8_t* block, DecodedBlock& out) {
    constexpr int kParts = type_info(kType).parts();
    const Vec unit = block_unit(block);
#pragma GCC unroll 1
    for (int step = 0; step < kGridSteps; ++step) {
        Bytes groups[8];
        Vec scales[kParts];
        decode_step<kType>(block, step, unit, groups, scales);
        unroll<8>([&](auto group) { store(out.quants[step][group], groups[group]); });
        for (int part = 0; part < kParts; ++part) store(out.scales[step * kParts + part], scales[part]);
    }
}

void decode_ternary(const uint8_t* block, DecodedBlock& out) {
    constexpr int kDigits = 5, kGroups = 8 * kGridSteps;
    uint8_t* quants = out.quants[0][0];
    for (int first = 0; first < kGroups; first += kDigits) {
        Bytes rest = load_bytes(block + kUnitBytes + 64 * (first / kDigits));
        for (int group = first; group < first + kDigits && group < kGroups; ++group) {
            store(quants + 64 * group, ternary_digit<kDecodedOffset - 1>(rest));
            rest = ternary_rest(rest);
        }
    }
    const Vec unit = block_unit(block);
    for (int step = 0; step < kGridSteps; ++step) store(out.scales[step], unit);
}

void decode_block(Type type, const uint8_t* block, DecodedBlock& out) {
    switch (type) {
        case Type::IQ2_XXS: return decode_grid<Type::IQ2_XXS>(block, out);
        case Type::IQ2_XS: return decode_grid<Type::IQ2_XS>(block, out);
        case Type::IQ2_S: return decode_grid<Type::IQ2_S>(block, out);
        case Type::IQ3_XXS: return decode_grid<Type::IQ3_XXS>(block, out);
        case Type::IQ3_S: return decode_grid<Type::IQ3_S>(block, out);
        case Type::IQ1_S: return decode_grid<Type::IQ1_S>(block, out);
        case Type::IQ1_M: return decode_grid<Type::IQ1_M>(block, out);
        default: return decode_ternary(block, out);
    }
}

// Adds the products of 32 columns with kRows rows of a group of kWidth to `totals`; words and meta are the columns'.
// `groups(i)` are the quants of group i.
template <Activation kKind, int kParts, int kWidth, int kRows, class F>
inline __attribute__((always_inline)) void dot_groups(F&& groups, const Vec (&scales)[kParts], const int32_t* words,
                                                      const float* meta, Vec (&totals)[kRows]) {
    unroll<kParts>([&](auto part) __attribute__((always_inline)) {
        constexpr int kPart = decltype(part)::value, kGroups = 8 / kParts;
        const int32_t* negative = reinterpret_cast<const int32_t*>(meta) + (kParts == 1 ? 2 : 3 + kPart) * kWidth;
        IVec sums[kRows];
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) sums[m] = splat_shifted<log2_of(kDecodedOffset)>(negative + m);
        unroll<kGroups>([&](auto index) __attribute__((always_inline)) {
            constexpr int kGroup = kPart * kGroups + decltype(index)::value;
            dot_group<kKind, false, kWidth, kRows>(groups(kGroup), kGroup, words, sums);
        });
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m)
            totals[m] = fma(to_float(sums[m]), mul(scales[kPart], splat(meta[m])), totals[m]);
    });
}

// The same of a decoded block, added to results[kRows][16].
template <Activation kKind, int kParts, int kWidth, int kRows>
inline void dot_decoded(const DecodedBlock& block, const int32_t* words, const float* meta, float* results) {
    constexpr int kWords = kKind == Activation::Int16 ? 16 : 8;
    Vec totals[kRows];
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) totals[m] = load(results + 16 * m);
#pragma GCC unroll 1
    for (int step = 0; step < kGridSteps; ++step) {
        Vec scales[kParts];
        for (int part = 0; part < kParts; ++part) scales[part] = load(block.scales[step * kParts + part]);
        const auto groups = [&](int group) __attribute__((always_inline)) { return load_bytes(block.quants[step][group]); };
        dot_groups<kKind, kParts, kWidth, kRows>(groups, scales, words, meta, totals);
        words += kWords * kWidth;
        meta += kMeta * kWidth;
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) store(results + 16 * m, totals[m]);
}

// A tile times a group of rows whose sums stay in registers: decoded values, too, do not leave them.
template <Type kType, Activation kKind, int kWidth>
void dot_tile(const uint8_t* tile, BlockShape shape, const int32_t* words, const float* meta, float* out) {
    constexpr TypeInfo info = type_info(kType);
    constexpr int kWords = kKind == Activation::Int16 ? 16 : 8;
    Vec totals[kWidth];
#pragma GCC unroll 8
    for (int m = 0; m < kWidth; ++m) totals[m] = zero();
    for (const uint8_t* end = tile + info.tile_bytes(shape.columns, 0); tile < end; tile += info.decoded_bytes) {
        for (int line = 0; line < info.decoded_bytes; line += 64) bring(tile + kPrefetchBytes + line);
        const Vec unit = block_unit(tile);
#pragma GCC unroll 1
        for (int step = 0; step < kGridSteps; ++step) {
            Bytes groups[8];
            Vec scales[info.parts()];
            decode_step<kType>(tile, step, unit, groups, scales);
            const auto group = [&](int index) __attribute__((always_inline)) { return groups[index]; };
            dot_groups<kKind, info.parts(), kWidth, kWidth>(group, scales, words, meta, totals);
            words += kWords * kWidth;
            meta += kMeta * kWidth;
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kWidth; ++m) store(out + 16 * m, totals[m]);
}

template <Type kType>
GroupKernel tile_kernel(Activation kind, int width) {
    if (width > kDotRows || kind == Activation::Float) return nullptr;
    const bool shorts = kind == Activation::Int16;
    if (width == 1) return shorts ? dot_tile<kType, Activation::Int16, 1> : dot_tile<kType, Activation::Int8, 1>;
    if constexpr (kDotRows >= 2)
        if (width == 2) return shorts ? dot_tile<kType, Activation::Int16, 2> : dot_tile<kType, Activation::Int8, 2>;
    if constexpr (kDotRows >= 4)
        if (width == 4) return shorts ? dot_tile<kType, Activation::Int16, 4> : dot_tile<kType, Activation::Int8, 4>;
    if constexpr (kDotRows >= 8)
        if (width == 8) return shorts ? dot_tile<kType, Activation::Int16, 8> : dot_tile<kType, Activation::Int8, 8>;
    return nullptr;
}

// The kernel for a single group of rows; null: decode blocks first.
GroupKernel find_tile_kernel(Type type, Activation kind, int width) {
    switch (type) {
        case Type::IQ2_XXS: return tile_kernel<Type::IQ2_XXS>(kind, width);
        case Type::IQ2_XS: return tile_kernel<Type::IQ2_XS>(kind, width);
        case Type::IQ2_S: return tile_kernel<Type::IQ2_S>(kind, width);
        case Type::IQ3_XXS: return tile_kernel<Type::IQ3_XXS>(kind, width);
        case Type::IQ3_S: return tile_kernel<Type::IQ3_S>(kind, width);
        case Type::IQ1_S: return tile_kernel<Type::IQ1_S>(kind, width);
        case Type::IQ1_M: return tile_kernel<Type::IQ1_M>(kind, width);
        default: return nullptr;
    }
}

// The same for float activations, with four sums a row side by side.
template <int kParts, int kWidth, int kRows>
inline void float_decoded(const DecodedBlock& block, const float* words, float* results) {
    Vec sums[kRows][4];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m)
        for (int chain = 0; chain < 4; ++chain) sums[m][chain] = chain == 0 ? load(results + 16 * m) : zero();
    for (int step = 0; step < kGridSteps; ++step) {
        for (int group = 0; group < 8; ++group) {
            const Vec scale = load(block.scales[step * kParts + group * kParts / 8]);
            const Vec offset = mul(scale, splat(-static_cast<float>(kDecodedOffset)));
            const Bytes quants = load_bytes(block.quants[step][group]);
            const float* values = words + 4 * group * kWidth;
            const Vec columns[4] = {fma(byte_to_float<0>(quants), scale, offset),
                                    fma(byte_to_float<2>(quants), scale, offset),
                                    fma(byte_to_float<1>(quants), scale, offset),
                                    fma(byte_to_float<3>(quants), scale, offset)};
#pragma GCC unroll 4
            for (int m = 0; m < kRows; ++m)
                for (int chain = 0; chain < 4; ++chain)
                    sums[m][chain] = fma(columns[chain], splat(values[chain * kWidth + m]), sums[m][chain]);
        }
        words += kBlock * kWidth;
    }
    for (int m = 0; m < kRows; ++m)
        store(results + 16 * m, add(add(sums[m][0], sums[m][1]), add(sums[m][2], sums[m][3])));
}

// A block times a group of rows, added to results[width][16].
using BlockKernel = void (*)(const DecodedBlock& block, const int32_t* words, const float* meta, float* results);

template <Activation kKind, int kParts, int kWidth>
void block_kernel(const DecodedBlock& block, const int32_t* words, const float* meta, float* results) {
    if constexpr (kKind == Activation::Float) {
        constexpr int kRows = kWidth < kFloatRows ? kWidth : kFloatRows;
        for (int m = 0; m < kWidth; m += kRows)
            float_decoded<kParts, kWidth, kRows>(block, reinterpret_cast<const float*>(words) + m, results + 16 * m);
    } else {
        constexpr int kRows = kWidth < kDotRows ? kWidth : kDotRows;
        for (int m = 0; m < kWidth; m += kRows)
            dot_decoded<kKind, kParts, kWidth, kRows>(block, words + m, meta + m, results + 16 * m);
    }
}

template <Activation kKind, int kParts>
BlockKernel block_kernel_of_width(int width) {
    switch (width) {
        case 8: return block_kernel<kKind, kParts, 8>;
        case 4: return block_kernel<kKind, kParts, 4>;
        case 2: return block_kernel<kKind, kParts, 2>;
        default: return block_kernel<kKind, kParts, 1>;
    }
}

template <int kParts>
BlockKernel block_kernel_of_kind(Activation kind, int width) {
    if (kind == Activation::Int16) return block_kernel_of_width<Activation::Int16, kParts>(width);
    if (kind == Activation::Int8) return block_kernel_of_width<Activation::Int8, kParts>(width);
    return block_kernel_of_width<Activation::Float, kParts>(width);
}

// Results of a tile of a decoded type for the rows of `rows`, at most kSpanRows: results[rows][16].
void decoded_products(const PackedRows& in, const TileWeight& weight, int64_t tile, Range rows, float* results) {
    const TypeInfo info = type_info(weight.type);
    const uint8_t* data = weight.tiles + tile * weight.tile_bytes();
    const int alone = group_width(rows.begin, in.rows);
    const GroupKernel direct = rows.begin + alone == rows.end ? find_tile_kernel(weight.type, in.kind, alone) : nullptr;
    if (direct != nullptr)
        return direct(data, block_shape(weight), group_words(in, rows.begin), group_meta(in, rows.begin), results);
    const int64_t step_words = kBlock * in.row_words() / in.columns;
    DecodedBlock block;
    std::memset(results, 0, static_cast<size_t>(rows.end - rows.begin) * kTileRows * sizeof *results);
    for (int64_t step = 0; step < in.columns / kBlock; step += kGridSteps, data += info.decoded_bytes) {
        for (int line = 0; line < info.decoded_bytes; line += 64) bring(data + kPrefetchBytes + line);
        decode_block(weight.type, data, block);
        for (int64_t row = rows.begin; row < rows.end;) {
            const int width = group_width(row, in.rows);
            const BlockKernel kernel =
                info.parts() == 1 ? block_kernel_of_kind<1>(in.kind, width) : block_kernel_of_kind<2>(in.kind, width);
            const float* meta = in.meta + row * in.row_meta() + step * kMeta * width;
            kernel(block, in.words + row * in.row_words() + step * step_words * width, meta,
                   results + (row - rows.begin) * kTileRows);
            row += width;
        }
    }
}

}  // namespace
}  // namespace aph
