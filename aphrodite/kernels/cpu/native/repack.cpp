// File blocks to tiles and back to rows. Formats: the GGUF specification (ggml's block structures).
#include <cstring>
#include <type_traits>

#include "api.h"
#include "formats.h"
#include "grids.h"
#include "half.h"
#include "kernels.h"
#include "thread_pool.h"

namespace aph {
namespace {

constexpr int kMostSteps = 8;           // of 32 columns, in a block
constexpr int kWordsOfStep = kBlock / 4;

// Byte of a word where column c of a group of four lies, and the reverse (the map is its own inverse).
constexpr int kByteOf[4] = {0, 2, 1, 3};

uint32_t load_word(const uint8_t* bytes) {
    uint32_t word;
    std::memcpy(&word, bytes, sizeof word);
    return word;
}

// Columns 0 1 2 3 in bytes 0 1 2 3 -> bytes 0 2 1 3.
uint32_t reorder(uint32_t word) { return (word & 0xff0000ff) | (word & 0xff00) << 8 | (word >> 8 & 0xff00); }

// One row's block, taken apart.
struct RowBlock {
    uint32_t words[kMostSteps * kWordsOfStep];  // unsigned quants, four columns a word in their order
    uint8_t units[4];                           // as in a tile: f16 or u8, then the minima's f16
    uint8_t factors[2 * 16];                    // as in a tile: bytes of each part
};

constexpr uint32_t kNibbles = 0x0f0f0f0f, kPairs = 0x03030303, kOnes = 0x01010101;

// 32 quants whose low nibbles are the first 16 columns.
void take_nibbles(const uint8_t* file, uint32_t* words) {
    for (int i = 0; i < 4; ++i) {
        words[i] = load_word(file + 4 * i) & kNibbles;
        words[i + 4] = load_word(file + 4 * i) >> 4 & kNibbles;
    }
}

void take_unit(const uint8_t* file, uint8_t* unit) { std::memcpy(unit, file, 2); }

// Minima are added in a tile and subtracted in the files of K types.
void take_negative_unit(const uint8_t* file, uint8_t* unit) {
    unit[0] = file[0];
    unit[1] = file[1] ^ 0x80;
}

// Blocks of 32 columns: the unit, (the minimum's,) (32 fifth bits,) quants.
template <Type kType>
void take_plain(const uint8_t* file, RowBlock& out) {
    constexpr TypeInfo info = type_info(kType);
    constexpr int kUnits = info.scales == Scales::Power ? 1 : info.minimum ? 4 : 2;
    std::memcpy(out.units, file, kUnits);
    file += kUnits;
    if constexpr (info.bits == 8) {
        for (int i = 0; i < kWordsOfStep; ++i) out.words[i] = load_word(file + 4 * i) ^ 0x80808080;
    } else if constexpr (info.bits == 5) {
        const uint32_t high = load_word(file);
        take_nibbles(file + 4, out.words);
        // Four bits, spread to the fifth bit of four bytes by a product that puts bit b at 8 b + 4.
        for (int i = 0; i < kWordsOfStep; ++i)
            out.words[i] |= (high >> 4 * i & 15) * 0x02040810u & 0x10101010u;
    } else {
        take_nibbles(file, out.words);
    }
}

// 4 and 5 bits: d, dmin, 12 bytes of 6-bit scales and minima, (32 bytes of fifth bits,) 128 bytes of nibbles. The scales
// and minima of parts 4 to 7 have their low nibbles in the last four of the twelve, the rest above those of parts 0 to 3.
template <bool kFifth>
void take_q45_k(const uint8_t* file, RowBlock& out) {
    take_unit(file, out.units);
    take_negative_unit(file + 2, out.units + 2);
    const uint8_t *scales = file + 4, *minima = file + 8, *low = file + 12, *high = file + 16;
    for (int i = 0; i < 4; ++i) {
        out.factors[2 * i] = scales[i] & 63;
        out.factors[2 * i + 1] = minima[i] & 63;
        out.factors[2 * i + 8] = (low[i] & 15) | (scales[i] >> 6) << 4;
        out.factors[2 * i + 9] = low[i] >> 4 | (minima[i] >> 6) << 4;
    }
    const uint8_t* quants = file + (kFifth ? 48 : 16);
    for (int step = 0; step < 8; ++step)
        for (int i = 0; i < kWordsOfStep; ++i) {
            uint32_t word = load_word(quants + 32 * (step / 2) + 4 * i) >> 4 * (step % 2) & kNibbles;
            if (kFifth) word |= (load_word(high + 4 * i) >> step & kOnes) << 4;
            out.words[kWordsOfStep * step + i] = word;
        }
}

// 128 bytes of low nibbles, 64 of high pairs, sixteen i8 scales, d.
void take_q6_k(const uint8_t* file, RowBlock& out) {
    take_unit(file + 208, out.units);
    std::memcpy(out.factors, file + 192, 16);
    for (int step = 0; step < 8; ++step) {
        const int half = step / 4, plane = step % 4;
        for (int i = 0; i < kWordsOfStep; ++i) {
            const uint32_t low = load_word(file + 64 * half + 32 * (plane % 2) + 4 * i) >> 4 * (plane / 2) & kNibbles;
            const uint32_t high = load_word(file + 128 + 32 * half + 4 * i) >> 2 * plane & kPairs;
            out.words[kWordsOfStep * step + i] = low | high << 4;
        }
    }
}

// 32 bytes of third bits, 64 of low pairs, 12 of sixteen 6-bit scales (low nibbles, then pairs), d.
void take_q3_k(const uint8_t* file, RowBlock& out) {
    take_unit(file + 108, out.units);
    const uint8_t* scales = file + 96;
    for (int part = 0; part < 16; ++part) {
        const int low = scales[part % 8] >> 4 * (part / 8) & 15, high = scales[8 + part % 4] >> 2 * (part / 4) & 3;
        out.factors[part] = static_cast<uint8_t>((low | high << 4) - 32);
    }
    for (int step = 0; step < 8; ++step)
        for (int i = 0; i < kWordsOfStep; ++i) {
            const uint32_t low = load_word(file + 32 + 32 * (step / 4) + 4 * i) >> 2 * (step % 4) & kPairs;
            out.words[kWordsOfStep * step + i] = low | (load_word(file + 4 * i) >> step & kOnes) << 2;
        }
}

// 256 pairs: of each 32 bytes the lowest first.
void take_pairs(const uint8_t* file, uint32_t* words) {
    for (int step = 0; step < 8; ++step)
        for (int i = 0; i < kWordsOfStep; ++i)
            words[kWordsOfStep * step + i] = load_word(file + 32 * (step / 4) + 4 * i) >> 2 * (step % 4) & kPairs;
}

// 16 bytes of scales and minima, 64 of quants, d, dmin.
void take_q2_k(const uint8_t* file, RowBlock& out) {
    take_unit(file + 80, out.units);
    take_negative_unit(file + 82, out.units + 2);
    std::memcpy(out.factors, file, 16);
    take_pairs(file + 16, out.words);
}

// 64 bytes of digits, d.
void take_tq2_0(const uint8_t* file, RowBlock& out) {
    take_unit(file + 64, out.units);
    take_pairs(file, out.words);
}

// d, the high pairs of eight 6-bit scales, their low nibbles, 128 bytes of codes.
void take_iq4_xs(const uint8_t* file, RowBlock& out) {
    take_unit(file, out.units);
    const int high = file[2] | file[3] << 8;
    for (int step = 0; step < 8; ++step) {
        const int low = file[4 + step / 2] >> 4 * (step % 2) & 15;
        out.factors[step] = static_cast<uint8_t>((low | (high >> 2 * step & 3) << 4) - 32);
        take_nibbles(file + 8 + 16 * step, out.words + kWordsOfStep * step);
    }
}

template <Type kType>
void take_block(const uint8_t* file, RowBlock& out) {
    switch (kType) {
        case Type::Q2_K: return take_q2_k(file, out);
        case Type::Q3_K: return take_q3_k(file, out);
        case Type::Q4_K: return take_q45_k<false>(file, out);
        case Type::Q5_K: return take_q45_k<true>(file, out);
        case Type::Q6_K: return take_q6_k(file, out);
        case Type::IQ4_XS: return take_iq4_xs(file, out);
        case Type::TQ2_0: return take_tq2_0(file, out);
        default: return take_plain<kType>(file, out);
    }
}

// 32 columns of quants into lane `lane` of zeroed memory.
template <Type kType>
void put_step(const uint32_t* words, uint8_t* high, uint8_t* quants, int lane) {
    constexpr TypeInfo info = type_info(kType);
    constexpr int kLow = info.low_bits();
    uint32_t* stored = reinterpret_cast<uint32_t*>(quants) + lane;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(high) + lane;
    for (int i = 0; i < 4; ++i) {
        const int first = pair_group(info, i, 0), second = pair_group(info, i, 1);
        if constexpr (kLow == 8) {
            stored[first * kTileRows] = reorder(words[first]);
            stored[second * kTileRows] = reorder(words[second]);
        } else if constexpr (kLow == 4) {
            stored[i * kTileRows] = reorder((words[first] & kNibbles) | (words[second] & kNibbles) << 4);
        }
    }
    for (int quad = 0; quad < 2; ++quad) {
        const uint32_t* w = words + 4 * quad;
        const auto joined = [w](int from) {
            return (w[0] >> from & kPairs) | (w[1] >> from & kPairs) << 2 | (w[2] >> from & kPairs) << 4 |
                   (w[3] >> from & kPairs) << 6;
        };
        if constexpr (kLow == 2) stored[quad * kTileRows] = reorder(joined(0));
        if constexpr (info.high_bits() == 2) pairs[quad * kTileRows] = reorder(joined(4));
    }
    if constexpr (info.high_bits() == 1) {
        for (int group = 0; group < kWordsOfStep; ++group) {
            // The product gathers the lowest bits of four bytes in its highest byte, reordered.
            const uint32_t bits = (words[group] >> kLow & kOnes) * 0x01040208u >> 24 & 15;
            high[8 * group + lane / 2] |= bits << lane % 2 * 4;
        }
    }
}

// A row's block into lane `lane` of a tile's zeroed block.
template <Type kType>
void put_block(const RowBlock& row, uint8_t* block, int lane) {
    constexpr TypeInfo info = type_info(kType);
    constexpr int kUnit = info.scales == Scales::Power ? 1 : 2;
    std::memcpy(block + kUnit * lane, row.units, kUnit);
    if (info.minimum) std::memcpy(block + 32 + 2 * lane, row.units + 2, 2);
    constexpr int kFactors = info.columns / info.part * info.part_bytes() / kTileRows;
    for (int i = 0; i < kFactors; ++i) block[info.factors_offset() + i * kTileRows + lane] = row.factors[i];
    for (int step = 0; step < info.steps(); ++step)
        put_step<kType>(row.words + kWordsOfStep * step, block + info.high_offset() + step * info.high_bytes(),
                        block + info.quants_offset() + step * info.quant_bytes(), lane);
}

struct Repack {
    const uint8_t* source;
    int64_t rows, columns, row_bytes;
    uint8_t* tiles;
};

template <class Element>
void put_dense(const Repack& job, const uint8_t* row, uint8_t* tile, int lane) {
    for (int64_t column = 0; column < job.columns; ++column)
        std::memcpy(tile + sizeof(Element) * (column * kTileRows + lane), row + sizeof(Element) * column, sizeof(Element));
}

template <Type kType>
void repack_tile(const Repack& job, int64_t index) {
    constexpr TypeInfo info = type_info(kType);
    const int64_t bytes = info.tile_bytes(job.columns, 0), first = index * kTileRows;
    const int lanes = static_cast<int>(job.rows - first < kTileRows ? job.rows - first : kTileRows);
    const uint8_t* source = job.source + first * job.row_bytes;
    uint8_t* tile = job.tiles + index * bytes;
    std::memset(tile, 0, bytes);
    if constexpr (!info.quantized()) {
        using Element = std::conditional_t<info.bits == 32, uint32_t, uint16_t>;
        for (int lane = 0; lane < lanes; ++lane) put_dense<Element>(job, source + lane * job.row_bytes, tile, lane);
    } else {
        RowBlock row;
        for (int64_t b = 0; b < job.columns / info.columns; ++b)
            for (int lane = 0; lane < lanes; ++lane) {
                take_block<kType>(source + lane * job.row_bytes + b * info.file_bytes, row);
                put_block<kType>(row, tile + b * info.block_bytes(), lane);
            }
    }
}

using TileRepacker = void (*)(const Repack& job, int64_t index);

TileRepacker find_repacker(Type type) {
    switch (type) {
        case Type::F16: return repack_tile<Type::F16>;
        case Type::BF16: return repack_tile<Type::BF16>;
        case Type::Q4_0: return repack_tile<Type::Q4_0>;
        case Type::Q4_1: return repack_tile<Type::Q4_1>;
        case Type::Q5_0: return repack_tile<Type::Q5_0>;
        case Type::Q5_1: return repack_tile<Type::Q5_1>;
        case Type::Q8_0: return repack_tile<Type::Q8_0>;
        case Type::Q2_K: return repack_tile<Type::Q2_K>;
        case Type::Q3_K: return repack_tile<Type::Q3_K>;
        case Type::Q4_K: return repack_tile<Type::Q4_K>;
        case Type::Q5_K: return repack_tile<Type::Q5_K>;
        case Type::Q6_K: return repack_tile<Type::Q6_K>;
        case Type::IQ4_NL: return repack_tile<Type::IQ4_NL>;
        case Type::IQ4_XS: return repack_tile<Type::IQ4_XS>;
        case Type::MXFP4: return repack_tile<Type::MXFP4>;
        case Type::TQ2_0: return repack_tile<Type::TQ2_0>;
        default: return repack_tile<Type::F32>;
    }
}

// Groups of integers, as aph_repack_groups has them.
struct GroupRepack {
    const uint8_t* codes;
    const uint8_t* scales;
    const uint8_t* zeros;
    const float* table;
    int64_t rows, columns, group;
    uint8_t* tiles;
};

// Four columns a word out of two bytes, the even column low.
uint32_t spread_nibbles(const uint8_t* bytes) {
    const uint32_t pair = bytes[0] | static_cast<uint32_t>(bytes[1]) << 8;
    return (pair & 15) | (pair & 0xf0) << 4 | (pair & 0xf00) << 8 | (pair & 0xf000) << 12;
}

// Of 32 columns of a row.
template <Type kType>
void put_group_step(const uint8_t* codes, uint8_t* step, int lane) {
    constexpr TypeInfo info = type_info(kType);
    if constexpr (info.codes == Codes::Float8) {
        for (int column = 0; column < kBlock; ++column) step[column * kTileRows + lane] = codes[column];
        return;
    }
    uint32_t words[kWordsOfStep];
    for (int i = 0; i < kWordsOfStep; ++i)
        words[i] = info.bits == 4 ? spread_nibbles(codes + 2 * i) : load_word(codes + 4 * i);
    put_step<kType>(words, step, step + info.high_bytes(), lane);
}

template <Type kType>
void repack_group_tile(const GroupRepack& job, int64_t index) {
    constexpr TypeInfo info = type_info(kType);
    const int64_t first = index * kTileRows, groups = job.columns / job.group, block_bytes = info.block_bytes(job.group);
    const int lanes = static_cast<int>(job.rows - first < kTileRows ? job.rows - first : kTileRows);
    uint8_t* tile = job.tiles + index * info.tile_bytes(job.columns, job.group);
    std::memset(tile, 0, info.tile_bytes(job.columns, job.group));
    if (info.table_bytes() > 0) std::memcpy(tile, job.table, info.table_bytes());
    constexpr int kUnit = info.unit_bytes() / kTileRows, kPerByte = info.bits == 4 ? 2 : 1;
    for (int64_t step = 0; step < job.columns / kBlock; ++step) {
        const int64_t group = step * kBlock / job.group;
        uint8_t* block = tile + info.table_bytes() + group * block_bytes;
        uint8_t* own = block + info.factors_offset() + step * kBlock % job.group / kBlock * info.group_step_bytes();
        for (int lane = 0; lane < lanes; ++lane) {
            const int64_t row = first + lane;
            std::memcpy(block + kUnit * lane, job.scales + (row * groups + group) * kUnit, kUnit);
            if (info.minimum) block[info.unit_bytes() + lane] = job.zeros[row * groups + group];
            put_group_step<kType>(job.codes + (row * job.columns + step * kBlock) / kPerByte, own, lane);
        }
    }
}

// Scales of 16 bits are bytes here, whatever they mean.
void (*find_group_repacker(Type type))(const GroupRepack& job, int64_t index) {
    switch (type) {
        case Type::Int2F16:
        case Type::Int2BF16: return repack_group_tile<Type::Int2F16>;
        case Type::Int3F16:
        case Type::Int3BF16: return repack_group_tile<Type::Int3F16>;
        case Type::Int4F16:
        case Type::Int4BF16: return repack_group_tile<Type::Int4F16>;
        case Type::Int4F32: return repack_group_tile<Type::Int4F32>;
        case Type::Int8F32: return repack_group_tile<Type::Int8F32>;
        case Type::Float8F32: return repack_group_tile<Type::Float8F32>;
        case Type::Table4F16: return repack_group_tile<Type::Table4F16>;
        case Type::Table4F32: return repack_group_tile<Type::Table4F32>;
        default: return repack_group_tile<Type::Int8F16>;
    }
}

template <class F>
void for_each_tile(int64_t rows, F&& f) {
    parallel_for(
        tile_count(rows), [](void* context, int64_t tile, int) { (*static_cast<F*>(context))(tile); }, &f);
}

float dense_value(Type type, const uint8_t* tile, int64_t index) {
    if (type == Type::F32) return bits_to_float(load_word(tile + 4 * index));
    uint16_t bits;
    std::memcpy(&bits, tile + 2 * index, 2);
    return type == Type::F16 ? half_to_float(bits) : bfloat_to_float(bits);
}

float half_at(const uint8_t* bytes) {
    uint16_t bits;
    std::memcpy(&bits, bytes, 2);
    return half_to_float(bits);
}

// Scale and minimum of a part of a lane, counted from the block's first.
struct PartScale {
    float scale, minimum;
};

float group_scale(const TypeInfo& info, const uint8_t* block, int lane) {
    if (info.scales == Scales::SingleGroup) return bits_to_float(load_word(block + 4 * lane));
    uint16_t bits;
    std::memcpy(&bits, block + 2 * lane, 2);
    return info.scales == Scales::BfloatGroup ? bfloat_to_float(bits) : half_to_float(bits);
}

PartScale part_of(const TypeInfo& info, const uint8_t* block, int part, int lane) {
    if (info.grouped()) {
        const float scale = group_scale(info, block, lane);
        return {scale, info.minimum ? -scale * block[info.unit_bytes() + lane] : 0};
    }
    if (info.scales == Scales::Power)
        return {bits_to_float(block[lane] == 0 ? 0 : static_cast<uint32_t>(block[lane] - 1) << 23), 0};
    const float unit = half_at(block + 2 * lane), low = info.minimum ? half_at(block + 32 + 2 * lane) : 0;
    const uint8_t* factors = block + info.factors_offset() + part * info.part_bytes() + lane;
    switch (info.scales) {
        case Scales::Signed: return {unit * static_cast<int8_t>(*factors), 0};
        case Scales::Pair: return {unit * factors[0], low * factors[16]};
        case Scales::NibblePair: return {unit * (*factors & 15), low * (*factors >> 4)};
        default: return {unit, low};
    }
}

int quant_of(const TypeInfo& info, const uint8_t* block, int64_t column, int lane) {
    const int64_t step = column / kBlock;
    const int group = column % kBlock / 4, byte = lane * 4 + kByteOf[column % 4];
    const uint8_t* high = block + info.high_offset() + step * (info.grouped() ? info.group_step_bytes() : info.high_bytes());
    const uint8_t* quants =
        (info.grouped() ? high + info.high_bytes() : block + info.quants_offset() + step * info.quant_bytes()) + byte;
    int quant = 0;
    if (info.low_bits() == 8) quant = quants[64 * group];
    if (info.low_bits() == 2) quant = quants[64 * (group / 4)] >> 2 * (group % 4) & 3;
    if (info.low_bits() == 4) {
        const bool halves = info.part == kBlock;  // see pair_group
        quant = quants[64 * (halves ? group % 4 : group / 2)] >> 4 * (halves ? group / 4 : group % 2) & 15;
    }
    if (info.high_bits() == 2) quant |= (high[64 * (group / 4) + byte] >> 2 * (group % 4) & 3) << 4;
    if (info.high_bits() == 1) quant |= (high[8 * group + byte / 8] >> byte % 8 & 1) << info.low_bits();
    return info.values != nullptr ? info.values[quant] : quant;
}

}  // namespace

// Dequantizes one row: out[columns].
void tile_row(const TileWeight& weight, int64_t row, float* out) {
    const TypeInfo info = type_info(weight.type);
    if (info.decoded()) return decoded_row(weight, row, out);
    const uint8_t* tile = weight.tiles + row / kTileRows * weight.tile_bytes();
    const int lane = static_cast<int>(row % kTileRows);
    if (!info.quantized()) {
        for (int64_t column = 0; column < weight.columns; ++column)
            out[column] = dense_value(weight.type, tile, column * kTileRows + lane);
        return;
    }
    const int64_t block_columns = info.block_columns(weight.group), block_bytes = info.block_bytes(weight.group);
    const float* table = reinterpret_cast<const float*>(tile);
    tile += info.table_bytes();
    for (int64_t first = 0; first < weight.columns; first += info.part) {
        const uint8_t* block = tile + first / block_columns * block_bytes;
        const int64_t column = first % block_columns;
        const PartScale part = part_of(info, block, static_cast<int>(column / info.part), lane);
        for (int i = 0; i < info.part; ++i) {
            float value;
            if (info.codes == Codes::Float8) {
                const uint8_t* step = block + info.factors_offset() + column / kBlock * info.group_step_bytes();
                value = float8_to_float(step[(column + i) % kBlock * kTileRows + lane]);
            } else {
                const int quant = quant_of(info, block, column + i, lane);
                value = info.codes == Codes::Table ? table[quant] : static_cast<float>(quant - info.offset);
            }
            out[first + i] = value * part.scale + part.minimum;
        }
    }
}

}  // namespace aph

// Bytes of the tiles of a [rows, columns] weight; 0 for a type or shape that has no tile layout, and for the types of a
// grid until aph_set_grid has told its points. `group` is that of types of integer groups.
APH_API int64_t aph_tiles_bytes(int32_t type, int64_t rows, int64_t columns, int64_t group) {
    const aph::TypeInfo info = aph::type_info(static_cast<aph::Type>(type));
    if (info.bits == 0 || rows <= 0 || columns <= 0) return 0;
    if (!aph::grid_known(static_cast<aph::Type>(type))) return 0;
    if (info.grouped() && (group <= 0 || group % aph::kBlock != 0)) return 0;
    if (columns % info.block_columns(group) != 0) return 0;
    return aph::tile_count(rows) * info.tile_bytes(columns, group);
}

// Repacks a weight from its file's rows (contiguous, columns a multiple of the type's) into `tiles`.
APH_API void aph_repack(int32_t type, const uint8_t* source, int64_t rows, int64_t columns, uint8_t* tiles) {
    const aph::Type kind = static_cast<aph::Type>(type);
    const aph::TypeInfo info = aph::type_info(kind);
    const aph::Repack job{source, rows, columns, columns / info.columns * info.file_bytes, tiles};
    if (info.decoded()) {
        const aph::FileRows file{source, rows, columns, job.row_bytes};
        return aph::for_each_tile(rows, [&](int64_t index) { aph::repack_decoded_tile(kind, file, index, tiles); });
    }
    const aph::TileRepacker tile = aph::find_repacker(kind);
    aph::for_each_tile(rows, [&](int64_t index) { tile(job, index); });
}

// Repacks groups: codes [rows, columns] uint8, or of 4 bits [rows, columns / 2] with the even column in the low nibble,
// scales [rows, columns / group] f16, bf16 or f32, of integers zeros [rows, columns / group] uint8, table [16] or null.
APH_API void aph_repack_groups(int32_t type, const uint8_t* codes, const uint8_t* scales, const uint8_t* zeros,
                               const float* table, int64_t rows, int64_t columns, int64_t group, uint8_t* tiles) {
    const aph::GroupRepack job{codes, scales, zeros, table, rows, columns, group, tiles};
    const auto tile = aph::find_group_repacker(static_cast<aph::Type>(type));
    aph::for_each_tile(rows, [&](int64_t index) { tile(job, index); });
}
