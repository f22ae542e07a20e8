// Weights as the kernels read them: tiles of 16 rows, blocks of columns in order, each block's data contiguous.
//
// A quantized block covers the columns of a file's block, 32 or 256, or of a group of AWQ's, GPTQ's and their like, of
// the 16 rows. It takes the file's bytes or up to 4 % more (6-bit scales and 4-bit zeros widened to bytes):
//   units    16 x f16, one a row (MXFP4: 16 x u8, powers of two), then of types with minima 16 x f16; of groups
//            16 x f16, bf16 or f32, and of integers 16 x u8, the zeros
//   factors  types with 256 columns: for every 16 or 32 of them what multiplies the units, one byte a row
//   high     for every 32 columns the bits above the low ones. One bit: 8 x u64, bit 4 * row + byte of word g is that
//            of the byte of group g. Two bits: 2 x 64 bytes, of groups 0-3 and 4-7, the first group lowest.
//   quants   for every 32 columns 8 groups of 4; a group is 16 rows x 4 bytes, the columns of a row in the order
//            0, 2, 1, 3, so that the even bytes of a word are two neighbouring columns, and so are the odd ones.
//            8 low bits: groups 0-7, 64 bytes each. 4: 4 x 64 bytes, two groups each (`pair_group`). 2: 2 x 64 bytes
//            of groups 0-3 and 4-7, the first group lowest.
// In groups of any size the high bits of 32 columns lie before their low ones. Floats of 8 bits are [column][16 rows];
// before the blocks of a tile whose codes stand for the numbers of a table there are those, 16 x f32.
// Signed quants are stored with an offset that makes them unsigned. A dense tile is [column][16 rows]. Types that name
// points of a grid, and TQ1_0, have blocks of their own (grids.h), which are decoded before they are multiplied.
#pragma once
#include <cstdint>

namespace aph {

constexpr int kTileRows = 16;
constexpr int kBlock = 32;

// Numbers of the GGUF specification; from 1000 on this library's own, groups of any multiple of 32 columns: integers of
// 2, 3, 4 or 8 bits with zeros, floats of 8 bits (e4m3), codes of 4 bits for the numbers of a matrix's table.
enum class Type : int32_t {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
    Int4F16 = 1000,
    Int4BF16 = 1001,
    Int8F16 = 1002,
    Int8BF16 = 1003,
    Int2F16 = 1004,
    Int2BF16 = 1005,
    Int3F16 = 1006,
    Int3BF16 = 1007,
    Int4F32 = 1008,
    Int8F32 = 1009,
    Float8F32 = 1010,
    Table4F16 = 1011,
    Table4F32 = 1012,
};

// What a quant is multiplied by.
enum class Scales : int32_t {
    None,         // dense
    Unit,         // f16 a row
    Power,        // u8 a row, 2^(u8 - 128)
    Signed,       // f16 a row x an i8 a part
    Pair,         // f16 a row x a u8 a part; minimum: f16 a row x a u8 a part
    NibblePair,   // the same with both in one byte, the scale low
    HalfGroup,    // f16 a row; minimum: less zero x scale
    BfloatGroup,  // bf16 a row; the same
    SingleGroup,  // f32 a row; the same
    Decoded,      // of blocks that are decoded as a whole (grids.h)
};

// What codes are multiplied as.
enum class Codes : int32_t { Integers, Float8, Table };

struct TypeInfo {
    int bits;                      // of a quant, or of a dense value; 0: no such type
    int file_bytes;                // of a block of one row in the file; dense: of 32 columns; groups: 0
    Scales scales = Scales::None;
    int offset = 0;                // subtracted from the unsigned quant, a power of two
    bool minimum = false;          // has minima, added
    int columns = 32;              // of a block; groups: 0, for any multiple of 32
    int part = 32;                 // columns that share a scale
    const uint8_t* values = nullptr;  // what a quant stands for before the offset is subtracted; null: itself
    int decoded_bytes = 0;            // of a block in tiles, of types that are decoded as a whole
    Codes codes = Codes::Integers;    // others are multiplied by float activations only

    constexpr bool quantized() const { return scales != Scales::None; }
    constexpr bool integers() const { return quantized() && codes == Codes::Integers; }
    constexpr bool decoded() const { return scales == Scales::Decoded; }
    constexpr bool grouped() const { return columns == 0; }
    constexpr int largest() const {  // of quants or values
        int most = values == nullptr ? (1 << bits) - 1 : 0;
        for (int i = 0; values != nullptr && i < 16; ++i) most = values[i] > most ? values[i] : most;
        return most;
    }
    constexpr int low_bits() const { return bits == 8 ? 8 : bits >= 4 ? 4 : 2; }
    constexpr int high_bits() const { return bits - low_bits(); }
    constexpr int parts() const { return kBlock / part; }          // of 32 columns
    constexpr int steps() const { return columns / kBlock; }       // of 32 columns, in a block
    constexpr int part_bytes() const {                             // factors of a part
        return scales == Scales::Pair ? 32 : scales == Scales::Signed || scales == Scales::NibblePair ? 16 : 0;
    }
    constexpr int unit_bytes() const { return scales == Scales::Power ? 16 : scales == Scales::SingleGroup ? 64 : 32; }
    constexpr int factors_offset() const { return unit_bytes() + (!minimum ? 0 : grouped() ? kTileRows : 32); }
    constexpr int table_bytes() const { return codes == Codes::Table ? 64 : 0; }  // of a tile
    constexpr int high_offset() const { return factors_offset() + columns / part * part_bytes(); }
    constexpr int high_bytes() const { return 64 * high_bits(); }  // of 32 columns
    constexpr int quants_offset() const { return high_offset() + steps() * high_bytes(); }
    constexpr int quant_bytes() const { return 64 * low_bits(); }  // of 32 columns
    constexpr int block_bytes() const {
        if (decoded()) return decoded_bytes;
        return quantized() ? quants_offset() + steps() * quant_bytes() : kBlock * kTileRows * bits / 8;
    }
    constexpr int group_step_bytes() const { return high_bytes() + quant_bytes(); }  // of 32 columns of a group
    constexpr int step_bytes() const { return grouped() ? group_step_bytes() : block_bytes() / steps(); }  // about
    // The same for types of which groups of `group` columns share a scale; of others `group` means nothing.
    constexpr int64_t block_columns(int64_t group) const { return grouped() ? group : columns; }
    constexpr int64_t block_bytes(int64_t group) const {
        return grouped() ? quants_offset() + group / kBlock * group_step_bytes() : block_bytes();
    }
    constexpr int64_t tile_bytes(int64_t all_columns, int64_t group) const {
        return table_bytes() + all_columns / block_columns(group) * block_bytes(group);
    }
};

// The two groups whose 4-bit quants share bytes, `pair` of 4: groups of one part, where parts are smaller than 32.
constexpr int pair_group(const TypeInfo& info, int pair, int which) {
    return info.part == kBlock ? pair + 4 * which : 2 * pair + which;
}

// Non-linear 4-bit values plus 128, and twice the values of FP4 (e2m1) plus 16.
constexpr uint8_t kIq4Values[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
constexpr uint8_t kFp4Values[16] = {16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};

constexpr TypeInfo decoded_info(int file_bytes, int part, int decoded_bytes) {
    return {8, file_bytes, Scales::Decoded, 64, false, 256, part, nullptr, decoded_bytes};
}

constexpr TypeInfo float_group(int bits, Scales scales, Codes codes) {
    return {bits, 0, scales, 0, false, 0, 32, nullptr, 0, codes};
}

constexpr TypeInfo type_info(Type type) {
    switch (type) {
        case Type::F32: return {32, 128};
        case Type::F16: return {16, 64};
        case Type::BF16: return {16, 64};
        case Type::Q4_0: return {4, 18, Scales::Unit, 8};
        case Type::Q4_1: return {4, 20, Scales::Unit, 0, true};
        case Type::Q5_0: return {5, 22, Scales::Unit, 16};
        case Type::Q5_1: return {5, 24, Scales::Unit, 0, true};
        case Type::Q8_0: return {8, 34, Scales::Unit, 128};
        case Type::Q2_K: return {2, 84, Scales::NibblePair, 0, true, 256, 16};
        case Type::Q3_K: return {3, 110, Scales::Signed, 4, false, 256, 16};
        case Type::Q4_K: return {4, 144, Scales::Pair, 0, true, 256};
        case Type::Q5_K: return {5, 176, Scales::Pair, 0, true, 256};
        case Type::Q6_K: return {6, 210, Scales::Signed, 32, false, 256, 16};
        case Type::IQ4_NL: return {4, 18, Scales::Unit, 128, false, 32, 32, kIq4Values};
        case Type::IQ4_XS: return {4, 136, Scales::Signed, 128, false, 256, 32, kIq4Values};
        case Type::MXFP4: return {4, 17, Scales::Power, 16, false, 32, 32, kFp4Values};
        case Type::IQ2_XXS: return decoded_info(66, 32, 1056);
        case Type::IQ2_XS: return decoded_info(74, 16, 1248);
        case Type::IQ2_S: return decoded_info(82, 16, 1312);
        case Type::IQ3_XXS: return decoded_info(98, 32, 1632);
        case Type::IQ3_S: return decoded_info(110, 32, 1760);
        case Type::IQ1_S: return decoded_info(50, 32, 800);
        case Type::IQ1_M: return decoded_info(56, 16, 928);
        case Type::TQ1_0: return decoded_info(54, 32, 864);
        case Type::TQ2_0: return {2, 66, Scales::Unit, 1, false, 256};
        case Type::Int4F16: return {4, 0, Scales::HalfGroup, 0, true, 0};
        case Type::Int4BF16: return {4, 0, Scales::BfloatGroup, 0, true, 0};
        case Type::Int8F16: return {8, 0, Scales::HalfGroup, 0, true, 0};
        case Type::Int8BF16: return {8, 0, Scales::BfloatGroup, 0, true, 0};
        case Type::Int2F16: return {2, 0, Scales::HalfGroup, 0, true, 0};
        case Type::Int2BF16: return {2, 0, Scales::BfloatGroup, 0, true, 0};
        case Type::Int3F16: return {3, 0, Scales::HalfGroup, 0, true, 0};
        case Type::Int3BF16: return {3, 0, Scales::BfloatGroup, 0, true, 0};
        case Type::Int4F32: return {4, 0, Scales::SingleGroup, 0, true, 0};
        case Type::Int8F32: return {8, 0, Scales::SingleGroup, 0, true, 0};
        case Type::Float8F32: return float_group(8, Scales::SingleGroup, Codes::Float8);
        case Type::Table4F16: return float_group(4, Scales::HalfGroup, Codes::Table);
        case Type::Table4F32: return float_group(4, Scales::SingleGroup, Codes::Table);
    }
    return {0, 0};
}

inline int64_t tile_count(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

}  // namespace aph
