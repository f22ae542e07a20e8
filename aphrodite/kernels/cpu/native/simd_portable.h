// Sixteen lanes in plain C++ that compilers vectorise (SSE2, NEON). See simd_avx512.h for what the names mean.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

namespace aph {
namespace {

constexpr int kDotRows = 1;
constexpr int kFloatRows = 1;
constexpr int kResultVecs = 1;
constexpr int kLanes = 16;

struct Vec {
    float v[kLanes];
};
struct IVec {
    int32_t v[kLanes];
};
struct Bytes {
    uint8_t v[4 * kLanes];
};
struct Shorts {
    int16_t v[2 * kLanes];
};

template <class F>
inline Vec make(F lane) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = lane(i);
    return out;
}
template <class F>
inline IVec make_int(F lane) {
    IVec out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = lane(i);
    return out;
}

inline Vec splat(float x) {
    return make([=](int) { return x; });
}
inline Vec zero() { return splat(0); }
inline Vec load(const float* p) {
    return make([=](int i) { return p[i]; });
}
inline Vec load(const uint16_t* half) {
    return make([=](int i) { return half_to_float(half[i]); });
}
inline Vec load_bfloat(const uint16_t* p) {
    return make([=](int i) { return bfloat_to_float(p[i]); });
}
inline void store(float* p, const Vec& a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store(uint16_t* half, const Vec& a) {
    for (int i = 0; i < kLanes; ++i) half[i] = float_to_half(a.v[i]);
}
inline Vec add(const Vec& a, const Vec& b) {
    return make([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec sub(const Vec& a, const Vec& b) {
    return make([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec mul(const Vec& a, const Vec& b) {
    return make([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec div(const Vec& a, const Vec& b) {
    return make([&](int i) { return a.v[i] / b.v[i]; });
}
// Unfused where the processor may lack the instruction; the library is compiled without contraction.
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
#if defined(__aarch64__)
    return make([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
#else
    return make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
#endif
}
inline Vec max(const Vec& a, const Vec& b) {
    return make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
// |a| < 2^22, else as it is
inline Vec round_to_whole(const Vec& a) {
    return make([&](int i) {
        const float magic = 12582912.0f;  // 1.5 * 2^23
        const float rounded = (a.v[i] + magic) - magic;
        return a.v[i] < 4194304.0f ? rounded : a.v[i];
    });
}
inline Vec scale_by_power(const Vec& a, const Vec& n) {
    return make([&](int i) {
        const float low = n.v[i] > -126.0f ? n.v[i] : -126.0f, bounded = low < 127.0f ? low : 127.0f;
        const float scaled = a.v[i] * bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(bounded) + 127) << 23);
        return n.v[i] < -126.0f ? 0.0f : scaled;
    });
}
inline Vec select_lanes(int low, int high, const Vec& a, const Vec& b) {
    return make([&](int i) { return i >= low && i < high ? a.v[i] : b.v[i]; });
}
inline float sum(const Vec& a) {
    float folded[kLanes];
    std::memcpy(folded, a.v, sizeof folded);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) folded[i] += folded[i + width];
    return folded[0];
}
inline float maximum(const Vec& a) {
    float result = a.v[0];
    for (int i = 1; i < kLanes; ++i) result = a.v[i] > result ? a.v[i] : result;
    return result;
}
inline float largest_magnitude(const Vec& a, const Vec& b) {
    uint32_t largest = 0;
    for (int i = 0; i < kLanes; ++i) {
        const uint32_t x = float_to_bits(a.v[i]) & 0x7fffffff, y = float_to_bits(b.v[i]) & 0x7fffffff;
        const uint32_t larger = x > y ? x : y;
        largest = larger > largest ? larger : largest;
    }
    return bits_to_float(largest);
}

inline IVec izero() {
    return make_int([](int) { return 0; });
}
// To nearest even, without a library call; |a| < 2^22 wherever the kernels use it, else (NaN too) any integer.
inline IVec to_int(const Vec& a) {
    return make_int([&](int i) {
        const float magic = 12582912.0f;  // 1.5 * 2^23
        return static_cast<int32_t>(float_to_bits(a.v[i] + magic) - float_to_bits(magic));
    });
}
inline Vec to_float(const IVec& a) {
    return make([&](int i) { return static_cast<float>(a.v[i]); });
}
inline int32_t sum(const IVec& a) {
    int32_t total = 0;
    for (int i = 0; i < kLanes; ++i) total += a.v[i];
    return total;
}
inline IVec add(const IVec& a, const IVec& b) {
    return make_int([&](int i) { return a.v[i] + b.v[i]; });
}
template <int kShift>
inline IVec splat_shifted(const int32_t* p) {
    const int32_t x = *p * (1 << kShift);
    return make_int([=](int) { return x; });
}
inline void store_shorts(int16_t* p, const IVec& a) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int16_t>(a.v[i]);
}
inline void store_bytes(int8_t* p, const IVec& a) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

inline Bytes load_bytes(const uint8_t* p) {
    Bytes out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
}
inline Bytes low_nibbles(const Bytes& a) {
    Bytes out;
    for (int i = 0; i < 4 * kLanes; ++i) out.v[i] = a.v[i] & 15;
    return out;
}
inline Bytes high_nibbles(const Bytes& a) {
    Bytes out;
    for (int i = 0; i < 4 * kLanes; ++i) out.v[i] = static_cast<uint8_t>(a.v[i] >> 4);
    return out;
}
inline Bytes add_fifth_bit(const Bytes& a, const uint8_t* plane) {
    Bytes out;
    for (int i = 0; i < 4 * kLanes; ++i) out.v[i] = static_cast<uint8_t>(a.v[i] | (plane[i / 8] >> (i % 8) & 1) << 4);
    return out;
}
inline Shorts even_bytes(const Bytes& a) {
    Shorts out;
    for (int i = 0; i < 2 * kLanes; ++i) out.v[i] = a.v[2 * i];
    return out;
}
inline Shorts odd_bytes(const Bytes& a) {
    Shorts out;
    for (int i = 0; i < 2 * kLanes; ++i) out.v[i] = a.v[2 * i + 1];
    return out;
}
template <int kIndex>
inline Vec byte_to_float(const Bytes& a) {
    return make([&](int i) { return static_cast<float>(a.v[4 * i + kIndex]); });
}
inline IVec dot(const IVec& sum, const Shorts& a, const int32_t* word) {
    int16_t b[2];
    std::memcpy(b, word, sizeof b);
    return make_int([&](int i) { return sum.v[i] + a.v[2 * i] * b[0] + a.v[2 * i + 1] * b[1]; });
}
template <bool kFullRange>
inline IVec dot(const IVec& sum, const Bytes& a, const int32_t* word) {
    int8_t b[4];
    std::memcpy(b, word, sizeof b);
    return make_int([&](int i) {
        return sum.v[i] + a.v[4 * i] * b[0] + a.v[4 * i + 1] * b[1] + a.v[4 * i + 2] * b[2] + a.v[4 * i + 3] * b[3];
    });
}

}  // namespace
}  // namespace aph
