// Sixteen lanes as four 16-byte vectors of GCC's and Clang's vector extension, which fit SSE2 and NEON.
// See simd_avx512.h for what the names mean.
#pragma once
#include <cstdint>
#include <cstring>

#include "half.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace aph {
namespace {

constexpr int kDotRows = 1;
constexpr int kFloatRows = 1;
constexpr int kResultVecs = 3;
constexpr bool kPairedDots = false;
constexpr bool kFoursReduced = false;
constexpr int kParts = 4;

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Word4 __attribute__((vector_size(16)));
typedef uint16_t Half4 __attribute__((vector_size(8)));
typedef uint8_t Byte16 __attribute__((vector_size(16)));

struct Vec {
    Float4 v[kParts];
};
struct IVec {
    Int4 v[kParts];
};
struct Bytes {
    Word4 v[kParts];
};
struct Shorts {
    Word4 v[kParts];
};

template <class Result, class F>
inline Result each(F part) {
    Result out;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) out.v[i] = part(i);
    return out;
}

template <class Part, class Pointer>
inline Part load_part(Pointer p) {
    Part part;
    std::memcpy(&part, p, sizeof part);
    return part;
}
// mask lanes are all ones or zero
inline Float4 choose(Int4 mask, Float4 a, Float4 b) { return (Float4)((mask & (Int4)a) | (~mask & (Int4)b)); }

inline Vec splat(float x) {
    return each<Vec>([=](int) { return Float4{x, x, x, x}; });
}
inline Vec zero() { return splat(0); }
inline Vec load(const float* p) {
    return each<Vec>([=](int i) { return load_part<Float4>(p + 4 * i); });
}
// half_to_float of half.h
inline Vec load(const uint16_t* half) {
    return each<Vec>([=](int i) {
        const Word4 bits = __builtin_convertvector(load_part<Half4>(half + 4 * i), Word4);
        const Word4 magnitude = (bits & 0x7fff) << 13;
        const Word4 scaled = (Word4)((Float4)magnitude * bits_to_float(0x77800000));
        const Word4 special = (Word4)((Int4)magnitude >= 0x0f800000);
        return (Float4)((bits & 0x8000) << 16 | (special & (magnitude | 0x7f800000)) | (~special & scaled));
    });
}
inline Vec load_bfloat(const uint16_t* p) {
    return each<Vec>(
        [=](int i) { return (Float4)(__builtin_convertvector(load_part<Half4>(p + 4 * i), Word4) << 16); });
}
template <class F>
inline Vec load_each(const uint8_t* p, F value) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = static_cast<float>(value(p[i]));
    return load(lanes);
}
inline Vec load_signed(const uint8_t* p) {
    return load_each(p, [](uint8_t x) { return static_cast<int8_t>(x); });
}
inline Vec load_unsigned(const uint8_t* p) {
    return load_each(p, [](uint8_t x) { return x; });
}
inline Vec load_low(const uint8_t* p) {
    return load_each(p, [](uint8_t x) { return x & 15; });
}
inline Vec load_high(const uint8_t* p) {
    return load_each(p, [](uint8_t x) { return x >> 4; });
}
inline Vec load_power(const uint8_t* p) {
    return load_each(p, [](uint8_t x) { return bits_to_float(x == 0 ? 0 : static_cast<uint32_t>(x - 1) << 23); });
}
inline void store(float* p, const Vec& a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store(uint16_t* half, const Vec& a) {
    float lanes[16];
    store(lanes, a);
    for (int i = 0; i < 16; ++i) half[i] = float_to_half(lanes[i]);
}
inline Vec add(const Vec& a, const Vec& b) {
    return each<Vec>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec sub(const Vec& a, const Vec& b) {
    return each<Vec>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec mul(const Vec& a, const Vec& b) {
    return each<Vec>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec div(const Vec& a, const Vec& b) {
    return each<Vec>([&](int i) { return a.v[i] / b.v[i]; });
}
// In two roundings: not every processor has one instruction for it.
inline Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    return each<Vec>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec max(const Vec& a, const Vec& b) {
    return each<Vec>([&](int i) { return choose(a.v[i] > b.v[i], a.v[i], b.v[i]); });
}
inline Vec min(const Vec& a, const Vec& b) {
    return each<Vec>([&](int i) { return choose(a.v[i] < b.v[i], a.v[i], b.v[i]); });
}
inline Int4 to_int4(Float4 a) {
    const Float4 magic = Float4{} + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the integer, to nearest even
    return (Int4)(a + magic) - (Int4)magic;
}
// |a| < 2^22, else as it is
inline Vec round_to_whole(const Vec& a) {
    return each<Vec>([&](int i) {
        const Float4 rounded = __builtin_convertvector(to_int4(a.v[i]), Float4);
        return choose(a.v[i] < 4194304.0f, rounded, a.v[i]);
    });
}
inline Vec scale_by_power(const Vec& a, const Vec& n) {
    return each<Vec>([&](int i) {
        const Float4 smallest = Float4{} - 126.0f, largest = Float4{} + 127.0f;
        const Float4 low = choose(n.v[i] > smallest, n.v[i], smallest);
        const Int4 exponent = to_int4(choose(low < largest, low, largest)) + 127;
        const Float4 scaled = a.v[i] * (Float4)(exponent << 23);
        return choose(n.v[i] < smallest, Float4{}, scaled);
    });
}
inline Vec select_lanes(int low, int high, const Vec& a, const Vec& b) {
    return each<Vec>([&](int i) {
        const Int4 lane = Int4{0, 1, 2, 3} + 4 * i;
        return choose((lane >= low) & (lane < high), a.v[i], b.v[i]);
    });
}
inline float sum(const Vec& a) {
    const Float4 all = (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]);
    return (all[0] + all[1]) + (all[2] + all[3]);
}
inline float maximum(const Vec& a) {
    float lanes[16];
    store(lanes, a);
    float result = lanes[0];
    for (int i = 1; i < 16; ++i) result = lanes[i] > result ? lanes[i] : result;
    return result;
}
inline float largest_magnitude(const Vec& a, const Vec& b) {
    Int4 largest{};
    const auto include = [&](Float4 x) {
        const Int4 bits = (Int4)x & 0x7fffffff;
        largest = (Int4)choose(bits > largest, (Float4)bits, (Float4)largest);
    };
    for (int i = 0; i < kParts; ++i) include(a.v[i]), include(b.v[i]);
    int32_t result = 0;
    for (int i = 0; i < 4; ++i) result = largest[i] > result ? largest[i] : result;
    return bits_to_float(static_cast<uint32_t>(result));
}

// Nothing, where dots are not paired.
struct WordPairs {
    void add(const IVec&) {}
    int32_t negated() const { return 0; }
};
inline IVec izero() {
    return each<IVec>([](int) { return Int4{}; });
}
// |a| < 2^22; else any integer
inline IVec to_int(const Vec& a) {
    return each<IVec>([&](int i) { return to_int4(a.v[i]); });
}
inline Vec to_float(const IVec& a) {
    return each<Vec>([&](int i) { return __builtin_convertvector(a.v[i], Float4); });
}
inline int32_t sum(const IVec& a) {
    const Int4 all = (a.v[0] + a.v[1]) + (a.v[2] + a.v[3]);
    return (all[0] + all[1]) + (all[2] + all[3]);
}
inline IVec add(const IVec& a, const IVec& b) {
    return each<IVec>([&](int i) { return a.v[i] + b.v[i]; });
}
template <int kShift>
inline IVec splat_shifted(const int32_t* p) {
    const int32_t x = *p * (1 << kShift);
    return each<IVec>([=](int) { return Int4{x, x, x, x}; });
}
inline void store_shorts(int16_t* p, const IVec& a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int16_t>(a.v[i / 4][i % 4]);
}
inline void store_bytes(int8_t* p, const IVec& a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i / 4][i % 4]);
}

inline Bytes load_bytes(const uint8_t* p) {
    return each<Bytes>([=](int i) { return load_part<Word4>(p + 16 * i); });
}
inline Bytes low_nibbles(const Bytes& a) {
    return each<Bytes>([&](int i) { return a.v[i] & 0x0f0f0f0f; });
}
inline Bytes high_nibbles(const Bytes& a) {
    return each<Bytes>([&](int i) { return a.v[i] >> 4 & 0x0f0f0f0f; });
}
template <int kShift>
inline Bytes bit_pairs(const Bytes& a) {
    return each<Bytes>([&](int i) { return a.v[i] >> kShift & 0x03030303; });
}
template <int kValue>
inline Bytes add_bit(const Bytes& a, const uint8_t* plane) {
    // Four bits, spread to the lowest bit of four bytes by a product that puts bit b at 8 b.
    const auto spread = [](uint32_t bits) { return ((bits & 15) * 0x00204081u & 0x01010101u) * kValue; };
    return each<Bytes>([&](int i) {
        const uint32_t low = plane[2 * i], high = plane[2 * i + 1];
        return a.v[i] | Word4{spread(low), spread(low >> 4), spread(high), spread(high >> 4)};
    });
}
template <int kPair>
inline Bytes add_pairs(const Bytes& a, const Bytes& pairs) {
    return each<Bytes>([&](int i) {
        const Word4 moved = kPair < 2 ? pairs.v[i] << (kPair < 2 ? 4 - 2 * kPair : 0)
                                      : pairs.v[i] >> (kPair < 2 ? 0 : 2 * kPair - 4);
        return a.v[i] | (moved & 0x30303030);
    });
}
inline void store(uint8_t* p, const Bytes& a) { std::memcpy(p, a.v, sizeof a.v); }
inline Bytes either(const Bytes& a, const Bytes& b) {
    return each<Bytes>([&](int i) { return a.v[i] | b.v[i]; });
}
inline Bytes shift_right(const Bytes& a, int bits) {
    return each<Bytes>([&](int i) { return a.v[i] >> bits; });
}
template <int kMask>
inline Bytes masked(const Bytes& a) {
    return each<Bytes>([&](int i) { return a.v[i] & (kMask * 0x01010101u); });
}
template <int kBit>
inline Bytes words_where(const Bytes& a, uint32_t value) {
    return each<Bytes>([&](int i) { return (0u - (a.v[i] >> kBit & 1)) & value; });
}
template <int kBit>
inline Vec floats_where(const Bytes& a, float value) {
    const Bytes chosen = words_where<kBit>(a, float_to_bits(value));
    return each<Vec>([&](int i) { return (Float4)chosen.v[i]; });
}
inline Vec nibbles_to_float(uint64_t nibbles) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = static_cast<float>(nibbles >> 4 * i & 15);
    return load(lanes);
}
inline Shorts join_even(const Bytes& low, const Bytes& high) {
    return each<Shorts>([&](int i) { return (low.v[i] & 0x00ff00ff) | (high.v[i] & 0x00ff00ff) << 8; });
}
inline Shorts join_odd(const Bytes& low, const Bytes& high) {
    return each<Shorts>([&](int i) { return (low.v[i] >> 8 & 0x00ff00ff) | (high.v[i] & 0xff00ff00); });
}
template <int kCount>
inline Shorts look_up_words(const Shorts& a, const uint16_t* table) {
    uint16_t words[32];
    std::memcpy(words, a.v, sizeof words);
    for (uint16_t& word : words) word = table[word];
    return each<Shorts>([&](int i) { return load_part<Word4>(words + 8 * i); });
}
template <int kBits>
inline Bytes spread_low(const Shorts& a) {
    return each<Bytes>([&](int i) { return (a.v[i] & 0xffff) | (a.v[i] << (16 - kBits) & 0xffff0000); });
}
template <int kBits>
inline Bytes spread_high(const Shorts& a) {
    return each<Bytes>([&](int i) { return a.v[i] >> 16 | (a.v[i] >> kBits & 0xffff0000); });
}
template <int kBase>
inline Bytes ternary_digit(const Bytes& a) {
    return each<Bytes>([&](int i) {
        const Byte16 bytes = (Byte16)a.v[i], base = Byte16{} + static_cast<uint8_t>(kBase);
        const Byte16 one = Byte16{} + static_cast<uint8_t>(86), two = Byte16{} + static_cast<uint8_t>(171);
        return (Word4)(base - (Byte16)(bytes >= one) - (Byte16)(bytes >= two));
    });
}
inline Bytes ternary_rest(const Bytes& a) {
    return each<Bytes>([&](int i) { const Byte16 bytes = (Byte16)a.v[i];
        return (Word4)(bytes + bytes + bytes); });
}
inline Bytes look_up(const Bytes& a, const uint8_t* values) {
    uint8_t bytes[64];
    std::memcpy(bytes, a.v, sizeof bytes);
    for (uint8_t& byte : bytes) byte = values[byte];
    return each<Bytes>([&](int i) { return load_part<Word4>(bytes + 16 * i); });
}
inline Shorts even_bytes(const Bytes& a) {
    return each<Shorts>([&](int i) { return a.v[i] & 0x00ff00ff; });
}
inline Shorts odd_bytes(const Bytes& a) {
    return each<Shorts>([&](int i) { return a.v[i] >> 8 & 0x00ff00ff; });
}
inline Shorts load_shorts(const int16_t* p) {
    return each<Shorts>([=](int i) { return load_part<Word4>(p + 8 * i); });
}
template <int kIndex>
inline Vec byte_to_float(const Bytes& a) {
    return each<Vec>(
        [&](int i) { return __builtin_convertvector((Int4)(a.v[i] >> (8 * kIndex) & 0xff), Float4); });
}
constexpr float kFloat8Unit = 1.0f;
inline Vec load_float8(const uint8_t* p) {
    return load_each(p, [](uint8_t x) { return float8_to_float(x); });
}
typedef const float* Table;
inline Table load_table(const float* p) { return p; }
template <int kIndex>
inline Vec byte_of_table(const Bytes& a, Table table) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = table[a.v[i / 4][i % 4] >> (8 * kIndex) & 15];
    return load(lanes);
}
inline Int4 dot4(Int4 sum, Word4 a, Word4 b) {
#if defined(__SSE2__)
    return sum + (Int4)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const Int4 x = (Int4)a, y = (Int4)b;
    return sum + ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}
inline IVec dot(const IVec& sum, const Shorts& a, const int32_t* word) {
    const Word4 b = Word4{} + static_cast<uint32_t>(*word);
    return each<IVec>([&](int i) { return dot4(sum.v[i], a.v[i], b); });
}
template <bool kFullRange>
inline IVec dot(const IVec& sum, const Bytes& a, const int32_t* word) {
    int8_t b[4];
    std::memcpy(b, word, sizeof b);
    const auto pair = [](int low, int high) { return (low & 0xffff) | static_cast<int32_t>(high * 65536); };
    const int32_t even = pair(b[0], b[2]), odd = pair(b[1], b[3]);
    return dot(dot(sum, even_bytes(a), &even), odd_bytes(a), &odd);
}

inline void transpose_pairs(const int16_t* in, int16_t* out, int64_t stride) {
    for (int i = 0; i < 8; ++i)
        for (int pair = 0; pair < 8; ++pair) {
            const int16_t* from = in + 32 * i + 4 * pair;
            const int16_t words[4] = {from[0], from[2], from[1], from[3]};
            std::memcpy(out + pair * stride + 4 * i, words, sizeof words);
        }
}

}  // namespace
}  // namespace aph
