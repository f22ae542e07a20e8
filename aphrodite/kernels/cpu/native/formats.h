// Weights as the kernels read them: tiles of 16 rows, column blocks in order, each block's data contiguous.
//
// A quantized block covers 32 columns of the 16 rows:
//   scales   16 x f16, one a row
//   minima   16 x f16 (types with a minimum)
//   high     8 x u64 (5-bit types): bit 4 * row + byte of word g is the fifth bit of that byte of group g
//   quants   groups of 4 columns; a group is 16 rows x 4 bytes, the columns of a row in the order 0, 2, 1, 3, so that
//            the even bytes of a word are two neighbouring columns, and so are the odd ones. 8-bit: groups 0-7.
//            4 and 5-bit: 4 x 64 bytes, low nibbles group i, high nibbles group i + 4.
// Signed types are stored with an offset (8, 16, 128) that makes them unsigned. A dense tile is [column][16 rows].
// Types with 256-value super-blocks fit the same frame: 8 such blocks, scales multiplied out or stored beside them.
#pragma once
#include <cstdint>

namespace aph {

constexpr int kTileRows = 16;
constexpr int kBlock = 32;

// Numbers of the GGUF specification.
enum class Type : int32_t { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, BF16 = 30 };

struct TypeInfo {
    bool quantized;
    int bits;           // of a quant, or of a dense value
    int offset;         // subtracted from the unsigned quant
    bool minimum;       // has a minimum a block
    int file_bytes;     // of a block of 32 columns of one row in the file
    constexpr int high_offset() const { return minimum ? 64 : 32; }
    constexpr int quants_offset() const { return high_offset() + (bits == 5 ? 64 : 0); }
    constexpr int block_bytes() const {  // of a block of 32 columns in a tile
        return quantized ? quants_offset() + (bits == 8 ? 512 : 256) : kBlock * kTileRows * bits / 8;
    }
};

constexpr TypeInfo type_info(Type type) {
    switch (type) {
        case Type::F32: return {false, 32, 0, false, 128};
        case Type::F16: return {false, 16, 0, false, 64};
        case Type::BF16: return {false, 16, 0, false, 64};
        case Type::Q4_0: return {true, 4, 8, false, 18};
        case Type::Q4_1: return {true, 4, 0, true, 20};
        case Type::Q5_0: return {true, 5, 16, false, 22};
        case Type::Q5_1: return {true, 5, 0, true, 24};
        case Type::Q8_0: return {true, 8, 128, false, 34};
    }
    return {false, 0, 0, false, 0};
}

inline int64_t tile_bytes(Type type, int64_t columns) { return columns / kBlock * type_info(type).block_bytes(); }
inline int64_t tile_count(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

}  // namespace aph
