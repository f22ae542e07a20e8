// Vectors, exp, ln and the random numbers of the sampler, in the widest lanes of the instruction set.
//
// Included by one source file for each instruction set, everything in an unnamed namespace, so that no code compiled
// for one processor is linked into the path of another.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "sampling.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace aph {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
static_assert(kSampleBlock % (4 * kLanes) == 0, "a block is a whole number of Philox groups");

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef uint64_t U64 __attribute__((vector_size(kLanes * 4)));

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kMaxGumbel = 16.64f;     // of the largest uniform, rounded up
constexpr float kNegligible = 30.0f;     // exp(-30) * 2^18 tokens is below float32's resolution of the mass

inline F32 load(const float* from) {
    F32 value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline void store(float* to, F32 value) { std::memcpy(to, &value, sizeof value); }
inline F32 splat(float value) { return F32{} + value; }
inline F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
inline F32 larger(F32 a, F32 b) { return a > b ? a : b; }
inline float largest(F32 value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)value);
#else
    float result = value[0];
    for (int lane = 1; lane < kLanes; ++lane) result = value[lane] > result ? value[lane] : result;
    return result;
#endif
}
inline float total(F32 value) {
    float result = 0;
    for (int lane = 0; lane < kLanes; ++lane) result += value[lane];
    return result;
}
// Which lanes of a comparison's result are set, as bits.
inline uint32_t bits_of(I32 mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= (mask[lane] & 1u) << lane;
    return bits;
#endif
}
inline I32 lane_numbers() {
    I32 numbers;
    for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
    return numbers;
}

// table[index] of every lane.
inline F32 look_up(const float* table, I32 index) {
#if defined(__AVX512F__)
    return (F32)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, (__m512i)index, table, 4);
#elif defined(__AVX2__)
    return (F32)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
    F32 values;
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = table[index[lane]];
    return values;
#endif
}

// Writes the lanes of `bits` side by side to `to`, which has room for all lanes.
inline void compress(float* to, F32 value, uint32_t bits) {
#if defined(__AVX512F__)
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), (__m512)value));
#else
    for (; bits != 0; bits &= bits - 1) *to++ = value[__builtin_ctz(bits)];
#endif
}
inline void compress(int32_t* to, I32 value, uint32_t bits) {
#if defined(__AVX512F__)
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), (__m512i)value));
#else
    for (; bits != 0; bits &= bits - 1) *to++ = value[__builtin_ctz(bits)];
#endif
}

// exp(x) for x <= 0, relative error 2e-7; 2^-126 or so for everything below -87.
inline F32 exp_negative(F32 x) {
    x = larger(x, splat(-87.0f));
    const F32 shifted = x * 1.44269504f + 12582912.0f;  // the sum's low mantissa bits are the rounded integer
    const F32 n = shifted - 12582912.0f;
    const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    F32 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const I32 bits = (I32)p + __builtin_convertvector(n, I32) * (1 << 23);
    return (F32)bits;
}

// ln(x) for positive normal x, relative error 2e-7 (also near 1, where it matters). Minimax polynomial of Cephes.
inline F32 log_positive(F32 x) {
    const U32 bits = (U32)x;
    I32 exponent = (I32)(bits >> 23) - 126;
    F32 m = (F32)((bits & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
    const I32 low = m < 0.707106781f;
    exponent += low;  // true is -1
    m = select(low, m + m, m) - 1.0f;
    F32 p = splat(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const F32 square = m * m, e = __builtin_convertvector(exponent, F32);
    return (m + (p * m * square + e * -2.12194440e-4f - square * 0.5f)) + e * 0.693359375f;
}

// High and low halves of the 32 x 32 -> 64 bit products of all lanes.
inline void multiply(uint32_t factor, U32 x, U32& high, U32& low) {
#if defined(__AVX512F__)
    // The masked form, because GCC 12 warns of its own header's plain one.
    const __m512i a = (__m512i)x, m = _mm512_set1_epi32(static_cast<int>(factor));
    const U64 even = (U64)_mm512_maskz_mul_epu32(0xff, a, m);
    const U64 odd = (U64)_mm512_maskz_mul_epu32(0xff, (__m512i)((U64)x >> 32), m);
#elif defined(__AVX2__)
    const __m256i a = (__m256i)x, m = _mm256_set1_epi32(static_cast<int>(factor));
    const U64 even = (U64)_mm256_mul_epu32(a, m), odd = (U64)_mm256_mul_epu32((__m256i)((U64)x >> 32), m);
#else
    const U64 even = ((U64)x & 0xffffffffu) * factor, odd = ((U64)x >> 32) * factor;
#endif
    high = (U32)((even >> 32) | (odd & ~uint64_t{0xffffffffu}));
    low = (U32)((even & 0xffffffffu) | (odd << 32));
}

// (a0 b0 a1 b1 ...) of the lower and the upper half of the lanes.
inline void interleave(U32 a, U32 b, U32& lower, U32& upper) {
#if defined(__clang__)
    for (int lane = 0; lane < kLanes; ++lane) {
        lower[lane] = lane % 2 ? b[lane / 2] : a[lane / 2];
        upper[lane] = lane % 2 ? b[(lane + kLanes) / 2] : a[(lane + kLanes) / 2];
    }
#else
    U32 pick;
    for (int lane = 0; lane < kLanes; ++lane) pick[lane] = lane / 2 + lane % 2 * kLanes;
    lower = __builtin_shuffle(a, b, pick);
    upper = __builtin_shuffle(a, b, pick + kLanes / 2);
#endif
}

constexpr uint32_t kUseDraw = 0, kUseXtc = 1;  // `Use` of sampling/random.py

struct Stream {
    uint32_t key0, key1, position, use;
};

// Philox4x32-10: the four words of the groups of four indices in `group`.
inline void philox(const Stream& stream, U32 group, U32 words[4]) {
    U32 c0 = U32{} + stream.position, c1 = U32{} + stream.use, c2 = group, c3 = U32{};
    uint32_t k0 = stream.key0, k1 = stream.key1;
    for (int round = 0; round < 10; ++round) {
        U32 high0, low0, high1, low1;
        multiply(0xD2511F53u, c0, high0, low0);
        multiply(0xCD9E8D57u, c2, high1, low1);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

inline F32 uniform_of(U32 word) { return (__builtin_convertvector((I32)(word >> 9), F32) + 0.5f) * 0x1p-23f; }

// Uniforms of the 4 * kLanes indices from `first` (a multiple of 4 * kLanes) on, in order.
inline void uniforms(const Stream& stream, uint32_t first, F32 out[4]) {
    U32 c[4], even_lower, even_upper, odd_lower, odd_upper, words[4];
    philox(stream, (U32)lane_numbers() + first / 4, c);
    interleave(c[0], c[2], even_lower, even_upper);
    interleave(c[1], c[3], odd_lower, odd_upper);
    interleave(even_lower, odd_lower, words[0], words[1]);
    interleave(even_upper, odd_upper, words[2], words[3]);
    for (int i = 0; i < 4; ++i) out[i] = uniform_of(words[i]);
}

// Uniforms of any indices.
inline F32 uniforms_at(const Stream& stream, I32 index) {
    U32 c[4];
    philox(stream, (U32)index >> 2, c);
    const I32 place = index & 3;
    const U32 low = place == 0 ? c[0] : c[1], high = place == 2 ? c[2] : c[3];
    return uniform_of(place < 2 ? low : high);
}

inline F32 gumbel_of(F32 uniform) { return -log_positive(-log_positive(uniform)); }

// A place in the order (value descending, index ascending): larger is earlier. -0 and +0 are one value.
inline uint64_t key_of(float value, int32_t index) {
    uint32_t bits;
    const float plain = value + 0.0f;
    std::memcpy(&bits, &plain, 4);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(~index);
}
inline float value_of(uint64_t key) {
    uint32_t bits = static_cast<uint32_t>(key >> 32);
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline int32_t index_of(uint64_t key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }

struct Earlier {
    bool operator()(uint64_t a, uint64_t b) const { return a > b; }
};

}  // namespace
}  // namespace aph
