// File blocks to tiles and back to rows. Formats: the GGUF specification (ggml's block structures).
#include <cstring>

#include "api.h"
#include "formats.h"
#include "half.h"
#include "thread_pool.h"

namespace aph {
namespace {

// Byte of a word where column c of a group of four lies, and the reverse (the map is its own inverse).
constexpr int kByteOf[4] = {0, 2, 1, 3};

uint32_t load_word(const uint8_t* bytes) {
    uint32_t word;
    std::memcpy(&word, bytes, sizeof word);
    return word;
}

// Columns 0 1 2 3 in bytes 0 1 2 3 -> bytes 0 2 1 3.
uint32_t reorder(uint32_t word) { return (word & 0xff0000ff) | (word & 0xff00) << 8 | (word >> 8 & 0xff00); }

struct Repack {
    Type type;
    const uint8_t* source;
    int64_t rows, columns, row_bytes;
    uint8_t* tiles;
};

// One row's block of 32 columns into lane `lane` of a tile's block.
void put_block(Type type, const TypeInfo& info, const uint8_t* file, uint8_t* block, int lane) {
    std::memcpy(block + 2 * lane, file, 2);
    file += 2;
    if (info.minimum) {
        std::memcpy(block + 32 + 2 * lane, file, 2);
        file += 2;
    }
    uint32_t* quants = reinterpret_cast<uint32_t*>(block + info.quants_offset());
    if (type == Type::Q8_0) {
        for (int group = 0; group < 8; ++group)
            quants[group * kTileRows + lane] = reorder(load_word(file + 4 * group) ^ 0x80808080);
        return;
    }
    if (info.bits == 5) {
        const uint32_t high = load_word(file);
        file += 4;
        uint64_t* planes = reinterpret_cast<uint64_t*>(block + info.high_offset());
        for (int column = 0; column < kBlock; ++column)
            planes[column / 4] |= static_cast<uint64_t>(high >> column & 1) << (4 * lane + kByteOf[column % 4]);
    }
    for (int word = 0; word < 4; ++word) quants[word * kTileRows + lane] = reorder(load_word(file + 4 * word));
}

void put_dense(const Repack& job, const uint8_t* row, uint8_t* tile, int lane) {
    if (job.type == Type::F32) {
        for (int64_t column = 0; column < job.columns; ++column)
            std::memcpy(tile + 4 * (column * kTileRows + lane), row + 4 * column, 4);
    } else {
        for (int64_t column = 0; column < job.columns; ++column)
            std::memcpy(tile + 2 * (column * kTileRows + lane), row + 2 * column, 2);
    }
}

void repack_tile(const Repack& job, int64_t index) {
    const TypeInfo info = type_info(job.type);
    const int64_t bytes = tile_bytes(job.type, job.columns);
    uint8_t* tile = job.tiles + index * bytes;
    std::memset(tile, 0, bytes);
    for (int lane = 0; lane < kTileRows; ++lane) {
        const int64_t row = index * kTileRows + lane;
        if (row >= job.rows) break;
        const uint8_t* file = job.source + row * job.row_bytes;
        if (!info.quantized) {
            put_dense(job, file, tile, lane);
            continue;
        }
        for (int64_t b = 0; b < job.columns / kBlock; ++b)
            put_block(job.type, info, file + b * info.file_bytes, tile + b * info.block_bytes(), lane);
    }
}

float dense_value(Type type, const uint8_t* tile, int64_t index) {
    if (type == Type::F32) return bits_to_float(load_word(tile + 4 * index));
    uint16_t bits;
    std::memcpy(&bits, tile + 2 * index, 2);
    return type == Type::F16 ? half_to_float(bits) : bfloat_to_float(bits);
}

void unpack_block(const TypeInfo& info, const uint8_t* block, int lane, float* out) {
    uint16_t bits;
    std::memcpy(&bits, block + 2 * lane, 2);
    const float scale = half_to_float(bits);
    float minimum = 0;
    if (info.minimum) {
        std::memcpy(&bits, block + 32 + 2 * lane, 2);
        minimum = half_to_float(bits);
    }
    for (int column = 0; column < kBlock; ++column) {
        const int group = column / 4, byte = kByteOf[column % 4];
        const int stored = info.bits == 8 ? group : group % 4;
        int quant = block[info.quants_offset() + stored * 64 + lane * 4 + byte];
        if (info.bits != 8) quant = group < 4 ? quant & 15 : quant >> 4;
        if (info.bits == 5) {
            uint64_t plane;
            std::memcpy(&plane, block + info.high_offset() + 8 * group, 8);
            quant |= static_cast<int>(plane >> (4 * lane + byte) & 1) << 4;
        }
        out[column] = static_cast<float>(quant - info.offset) * scale + minimum;
    }
}

}  // namespace

// Dequantizes one row: out[columns].
void tile_row(Type type, const uint8_t* tiles, int64_t columns, int64_t row, float* out) {
    const TypeInfo info = type_info(type);
    const uint8_t* tile = tiles + row / kTileRows * tile_bytes(type, columns);
    const int lane = static_cast<int>(row % kTileRows);
    if (!info.quantized) {
        for (int64_t column = 0; column < columns; ++column)
            out[column] = dense_value(type, tile, column * kTileRows + lane);
        return;
    }
    for (int64_t b = 0; b < columns / kBlock; ++b)
        unpack_block(info, tile + b * info.block_bytes(), lane, out + b * kBlock);
}

}  // namespace aph

// Bytes of the tiles of a [rows, columns] weight; 0 for a type or shape that has no tile layout.
APH_API int64_t aph_tiles_bytes(int32_t type, int64_t rows, int64_t columns) {
    const aph::Type kind = static_cast<aph::Type>(type);
    if (aph::type_info(kind).bits == 0 || rows <= 0 || columns <= 0 || columns % aph::kBlock != 0) return 0;
    return aph::tile_count(rows) * aph::tile_bytes(kind, columns);
}

// Repacks a weight from its file's rows (contiguous, columns a multiple of 32) into `tiles`.
APH_API void aph_repack(int32_t type, const uint8_t* source, int64_t rows, int64_t columns, uint8_t* tiles) {
    const aph::Type kind = static_cast<aph::Type>(type);
    aph::Repack job{kind, source, rows, columns, columns / aph::kBlock * aph::type_info(kind).file_bytes, tiles};
    aph::parallel_for(
        aph::tile_count(rows),
        [](void* context, int64_t tile, int) { aph::repack_tile(*static_cast<aph::Repack*>(context), tile); }, &job);
}
