// Sixteen lanes with AVX-512 (F, BW, DQ, VL, VNNI). The other simd_*.h files define the same names.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace aph {
namespace {

constexpr int kDotRows = 8;    // rows of activations whose sums stay in registers
constexpr int kFloatRows = 4;  // the same for float products
constexpr int kResultVecs = 16;  // results of attention that stay in registers
constexpr bool kPairedDots = true;  // see paired_dots.h
constexpr bool kFoursReduced = true;  // sums and maxima of four vectors at once

struct Vec {
    __m512 v;
};
struct IVec {
    __m512i v;
};
struct Bytes {  // 16 words of 4 unsigned bytes
    __m512i v;
};
struct Shorts {  // 16 words of 2 signed 16-bit values
    __m512i v;
};

inline Vec zero() { return {_mm512_setzero_ps()}; }
inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const uint16_t* half) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)))};
}
inline Vec load_bfloat(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline Vec load_signed(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_128(p)))}; }
inline Vec load_unsigned(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_128(p)))}; }
// The nibbles of 16 bytes.
inline Vec load_low(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_cvtepu8_epi32(load_128(p)), _mm512_set1_epi32(15)))};
}
inline Vec load_high(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_srli_epi32(_mm512_cvtepu8_epi32(load_128(p)), 4))};
}
// 2^(byte - 128); 0 where that is subnormal
inline Vec load_power(const uint8_t* p) {
    const __m512i exponent = _mm512_subs_epu16(_mm512_cvtepu8_epi32(load_128(p)), _mm512_set1_epi32(1));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(uint16_t* half, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(half), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec round_to_whole(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a * 2^n for whole n; 0 where that is far below the smallest normal number, large where it overflows
inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// a in lanes [low, high), else b
inline Vec select_lanes(int low, int high, Vec a, Vec b) {
    const uint32_t below_high = high >= 16 ? 0xffffu : high <= 0 ? 0u : (1u << high) - 1;
    const uint32_t below_low = low >= 16 ? 0xffffu : low <= 0 ? 0u : (1u << low) - 1;
    return {_mm512_mask_blend_ps(static_cast<__mmask16>(below_high & ~below_low), b.v, a.v)};
}
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float maximum(Vec a) { return _mm512_reduce_max_ps(a.v); }
// Four vectors to four lanes: f joins halves until one is left, in the order of _mm512_reduce_*.
template <class F>
inline __m128 reduce_four(const Vec (&rows)[4], F&& f) {
    const auto join_halves = [&f](__m512 a, __m512 b) {
        return f(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const __m512 low = join_halves(rows[0].v, rows[1].v), high = join_halves(rows[2].v, rows[3].v);
    const __m512 lanes = f(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    const __m512 pairs = f(lanes, _mm512_permute_ps(lanes, 0x4e));
    const __m512 singles = f(pairs, _mm512_permute_ps(pairs, 0xb1));
    const __m512i first_lanes = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(first_lanes, singles));
}
inline void sums_of_four(const Vec (&rows)[4], float* out) {
    _mm_storeu_ps(out, reduce_four(rows, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); }));
}
inline void maxima_of_four(const Vec (&rows)[4], float* out) {
    _mm_storeu_ps(out, reduce_four(rows, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); }));
}
// Largest magnitude of both; not finite if any lane is not, NaN included.
inline float largest_magnitude(Vec a, Vec b) {
    const __m512i mask = _mm512_set1_epi32(0x7fffffff);
    // As integers, magnitudes order like floats and NaN comes last.
    const __m512i bits = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(a.v), mask),
                                          _mm512_and_si512(_mm512_castps_si512(b.v), mask));
    const __m256i half = _mm256_max_epi32(_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64(bits, 1));
    __m128i quarter = _mm_max_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    quarter = _mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
    quarter = _mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(quarter));
}

inline IVec izero() { return {_mm512_setzero_si512()}; }
inline IVec to_int(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }
inline Vec to_float(IVec a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline int32_t sum(IVec a) { return _mm512_reduce_add_epi32(a.v); }
inline IVec add(IVec a, IVec b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <int kShift>
inline IVec splat_shifted(const int32_t* p) {
    return {_mm512_slli_epi32(_mm512_set1_epi32(*p), kShift)};
}
inline void store_shorts(int16_t* p, IVec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
inline void store_bytes(int8_t* p, IVec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes a) {
    return {_mm512_and_si512(_mm512_srli_epi32(a.v, 4), _mm512_set1_epi8(15))};
}
// Two bits of every byte.
template <int kShift>
inline Bytes bit_pairs(Bytes a) {
    return {_mm512_and_si512(_mm512_srli_epi32(a.v, kShift), _mm512_set1_epi8(3))};
}
// Adds kValue to the bytes whose bit is set in the 64-bit plane.
template <int kValue>
inline Bytes add_bit(Bytes a, const uint8_t* plane) {
    const __mmask64 mask = *reinterpret_cast<const uint64_t*>(plane);
    return {_mm512_mask_add_epi8(a.v, mask, a.v, _mm512_set1_epi8(kValue))};
}
// Makes bit pair kPair of every byte of `pairs` the bits above a's four.
template <int kPair>
inline Bytes add_pairs(Bytes a, Bytes pairs) {
    const __m512i moved = kPair < 2 ? _mm512_slli_epi32(pairs.v, 4 - 2 * kPair) : _mm512_srli_epi32(pairs.v, 2 * kPair - 4);
    return {_mm512_or_si512(a.v, _mm512_and_si512(moved, _mm512_set1_epi8(0x30)))};
}
inline void store(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
inline Bytes either(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
// Words shifted; what is wanted of them lies within bytes.
inline Bytes shift_right(Bytes a, int bits) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(bits))}; }
template <int kMask>
inline Bytes masked(Bytes a) {
    return {_mm512_and_si512(a.v, _mm512_set1_epi8(kMask))};
}
// `value` in every word that has bit kBit set, else 0.
template <int kBit>
inline Bytes words_where(Bytes a, uint32_t value) {
    const __mmask16 set = _mm512_test_epi32_mask(a.v, _mm512_set1_epi32(1 << kBit));
    return {_mm512_maskz_set1_epi32(set, static_cast<int>(value))};
}
template <int kBit>
inline Vec floats_where(Bytes a, float value) {
    return {_mm512_maskz_mov_ps(_mm512_test_epi32_mask(a.v, _mm512_set1_epi32(1 << kBit)), _mm512_set1_ps(value))};
}
// Sixteen nibbles, the lowest first.
inline Vec nibbles_to_float(uint64_t nibbles) {
    const __m512i places = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i words = _mm512_castsi128_si512(_mm_cvtsi64_si128(static_cast<int64_t>(nibbles)));
    const __m512i shifted = _mm512_srlv_epi32(_mm512_permutexvar_epi32(places, words), shifts);
    return {_mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(15)))};
}
// The even bytes of `low` as words with those of `high` above them; the same of the odd bytes.
inline Shorts join_even(Bytes low, Bytes high) {
    return {_mm512_or_si512(_mm512_and_si512(low.v, _mm512_set1_epi32(0x00ff00ff)), _mm512_slli_epi16(high.v, 8))};
}
inline Shorts join_odd(Bytes low, Bytes high) {
    return {_mm512_or_si512(_mm512_srli_epi16(low.v, 8), _mm512_andnot_si512(_mm512_set1_epi32(0x00ff00ff), high.v))};
}
// table[word] of words below kCount, a power of two. Large tables are gathered from, with the word behind them; in smaller
// ones permutations of registers are quicker.
template <int kCount>
inline Shorts look_up_words(Shorts a, const uint16_t* table) {
    if constexpr (kCount == 64) {
        return {_mm512_permutex2var_epi16(_mm512_loadu_si512(table), a.v, _mm512_loadu_si512(table + 32))};
    } else if constexpr (kCount > 1024) {
        const __m512i mask = _mm512_set1_epi32(0xffff);
        const __m512i low = _mm512_i32gather_epi32(_mm512_and_si512(a.v, mask), table, 2);
        const __m512i high = _mm512_i32gather_epi32(_mm512_srli_epi32(a.v, 16), table, 2);
        return {_mm512_ternarylogic_epi32(mask, low, _mm512_slli_epi32(high, 16), 0xca)};
    } else {
        const __mmask32 upper = _mm512_test_epi16_mask(a.v, _mm512_set1_epi16(kCount / 2));
        const Shorts below = look_up_words<kCount / 2>(a, table);
        const Shorts above = look_up_words<kCount / 2>(a, table + kCount / 2);
        return {_mm512_mask_blend_epi16(upper, below.v, above.v)};
    }
}
// The low words, and above each the same word shifted right by kBits; the same of the high words.
template <int kBits>
inline Bytes spread_low(Shorts a) {
    return {_mm512_ternarylogic_epi32(_mm512_set1_epi32(0xffff), a.v, _mm512_slli_epi32(a.v, 16 - kBits), 0xca)};
}
template <int kBits>
inline Bytes spread_high(Shorts a) {
    const __m512i mask = _mm512_set1_epi32(0xffff);
    return {_mm512_ternarylogic_epi32(mask, _mm512_srli_epi32(a.v, 16), _mm512_srli_epi32(a.v, kBits), 0xca)};
}
// kBase + the first ternary digit of every byte as a fraction of 256, and the rest of the fraction.
template <int kBase>
inline Bytes ternary_digit(Bytes a) {
    const __m512i base = _mm512_set1_epi8(kBase);
    const __mmask64 one = _mm512_cmpge_epu8_mask(a.v, _mm512_set1_epi8(86));
    const __mmask64 two = _mm512_cmpge_epu8_mask(a.v, _mm512_set1_epi8(static_cast<char>(171)));
    const __m512i below = _mm512_mask_mov_epi8(base, one, _mm512_set1_epi8(kBase + 1));
    return {_mm512_mask_mov_epi8(below, two, _mm512_set1_epi8(kBase + 2))};
}
inline Bytes ternary_rest(Bytes a) { return {_mm512_add_epi8(a.v, _mm512_add_epi8(a.v, a.v))}; }
// values[byte] of bytes below 16
inline Bytes look_up(Bytes a, const uint8_t* values) {
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_128(values)), a.v)};
}
inline Shorts even_bytes(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(0x00ff00ff))}; }
inline Shorts odd_bytes(Bytes a) { return {_mm512_srli_epi16(a.v, 8)}; }
// Byte `index` of every word, as a float.
template <int kIndex>
inline Vec byte_to_float(Bytes a) {
    const __m512i shifted = kIndex == 0 ? a.v : _mm512_srli_epi32(a.v, 8 * kIndex);
    return {_mm512_cvtepi32_ps(kIndex == 3 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi32(255)))};
}
inline Bytes add_byte(Bytes a, int value) { return {_mm512_add_epi8(a.v, _mm512_set1_epi8(static_cast<char>(value)))}; }
inline IVec sub(IVec a, IVec b) { return {_mm512_sub_epi32(a.v, b.v)}; }
// Element by element a and the broadcast word.
inline Shorts add_word(Shorts a, const int32_t* word) { return {_mm512_add_epi16(a.v, _mm512_set1_epi32(*word))}; }
inline Bytes add_word(Bytes a, const int32_t* word) { return {_mm512_add_epi8(a.v, _mm512_set1_epi32(*word))}; }
// Adds the dot products of each word of a with that of b; of Bytes, b's are signed.
inline IVec dot(IVec sum, Shorts a, Shorts b) { return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)}; }
inline IVec dot(IVec sum, Bytes a, Bytes b) { return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)}; }
// What the paired dots of a row's words add for the row alone (paired_attention.h): of every 16 quants, 8 words, the
// products of the first 6 words, two by two.
class WordPairs {
public:
    void add(IVec quants) {
        const __m512i behind = _mm512_shuffle_epi32(quants.v, _MM_PERM_BADC);
        sum_ = _mm512_add_epi32(sum_, _mm512_mullo_epi32(quants.v, behind));
    }
    int32_t negated() const { return -_mm512_mask_reduce_add_epi32(0x0333, sum_); }

private:
    __m512i sum_ = _mm512_setzero_si512();
};
constexpr float kFloat8Unit = 256.0f;
// Floats of e4m3 / kFloat8Unit: a half whose exponent takes four of its five bits. NaN, which no weight is, becomes 480.
inline Vec load_float8(const uint8_t* p) {
    // The sign comes into bits 15 and 14, of which the second is the exponent's.
    const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load_128(p)), 7);
    const __m256i half = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    return {_mm512_cvtph_ps(half)};
}
// Sixteen numbers, and the one that byte `index` of every word, below 16, stands for.
typedef Vec Table;
inline Table load_table(const float* p) { return load(p); }
template <int kIndex>
inline Vec byte_of_table(Bytes a, const Table& table) {
    return {_mm512_permutexvar_ps(kIndex == 0 ? a.v : _mm512_srli_epi32(a.v, 8 * kIndex), table.v)};
}
inline Shorts load_shorts(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
// Adds the dot products of each word with the broadcast word.
inline IVec dot(IVec sum, Shorts a, const int32_t* word) {
    return {_mm512_dpwssd_epi32(sum.v, a.v, _mm512_set1_epi32(*word))};
}
template <bool kFullRange>
inline IVec dot(IVec sum, Bytes a, const int32_t* word) {
    return {_mm512_dpbusd_epi32(sum.v, a.v, _mm512_set1_epi32(*word))};
}
// Eight vectors whose 16 words are positions, each of two dimensions, to eight whose words are the 16 dimensions, each
// of two positions, `stride` shorts apart.
inline void transpose_pairs(const int16_t* in, int16_t* out, int64_t stride) {
    __m512i low[4], high[4];  // even and odd pairs of positions of two vectors
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i a = _mm512_loadu_si512(in + 64 * i), b = _mm512_loadu_si512(in + 64 * i + 32);
        low[i] = _mm512_unpacklo_epi64(a, b);
        high[i] = _mm512_unpackhi_epi64(a, b);
    }
    const __m512i order =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    const auto put = [&](const __m512i* half, int first) {
        const __m512i a = _mm512_shuffle_i64x2(half[0], half[1], 0x88), b = _mm512_shuffle_i64x2(half[2], half[3], 0x88);
        const __m512i c = _mm512_shuffle_i64x2(half[0], half[1], 0xdd), d = _mm512_shuffle_i64x2(half[2], half[3], 0xdd);
        const auto write = [&](int pair, __m512i words) {
            _mm512_storeu_si512(out + pair * stride, _mm512_shuffle_epi8(words, order));
        };
        write(first, _mm512_shuffle_i64x2(a, b, 0x88));
        write(first + 2, _mm512_shuffle_i64x2(c, d, 0x88));
        write(first + 4, _mm512_shuffle_i64x2(a, b, 0xdd));
        write(first + 6, _mm512_shuffle_i64x2(c, d, 0xdd));
    };
    put(low, 0);
    put(high, 1);
}

}  // namespace
}  // namespace aph
