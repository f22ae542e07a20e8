// Blocks of 256 columns of the types that name points of a grid (IQ1, IQ2, IQ3) and of TQ1_0, in tiles of 16 rows.
//
// A grid block takes the file's bytes or up to 5 % more (4-bit scales beside the signs, 3-bit scales widened to 4):
//   units    16 x f16, one a row
//   indices  low bytes of points' numbers, a row's four bytes together: for every 32 columns 64 bytes for points of 8
//            values, 128 for points of 4
//   upper    the other bits of the numbers: byte 4 * row + k of plane i * bits / 8 has those of the same byte of the
//            i-th 64 bytes of indices, at bit i * bits % 8. Those of IQ1 are four: three of the number, and the highest
//            says that the values are shifted down; of IQ1_S only the last point's says so, for all 32 columns, and the
//            others' are the scale's bits, lowest first.
//   signs    for every 32 columns 8 x u64: bit 4 * row + byte of word g is that of the byte of group g. Where the signs
//            of 8 columns are even in number the last one is not kept: in its place the k-th such bit of 32 columns is
//            the scale's bit k.
//   scales   4 bits a part: row r of part p has those of byte 16 * (p / 2) + r, of even parts the low ones
// A value is d * unit * (2 * scale + 1) * coordinate.
//
// A block of TQ1_0 is 16 x f16, then 13 x 64 bytes: byte 4 * row + byte of the i-th holds the ternary digits of that
// byte of groups 5 * i to 5 * i + 4 as a fraction of 256, so that the carry of three times it is the first digit.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace aph {

constexpr int kGridColumns = 256;
constexpr int kGridSteps = kGridColumns / kBlock;
constexpr int kDecodedOffset = 64;  // makes decoded values unsigned
constexpr int kUnitBytes = 2 * kTileRows;
constexpr int kMostPoints = 2048;

enum class Signs : int32_t {
    Each,   // one bit a value
    Even,   // the last of eight is such that an even number is set
    Shift,  // none; all values of a point are shifted by an eighth, up or down
};

struct GridInfo {
    int dimensions;  // values of a point
    int points;
    int upper_bits;  // of an index, beside its low byte
    Signs signs;
    float unit;
    const uint8_t* values;  // coordinate + kDecodedOffset of a code, with a sign from `sign_code` on

    constexpr int index_planes() const { return kGridColumns / dimensions / 4; }  // of 64 bytes, one byte a point
    constexpr int sign_code() const { return dimensions == 8 ? 4 : 8; }
    constexpr int upper_offset() const { return kUnitBytes + 64 * index_planes(); }
    constexpr int signs_offset() const { return upper_offset() + 8 * upper_bits * index_planes(); }
    constexpr int scales_offset() const { return signs_offset() + (signs == Signs::Shift ? 0 : 64 * kGridSteps); }
};

// Codes 0 to 2 of IQ2: 8, 25, 43. Those of IQ1: -1, 0, 1 in eighths, plus or minus one eighth. Codes 0 to 7 of IQ3.
constexpr uint8_t kIq2Values[16] = {72, 89, 107, 64, 56, 39, 21, 64};
constexpr uint8_t kIq1Values[16] = {57, 65, 73, 64, 55, 63, 71, 64};
constexpr uint8_t kIq3XxsValues[16] = {68, 76, 84, 92, 100, 108, 116, 126, 60, 52, 44, 36, 28, 20, 12, 2};
constexpr uint8_t kIq3SValues[16] = {65, 67, 69, 71, 73, 75, 77, 79, 63, 61, 59, 57, 55, 53, 51, 49};

constexpr GridInfo grid_info(Type type) {
    switch (type) {
        case Type::IQ2_XXS: return {8, 256, 0, Signs::Even, 0.125f, kIq2Values};
        case Type::IQ2_XS: return {8, 512, 1, Signs::Each, 0.125f, kIq2Values};
        case Type::IQ2_S: return {8, 1024, 2, Signs::Each, 0.125f, kIq2Values};
        case Type::IQ3_XXS: return {4, 256, 0, Signs::Each, 0.25f, kIq3XxsValues};
        case Type::IQ3_S: return {4, 512, 1, Signs::Each, 1.0f, kIq3SValues};
        case Type::IQ1_S:
        case Type::IQ1_M: return {8, 2048, 4, Signs::Shift, 0.125f, kIq1Values};
        default: return {0, 0, 0, Signs::Each, 0.0f, nullptr};
    }
}

// Whether scales lie in bytes of their own, not beside signs or numbers.
constexpr bool has_scale_bytes(Type type) { return type != Type::IQ2_XXS && type != Type::IQ1_S; }

// The points of a type's grid, in the order of their numbers: 16-bit words of codes, of points of 8 values two bits
// each, of columns 0, 1, 4, 5, 2, 3, 6, 7 from the low end; of points of 4 values four bits each. aph_set_grid tells them.
struct alignas(64) GridPoints {
    uint16_t words[kMostPoints + 32];  // lookups may read behind the last
    int64_t count;
};
extern GridPoints grids[6];

constexpr int grid_index(Type type) {  // of `grids`; -1: none
    switch (type) {
        case Type::IQ2_XXS: return 0;
        case Type::IQ2_XS: return 1;
        case Type::IQ2_S: return 2;
        case Type::IQ3_XXS: return 3;
        case Type::IQ3_S: return 4;
        case Type::IQ1_S:
        case Type::IQ1_M: return 5;
        default: return -1;
    }
}

// Whether the type's points have been told, or it has none.
inline bool grid_known(Type type) { return grid_index(type) < 0 || grids[grid_index(type)].count != 0; }

// One row of a decoded type's tiles: out[columns].
void decoded_row(const TileWeight& weight, int64_t row, float* out);

// Tile `index` of a decoded type from its file's rows.
struct FileRows {
    const uint8_t* source;
    int64_t rows, columns, row_bytes;
};
void repack_decoded_tile(Type type, const FileRows& file, int64_t index, uint8_t* tile);

}  // namespace aph
