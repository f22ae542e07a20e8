// Blocks of grids and ternary digits, from files to tiles and from tiles to values. Formats: the GGUF specification
// (ggml's block_iq2_xxs, …, block_tq1_0).
#include "grids.h"

#include <cstring>

#include "api.h"
#include "half.h"

namespace aph {

GridPoints grids[6];

namespace {

constexpr bool layout_fits(Type type) {
    const GridInfo grid = grid_info(type);
    const int parts = has_scale_bytes(type) ? kGridColumns / type_info(type).part : 0;
    return type_info(type).decoded_bytes == grid.scales_offset() + parts / 2 * kTileRows;
}
static_assert(layout_fits(Type::IQ2_XXS) && layout_fits(Type::IQ2_XS) && layout_fits(Type::IQ2_S));
static_assert(layout_fits(Type::IQ3_XXS) && layout_fits(Type::IQ3_S));
static_assert(layout_fits(Type::IQ1_S) && layout_fits(Type::IQ1_M));

// Byte of a word where column c of a group of four lies, and the reverse.
constexpr int kByteOf[4] = {0, 2, 1, 3};
// Where the code of a column lies in the word of a point of 8 values.
constexpr int kCodeBits[8] = {0, 2, 8, 10, 4, 6, 12, 14};

uint32_t word_at(const uint8_t* bytes) {
    uint32_t word;
    std::memcpy(&word, bytes, sizeof word);
    return word;
}

uint16_t short_at(const uint8_t* bytes) { return static_cast<uint16_t>(bytes[0] | bytes[1] << 8); }
int nibble_at(const uint8_t* bytes, int index) { return bytes[index / 2] >> index % 2 * 4 & 15; }

// Seven signs and the eighth that makes the number of those that are set even.
uint8_t even_signs(uint32_t seven) {
    const uint32_t kept = seven & 127;
    return static_cast<uint8_t>(kept | static_cast<uint32_t>(__builtin_parity(kept)) << 7);
}

// One row's block, taken apart.
struct GridRow {
    uint16_t unit;        // f16
    uint16_t numbers[64];  // of points
    uint8_t signs[32];     // of 8 columns, the first lowest
    uint8_t shifts[32];    // of a point: 1 down, 0 up
    uint8_t scales[16];    // of parts
};

// Words of 4 x 7 signs and a scale.
void take_sign_words(const uint8_t* words, int stride, GridRow& out) {
    for (int step = 0; step < kGridSteps; ++step) {
        const uint32_t word = word_at(words + stride * step);
        for (int i = 0; i < 4; ++i) out.signs[4 * step + i] = even_signs(word >> 7 * i);
        out.scales[step] = static_cast<uint8_t>(word >> 28);
    }
}

void take_scales(const uint8_t* nibbles, int count, GridRow& out) {
    for (int part = 0; part < count; ++part) out.scales[part] = static_cast<uint8_t>(nibble_at(nibbles, part));
}

// d, then for every 32 columns four points and a word of signs and scale.
void take_iq2_xxs(const uint8_t* file, GridRow& out) {
    out.unit = short_at(file);
    for (int i = 0; i < 32; ++i) out.numbers[i] = file[2 + 8 * (i / 4) + i % 4];
    take_sign_words(file + 6, 8, out);
}

// d, 32 words of 9 bits of a number and 7 signs, 16 scales.
void take_iq2_xs(const uint8_t* file, GridRow& out) {
    out.unit = short_at(file);
    for (int i = 0; i < 32; ++i) {
        const uint16_t word = short_at(file + 2 + 2 * i);
        out.numbers[i] = word & 511;
        out.signs[i] = even_signs(word >> 9);
    }
    take_scales(file + 66, 16, out);
}

// d, 32 bytes of numbers, 32 of signs, 8 of the numbers' two upper bits, 16 scales.
void take_iq2_s(const uint8_t* file, GridRow& out) {
    out.unit = short_at(file);
    for (int i = 0; i < 32; ++i)
        out.numbers[i] = static_cast<uint16_t>(file[2 + i] | (file[66 + i / 4] >> i % 4 * 2 & 3) << 8);
    std::memcpy(out.signs, file + 34, 32);
    take_scales(file + 74, 16, out);
}

// d, 64 bytes of numbers, 8 words of signs and scales.
void take_iq3_xxs(const uint8_t* file, GridRow& out) {
    out.unit = short_at(file);
    for (int i = 0; i < 64; ++i) out.numbers[i] = file[2 + i];
    take_sign_words(file + 66, 4, out);
}

// d, 64 bytes of numbers, 8 of their ninth bits, 32 of signs, 8 scales.
void take_iq3_s(const uint8_t* file, GridRow& out) {
    out.unit = short_at(file);
    for (int i = 0; i < 64; ++i)
        out.numbers[i] = static_cast<uint16_t>(file[2 + i] | (file[66 + i / 8] >> i % 8 & 1) << 8);
    std::memcpy(out.signs, file + 74, 32);
    take_scales(file + 106, 8, out);
}

// d, 32 bytes of numbers, 8 words of 4 x 3 upper bits, 3 bits of scale and the shift.
void take_iq1_s(const uint8_t* file, GridRow& out) {
    out.unit = short_at(file);
    for (int i = 0; i < 32; ++i) {
        const uint16_t word = short_at(file + 34 + 2 * (i / 4));
        out.numbers[i] = static_cast<uint16_t>(file[2 + i] | (word >> i % 4 * 3 & 7) << 8);
        out.shifts[i] = static_cast<uint8_t>(word >> 15);
        out.scales[i / 4] = word >> 12 & 7;
    }
}

// 32 bytes of numbers, 32 nibbles of 3 upper bits and the shift, 4 words of 4 x 3 bits of scales, whose highest nibbles
// are d.
void take_iq1_m(const uint8_t* file, GridRow& out) {
    int unit = 0;
    for (int i = 0; i < 4; ++i) unit |= short_at(file + 48 + 2 * i) >> 12 << 4 * i;
    out.unit = static_cast<uint16_t>(unit);
    for (int i = 0; i < 32; ++i) {
        const int upper = nibble_at(file + 32, i);
        out.numbers[i] = static_cast<uint16_t>(file[i] | (upper & 7) << 8);
        out.shifts[i] = static_cast<uint8_t>(upper >> 3);
    }
    for (int part = 0; part < 16; ++part) out.scales[part] = short_at(file + 48 + part / 4 * 2) >> part % 4 * 3 & 7;
}

void take_grid(Type type, const uint8_t* file, GridRow& out) {
    switch (type) {
        case Type::IQ2_XXS: return take_iq2_xxs(file, out);
        case Type::IQ2_XS: return take_iq2_xs(file, out);
        case Type::IQ2_S: return take_iq2_s(file, out);
        case Type::IQ3_XXS: return take_iq3_xxs(file, out);
        case Type::IQ3_S: return take_iq3_s(file, out);
        case Type::IQ1_S: return take_iq1_s(file, out);
        default: return take_iq1_m(file, out);
    }
}

// The bits that are kept above a number's low byte.
int upper_of(Type type, const GridRow& row, int point) {
    const int number = row.numbers[point] >> 8;
    if (type == Type::IQ1_M || (type == Type::IQ1_S && point % 4 == 3)) return number | row.shifts[point] << 3;
    return type == Type::IQ1_S ? number | (row.scales[point / 4] >> point % 4 & 1) << 3 : number;
}

// The four signs of a group in the order of a word's bytes.
int group_signs(const GridRow& row, int group) {
    const int signs = row.signs[group / 2] >> group % 2 * 4;
    return (signs & 9) | (signs & 2) << 1 | (signs & 4) >> 1;
}

// Into lane `lane` of a tile's zeroed block.
void put_grid(Type type, const GridRow& row, uint8_t* block, int lane) {
    const GridInfo grid = grid_info(type);
    std::memcpy(block + 2 * lane, &row.unit, 2);
    for (int point = 0; point < kGridColumns / grid.dimensions; ++point) {
        const int plane = point / 4, byte = 4 * lane + point % 4, bit = plane * grid.upper_bits;
        block[kUnitBytes + 64 * plane + byte] = static_cast<uint8_t>(row.numbers[point]);
        if (grid.upper_bits > 0)
            block[grid.upper_offset() + bit / 8 * 64 + byte] |= static_cast<uint8_t>(upper_of(type, row, point) << bit % 8);
    }
    for (int group = 0; group < 8 * kGridSteps && grid.signs != Signs::Shift; ++group) {
        int signs = group_signs(row, group);
        if (grid.signs == Signs::Even && group % 2 == 1)
            signs = (signs & 7) | (row.scales[group / 8] >> group % 8 / 2 & 1) << 3;
        block[grid.signs_offset() + 8 * group + lane / 2] |= static_cast<uint8_t>(signs << lane % 2 * 4);
    }
    for (int part = 0; part < kGridColumns / type_info(type).part && has_scale_bytes(type); ++part)
        block[grid.scales_offset() + part / 2 * kTileRows + lane] |= static_cast<uint8_t>(row.scales[part] << part % 2 * 4);
}

// The reverse.
void read_grid(Type type, const uint8_t* block, int lane, GridRow& out) {
    const GridInfo grid = grid_info(type);
    out.unit = short_at(block + 2 * lane);
    std::memset(out.scales, 0, sizeof out.scales);
    for (int point = 0; point < kGridColumns / grid.dimensions; ++point) {
        const int plane = point / 4, byte = 4 * lane + point % 4, bit = plane * grid.upper_bits;
        int upper = 0;
        if (grid.upper_bits > 0)
            upper = block[grid.upper_offset() + bit / 8 * 64 + byte] >> bit % 8 & ((1 << grid.upper_bits) - 1);
        const bool shifted = grid.signs == Signs::Shift;
        out.numbers[point] = static_cast<uint16_t>(block[kUnitBytes + 64 * plane + byte] | (shifted ? upper & 7 : upper) << 8);
        if (shifted) out.shifts[point] = static_cast<uint8_t>(upper >> 3);
        if (type == Type::IQ1_S && point % 4 < 3) out.scales[point / 4] |= static_cast<uint8_t>(upper >> 3 << point % 4);
    }
    if (type == Type::IQ1_S)
        for (int point = 0; point < 32; ++point) out.shifts[point] = out.shifts[point | 3];
    for (int group = 0; group < 8 * kGridSteps && grid.signs != Signs::Shift; ++group) {
        const int bits = block[grid.signs_offset() + 8 * group + lane / 2] >> lane % 2 * 4 & 15;
        const int signs = (bits & 9) | (bits & 2) << 1 | (bits & 4) >> 1;
        uint8_t& eight = out.signs[group / 2];
        eight = static_cast<uint8_t>(group % 2 == 0 ? signs : eight | signs << 4);
        if (grid.signs == Signs::Even && group % 2 == 1) {
            out.scales[group / 8] |= static_cast<uint8_t>(bits >> 3 << group % 8 / 2);
            eight = even_signs(eight);
        }
    }
    for (int part = 0; part < kGridColumns / type_info(type).part && has_scale_bytes(type); ++part)
        out.scales[part] = block[grid.scales_offset() + part / 2 * kTileRows + lane] >> part % 2 * 4 & 15;
}

void grid_values(Type type, const GridRow& row, float* out) {
    const GridInfo grid = grid_info(type);
    const uint16_t* points = grids[grid_index(type)].words;
    for (int column = 0; column < kGridColumns; ++column) {
        const int point = column / grid.dimensions, place = column % grid.dimensions;
        const int bit = grid.dimensions == 8 ? kCodeBits[place] : 4 * place;
        int code = points[row.numbers[point]] >> bit & (grid.sign_code() - 1);
        const int sign = grid.signs == Signs::Shift ? row.shifts[point] : row.signs[column / 8] >> column % 8 & 1;
        code |= sign * grid.sign_code();
        const float scale = grid.unit * static_cast<float>(2 * row.scales[column / type_info(type).part] + 1);
        out[column] = static_cast<float>(grid.values[code] - kDecodedOffset) * (half_to_float(row.unit) * scale);
    }
}

// The digit at `place` of a byte that holds them as a fraction of 256.
int digit_of(uint8_t byte, int place) {
    constexpr uint8_t kPowers[5] = {1, 3, 9, 27, 81};
    return static_cast<uint8_t>(byte * kPowers[place]) * 3 >> 8;
}

// Byte of a block in which the digit of column `column` of a row's first five groups lies.
int digit_byte(int column, int lane) { return kUnitBytes + column / 20 * 64 + 4 * lane + kByteOf[column % 4]; }

// 32 bytes of five digits, 16 of five, 4 of four: of each run the first digits, then the second; d.
void take_digits(const uint8_t* file, uint8_t* digits) {
    constexpr struct {
        int first, bytes, digits;
    } kRuns[3] = {{0, 32, 5}, {32, 16, 5}, {48, 4, 4}};
    for (const auto& run : kRuns)
        for (int place = 0; place < run.digits; ++place)
            for (int i = 0; i < run.bytes; ++i) *digits++ = static_cast<uint8_t>(digit_of(file[run.first + i], place));
}

void put_ternary(const uint8_t* file, uint8_t* block, int lane) {
    constexpr int kDigits = 5;
    uint8_t digits[kGridColumns];
    take_digits(file, digits);
    std::memcpy(block + 2 * lane, file + 52, 2);
    for (int first = 0; first < kGridColumns; first += 4 * kDigits)
        for (int column = first; column < first + 4; ++column) {
            int number = 0;
            for (int place = 0; place < kDigits; ++place) {
                const int at = column + 4 * place;
                number = 3 * number + (at < kGridColumns ? digits[at] : 0);
            }
            block[digit_byte(column, lane)] = static_cast<uint8_t>((number * 256 + 242) / 243);
        }
}

void ternary_values(const uint8_t* block, int lane, float* out) {
    const float unit = half_to_float(short_at(block + 2 * lane));
    for (int column = 0; column < kGridColumns; ++column)
        out[column] = static_cast<float>(digit_of(block[digit_byte(column, lane)], column / 4 % 5) - 1) * unit;
}

}  // namespace

void repack_decoded_tile(Type type, const FileRows& file, int64_t index, uint8_t* tiles) {
    const TypeInfo info = type_info(type);
    const int64_t bytes = info.tile_bytes(file.columns, 0), first = index * kTileRows;
    const int lanes = static_cast<int>(file.rows - first < kTileRows ? file.rows - first : kTileRows);
    uint8_t* tile = tiles + index * bytes;
    std::memset(tile, 0, bytes);
    GridRow row{};
    for (int64_t b = 0; b < file.columns / kGridColumns; ++b)
        for (int lane = 0; lane < lanes; ++lane) {
            const uint8_t* source = file.source + (first + lane) * file.row_bytes + b * info.file_bytes;
            uint8_t* block = tile + b * info.decoded_bytes;
            if (type == Type::TQ1_0) {
                put_ternary(source, block, lane);
            } else {
                take_grid(type, source, row);
                put_grid(type, row, block, lane);
            }
        }
}

void decoded_row(const TileWeight& weight, int64_t row, float* out) {
    const TypeInfo info = type_info(weight.type);
    const uint8_t* tile = weight.tiles + row / kTileRows * weight.tile_bytes();
    const int lane = static_cast<int>(row % kTileRows);
    GridRow found{};
    for (int64_t b = 0; b < weight.columns / kGridColumns; ++b, out += kGridColumns) {
        const uint8_t* block = tile + b * info.decoded_bytes;
        if (weight.type == Type::TQ1_0) {
            ternary_values(block, lane, out);
        } else {
            read_grid(weight.type, block, lane, found);
            grid_values(weight.type, found, out);
        }
    }
}

}  // namespace aph

// Tells the points of the grid of `type`, as grids.h describes them, before matrices of that type are repacked. Returns
// how many the type has; nothing is told if that is not `count`.
APH_API int64_t aph_set_grid(int32_t type, const uint16_t* points, int64_t count) {
    const aph::Type kind = static_cast<aph::Type>(type);
    const int index = aph::grid_index(kind);
    if (index < 0) return 0;
    aph::GridPoints& grid = aph::grids[index];
    if (count == aph::grid_info(kind).points && grid.count == 0) {
        std::memcpy(grid.words, points, static_cast<size_t>(count) * sizeof *points);
        grid.count = count;
    }
    return aph::grid_info(kind).points;
}
