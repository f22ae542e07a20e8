// Kernels over single rows: packing for products, norm, rotary, cache writes. Included after a simd_*.h and lane_math.h.
#pragma once
#include <cstring>

#include "half.h"
#include "kernels.h"

namespace aph {
namespace {

// Quantizes 32 values to `kBits` bits, scale = largest magnitude / largest quant. A value that is not finite makes the
// scale so too, and thereby the logits of its own row.
template <int kBits>
inline void quantize_block(const float* x, int32_t* quants, float& scale, int32_t* sums) {
    constexpr float kLargest = kBits == 16 ? kLargestInt16 : kLargestInt8;
    const Vec a = load(x), b = load(x + 16);
    const float largest = largest_magnitude(a, b);
    const Vec inverse = splat(largest > 0 ? kLargest / largest : 0.0f);
    const IVec qa = to_int(mul(a, inverse)), qb = to_int(mul(b, inverse));
    scale = largest * (1.0f / kLargest);
    sums[0] = sum(qa);
    sums[1] = sum(qb);
    if (kBits == 16) {
        store_shorts(reinterpret_cast<int16_t*>(quants), qa);
        store_shorts(reinterpret_cast<int16_t*>(quants) + 16, qb);
    } else {
        store_bytes(reinterpret_cast<int8_t*>(quants), qa);
        store_bytes(reinterpret_cast<int8_t*>(quants) + 16, qb);
        // Bytes of a word hold columns 0 2 1 3, as in the tiles.
        for (int i = 0; i < 8; ++i) {
            const uint32_t w = static_cast<uint32_t>(quants[i]);
            quants[i] = static_cast<int32_t>((w & 0xff0000ff) | (w & 0xff00) << 8 | (w >> 8 & 0xff00));
        }
    }
}

// pack_quantized for eight rows, defined where there are paired dots.
template <int kBits>
void pack_eight(const float* x, int64_t stride, int32_t* words, float* meta);

// Packs 32 columns of a group's `width` rows: row m at x + m * stride. words and meta are the block's.
template <int kBits>
inline void pack_quantized(const float* x, int64_t stride, int width, int32_t* words, float* meta) {
    if constexpr (kPairedDots)
        if (width == 8) return pack_eight<kBits>(x, stride, words, meta);
    constexpr int kWords = kBits;  // 32 values of kBits bits
    int32_t quants[kWords];
    for (int m = 0; m < width; ++m) {
        float scale;
        int32_t sums[2];
        int32_t* target = width == 1 ? words : quants;
        quantize_block<kBits>(x + m * stride, target, scale, sums);
        if (width > 1)
            for (int i = 0; i < kWords; ++i) words[i * width + m] = quants[i];
        meta[m] = scale;
        meta[width + m] = scale * static_cast<float>(sums[0] + sums[1]);
        const int32_t negative[3] = {-sums[0] - sums[1], -sums[0], -sums[1]};
        for (int i = 0; i < 3; ++i) std::memcpy(meta + (2 + i) * width + m, negative + i, sizeof *negative);
    }
}

// Packs block `block` of 32 columns for the group that starts at `row`; x points at the block's first column.
inline void pack_block(const float* x, int64_t stride, int64_t row, int64_t block, const PackedRows& out) {
    const int width = group_width(row, out.rows);
    int32_t* words = out.words + row * out.row_words();
    if (out.kind == Activation::Float) {
        float* floats = reinterpret_cast<float*>(words) + block * kBlock * width;
        for (int m = 0; m < width; ++m)
            for (int i = 0; i < kBlock; ++i) floats[i * width + m] = x[m * stride + i];
        return;
    }
    float* meta = out.meta + row * out.row_meta() + block * kMeta * width;
    if (out.kind == Activation::Int16)
        pack_quantized<16>(x, stride, width, words + block * 16 * width, meta);
    else
        pack_quantized<8>(x, stride, width, words + block * 8 * width, meta);
}

void pack_group(const float* x, int64_t stride, int64_t group, const PackedRows& out) {
    const int64_t row = group_start(group, out.rows);
    for (int64_t block = 0; block < out.columns / kBlock; ++block)
        pack_block(x + row * stride + block * kBlock, stride, row, block, out);
}

// Sum of f(x) over a multiple of 16 values, in two chains.
template <class F>
inline float sum_of(const float* x, int64_t columns, F&& add_to) {
    Vec even = zero(), odd = zero();
    int64_t i = 0;
    for (; i + 32 <= columns; i += 32) {
        even = add_to(even, load(x + i));
        odd = add_to(odd, load(x + i + 16));
    }
    if (i < columns) even = add_to(even, load(x + i));
    return sum(add(even, odd));
}

void rms_norm(const float* x, const float* weight, float eps, int64_t columns, float* out) {
    const float squares = sum_of(x, columns, [](Vec total, Vec a) { return fma(a, a, total); });
    const float mean = squares / static_cast<float>(columns);
    const Vec inverse = splat(1.0f / __builtin_sqrtf(mean + eps));
    for (int64_t i = 0; i < columns; i += 16) store(out + i, mul(mul(load(x + i), inverse), load(weight + i)));
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t columns, float* out) {
    const float count = static_cast<float>(columns);
    const Vec mean = splat(sum_of(x, columns, [](Vec total, Vec a) { return add(total, a); }) / count);
    const float squares = sum_of(x, columns, [mean](Vec total, Vec a) {
        const Vec distance = sub(a, mean);
        return fma(distance, distance, total);
    });
    const Vec inverse = splat(1.0f / __builtin_sqrtf(squares / count + eps));
    for (int64_t i = 0; i < columns; i += 16) {
        const Vec normed = mul(mul(sub(load(x + i), mean), inverse), load(weight + i));
        store(out + i, bias == nullptr ? normed : add(normed, load(bias + i)));
    }
}

void add_weighted(const float* const* rows, const float* weights, int count, int64_t columns, float* out) {
    for (int64_t i = 0; i < columns; i += 16) {
        Vec total = mul(load(rows[0] + i), splat(weights[0]));
        for (int r = 1; r < count; ++r) total = fma(load(rows[r] + i), splat(weights[r]), total);
        store(out + i, add(load(out + i), total));
    }
}

void rotate(float* head, const float* cos, const float* sin, int64_t half_dim) {
    int64_t i = 0;
    for (; i + 16 <= half_dim; i += 16) {
        const Vec a = load(head + i), b = load(head + half_dim + i), c = load(cos + i), s = load(sin + i);
        store(head + i, sub(mul(a, c), mul(b, s)));
        store(head + half_dim + i, add(mul(b, c), mul(a, s)));
    }
    for (; i < half_dim; ++i) {
        const float a = head[i], b = head[half_dim + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half_dim + i] = b * cos[i] + a * sin[i];
    }
}

template <class Element>
void store_kv_as(const float* key, const float* value, int64_t head_dim, Element* block, int offset) {
    Element* keys = block + offset;
    Element* values = block + head_dim * kKvBlock + offset * head_dim;
    Element converted[16];
    for (int64_t i = 0; i < head_dim; i += 16) {
        store(converted, load(key + i));
        for (int lane = 0; lane < 16; ++lane) keys[(i + lane) * kKvBlock] = converted[lane];
        store(values + i, load(value + i));
    }
}

// What one stands for in a head whose integers are to have the Euclidean norm 32767. Not finite if a value is not.
inline float norm_unit(const float* x, int64_t head_dim) {
    Vec squares = zero();
    for (int64_t i = 0; i < head_dim; i += 16) squares = fma(load(x + i), load(x + i), squares);
    return __builtin_sqrtf(sum(squares)) * (1.0f / 32767.0f);
}

// What one stands for in a value whose integers are at most 8191. Not finite if a value is not.
inline float largest_unit(const float* x, int64_t head_dim) {
    float largest = 0;
    for (int64_t i = 0; i < head_dim; i += 16) {
        const float magnitude = largest_magnitude(load(x + i), zero());
        if (!(magnitude <= largest)) largest = magnitude;
        if (largest != largest) break;
    }
    return largest * (1.0f / kLargestValue);
}

// What one stands for in a query or key: the norm is at most 32767, and no integer above 16383. Not finite if a value is
// not.
inline float key_unit(const float* x, int64_t head_dim) {
    Vec largest = zero();  // whatever a NaN makes of it, the norm is one then
    for (int64_t i = 0; i < head_dim; i += 16) largest = max(largest, max(load(x + i), sub(zero(), load(x + i))));
    const float by_norm = norm_unit(x, head_dim), by_largest = maximum(largest) * (1.0f / kLargestKey);
    return by_largest > by_norm ? by_largest : by_norm;
}

inline Vec inverse_unit(float unit) { return splat(unit > 0 ? 1.0f / unit : 0.0f); }

void store_kv_int16(const float* key, const float* value, int64_t head_dim, char* block, int offset) {
    float* units = reinterpret_cast<float*>(block);
    units[offset] = key_unit(key, head_dim);
    units[kKvBlock + offset] = largest_unit(value, head_dim);
    const Vec to_key = inverse_unit(units[offset]), to_value = inverse_unit(units[kKvBlock + offset]);
    int16_t* keys = reinterpret_cast<int16_t*>(units + 2 * kKvBlock) + 2 * offset;
    int16_t* values = reinterpret_cast<int16_t*>(units + 2 * kKvBlock) + head_dim * kKvBlock +
                      offset / 2 * 2 * head_dim + offset % 2;
    int16_t quants[16];
    for (int64_t i = 0; i < head_dim; i += 16) {
        store_shorts(quants, to_int(mul(load(key + i), to_key)));
        for (int lane = 0; lane < 16; lane += 2) std::memcpy(keys + (i + lane) * kKvBlock, quants + lane, 4);
        store_shorts(quants, to_int(mul(load(value + i), to_value)));
        for (int lane = 0; lane < 16; ++lane) values[2 * (i + lane)] = quants[lane];
    }
}

void store_kv(const float* key, const float* value, int64_t head_dim, KvType type, void* block, int offset) {
    switch (type) {
        case KvType::Float32: return store_kv_as(key, value, head_dim, static_cast<float*>(block), offset);
        case KvType::Float16: return store_kv_as(key, value, head_dim, static_cast<uint16_t*>(block), offset);
        case KvType::Int16: return store_kv_int16(key, value, head_dim, static_cast<char*>(block), offset);
    }
}

}  // namespace
}  // namespace aph
