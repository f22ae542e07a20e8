// Sixteen lanes as two AVX2 registers (with FMA and F16C). See simd_avx512.h for what the names mean.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace aph {
namespace {

constexpr int kDotRows = 2;
constexpr int kFloatRows = 1;
constexpr int kResultVecs = 6;
constexpr bool kPairedDots = false;
constexpr bool kFoursReduced = false;

struct Vec {
    __m256 lo, hi;
};
struct IVec {
    __m256i lo, hi;
};
struct Bytes {
    __m256i lo, hi;
};
struct Shorts {
    __m256i lo, hi;
};

inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Vec load(const uint16_t* half) { return {_mm256_cvtph_ps(load_128(half)), _mm256_cvtph_ps(load_128(half + 8))}; }
inline __m256 bfloat_to_float8(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16));
}
inline Vec load_bfloat(const uint16_t* p) { return {bfloat_to_float8(p), bfloat_to_float8(p + 8)}; }
inline IVec load_widened(const uint8_t* p) {
    const __m128i bytes = load_128(p);
    return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
inline Vec load_signed(const uint8_t* p) {
    const __m128i bytes = load_128(p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Vec load_unsigned(const uint8_t* p) {
    const IVec wide = load_widened(p);
    return {_mm256_cvtepi32_ps(wide.lo), _mm256_cvtepi32_ps(wide.hi)};
}
inline Vec load_low(const uint8_t* p) {
    const IVec wide = load_widened(p);
    const __m256i mask = _mm256_set1_epi32(15);
    return {_mm256_cvtepi32_ps(_mm256_and_si256(wide.lo, mask)), _mm256_cvtepi32_ps(_mm256_and_si256(wide.hi, mask))};
}
inline Vec load_high(const uint8_t* p) {
    const IVec wide = load_widened(p);
    return {_mm256_cvtepi32_ps(_mm256_srli_epi32(wide.lo, 4)), _mm256_cvtepi32_ps(_mm256_srli_epi32(wide.hi, 4))};
}
inline Vec load_power(const uint8_t* p) {
    const IVec wide = load_widened(p);
    const auto power = [](__m256i exponent) {
        const __m256i less = _mm256_subs_epu16(exponent, _mm256_set1_epi32(1));
        return _mm256_castsi256_ps(_mm256_slli_epi32(less, 23));
    };
    return {power(wide.lo), power(wide.hi)};
}
inline void store(float* p, Vec a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
inline void store(uint16_t* half, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(half), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(half + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec round_to_whole(Vec a) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
inline __m256 scale_by_power8(__m256 a, __m256 n) {
    const __m256 smallest = _mm256_set1_ps(-126.0f);
    const __m256 bounded = _mm256_max_ps(smallest, _mm256_min_ps(_mm256_set1_ps(127.0f), n));
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(bounded), _mm256_set1_epi32(127));
    const __m256 scaled = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
    return _mm256_andnot_ps(_mm256_cmp_ps(n, smallest, _CMP_LT_OQ), scaled);
}
inline Vec scale_by_power(Vec a, Vec n) { return {scale_by_power8(a.lo, n.lo), scale_by_power8(a.hi, n.hi)}; }
inline Vec select_lanes(int low, int high, Vec a, Vec b) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto inside = [&](int base) {
        const __m256i from = _mm256_cmpgt_epi32(_mm256_set1_epi32(high - base), lane);
        const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(low - base), lane);
        return _mm256_castsi256_ps(_mm256_andnot_si256(before, from));
    };
    return {_mm256_blendv_ps(b.lo, a.lo, inside(0)), _mm256_blendv_ps(b.hi, a.hi, inside(8))};
}
inline float sum(Vec a) {
    const __m256 both = _mm256_add_ps(a.lo, a.hi);
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
inline float maximum(Vec a) {
    const __m256 both = _mm256_max_ps(a.lo, a.hi);
    __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}
inline float largest_magnitude(Vec a, Vec b) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    const auto magnitude = [&](__m256 x) { return _mm256_and_si256(_mm256_castps_si256(x), mask); };
    const __m256i both = _mm256_max_epi32(_mm256_max_epi32(magnitude(a.lo), magnitude(a.hi)),
                                          _mm256_max_epi32(magnitude(b.lo), magnitude(b.hi)));
    __m128i quarter = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    quarter = _mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
    quarter = _mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(quarter));
}

// Nothing, where dots are not paired.
struct WordPairs {
    void add(const IVec&) {}
    int32_t negated() const { return 0; }
};
inline IVec izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline IVec to_int(Vec a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline Vec to_float(IVec a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline int32_t sum(IVec a) {
    const __m256i both = _mm256_add_epi32(a.lo, a.hi);
    __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    quarter = _mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(quarter, _mm_shuffle_epi32(quarter, 0xb1)));
}
inline IVec add(IVec a, IVec b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
template <int kShift>
inline IVec splat_shifted(const int32_t* p) {
    const __m256i all = _mm256_slli_epi32(_mm256_set1_epi32(*p), kShift);
    return {all, all};
}
inline __m256i pack_shorts(IVec a) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
}
inline void store_shorts(int16_t* p, IVec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_shorts(a));
}
inline void store_bytes(int8_t* p, IVec a) {
    const __m256i shorts = pack_shorts(a);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1)));
}

inline Bytes load_bytes(const uint8_t* p) { return {load_256(p), load_256(p + 32)}; }
inline Bytes low_nibbles(Bytes a) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
inline Bytes high_nibbles(Bytes a) {
    return low_nibbles({_mm256_srli_epi32(a.lo, 4), _mm256_srli_epi32(a.hi, 4)});
}
template <int kShift>
inline Bytes bit_pairs(Bytes a) {
    const __m256i mask = _mm256_set1_epi8(3);
    return {_mm256_and_si256(_mm256_srli_epi32(a.lo, kShift), mask), _mm256_and_si256(_mm256_srli_epi32(a.hi, kShift), mask)};
}
// kValue in every byte whose bit of the 32 is set.
template <int kValue>
inline __m256i bit_values(const uint8_t* plane) {
    const __m256i bits = _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(plane));
    const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i select = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    const __m256i bytes = _mm256_and_si256(_mm256_shuffle_epi8(bits, spread), select);
    return _mm256_and_si256(_mm256_cmpeq_epi8(bytes, select), _mm256_set1_epi8(kValue));
}
template <int kValue>
inline Bytes add_bit(Bytes a, const uint8_t* plane) {
    return {_mm256_or_si256(a.lo, bit_values<kValue>(plane)), _mm256_or_si256(a.hi, bit_values<kValue>(plane + 4))};
}
template <int kPair>
inline Bytes add_pairs(Bytes a, Bytes pairs) {
    const auto add = [](__m256i x, __m256i p) {
        const __m256i moved = kPair < 2 ? _mm256_slli_epi32(p, 4 - 2 * kPair) : _mm256_srli_epi32(p, 2 * kPair - 4);
        return _mm256_or_si256(x, _mm256_and_si256(moved, _mm256_set1_epi8(0x30)));
    };
    return {add(a.lo, pairs.lo), add(a.hi, pairs.hi)};
}
inline void store(uint8_t* p, Bytes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), a.hi);
}
inline Bytes either(Bytes a, Bytes b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
inline Bytes shift_right(Bytes a, int bits) {
    const __m128i count = _mm_cvtsi32_si128(bits);
    return {_mm256_srl_epi32(a.lo, count), _mm256_srl_epi32(a.hi, count)};
}
template <int kMask>
inline Bytes masked(Bytes a) {
    const __m256i mask = _mm256_set1_epi8(kMask);
    return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
template <int kBit>
inline Bytes words_where(Bytes a, uint32_t value) {
    const __m256i bit = _mm256_set1_epi32(1 << kBit), all = _mm256_set1_epi32(static_cast<int>(value));
    const auto chosen = [&](__m256i x) {
        return _mm256_and_si256(_mm256_cmpeq_epi32(_mm256_and_si256(x, bit), bit), all);
    };
    return {chosen(a.lo), chosen(a.hi)};
}
template <int kBit>
inline Vec floats_where(Bytes a, float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const Bytes chosen = words_where<kBit>(a, bits);
    return {_mm256_castsi256_ps(chosen.lo), _mm256_castsi256_ps(chosen.hi)};
}
inline Vec nibbles_to_float(uint64_t nibbles) {
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const auto eight = [&](uint64_t word) {
        const __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shifts);
        return _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(15)));
    };
    return {eight(nibbles & 0xffffffff), eight(nibbles >> 32)};
}
inline Shorts join_even(Bytes low, Bytes high) {
    const __m256i mask = _mm256_set1_epi32(0x00ff00ff);
    const auto join = [&](__m256i x, __m256i y) {
        return _mm256_or_si256(_mm256_and_si256(x, mask), _mm256_slli_epi16(y, 8));
    };
    return {join(low.lo, high.lo), join(low.hi, high.hi)};
}
inline Shorts join_odd(Bytes low, Bytes high) {
    const __m256i mask = _mm256_set1_epi32(0x00ff00ff);
    const auto join = [&](__m256i x, __m256i y) {
        return _mm256_or_si256(_mm256_srli_epi16(x, 8), _mm256_andnot_si256(mask, y));
    };
    return {join(low.lo, high.lo), join(low.hi, high.hi)};
}
// Reads the word behind the table, too.
template <int kCount>
inline Shorts look_up_words(Shorts a, const uint16_t* table) {
    const auto gathered = [table](__m256i words) {
        const int* pairs = reinterpret_cast<const int*>(table);
        const __m256i mask = _mm256_set1_epi32(0xffff);
        const __m256i low = _mm256_i32gather_epi32(pairs, _mm256_and_si256(words, mask), 2);
        const __m256i high = _mm256_i32gather_epi32(pairs, _mm256_srli_epi32(words, 16), 2);
        return _mm256_or_si256(_mm256_and_si256(low, mask), _mm256_slli_epi32(high, 16));
    };
    return {gathered(a.lo), gathered(a.hi)};
}
inline __m256i low_words(__m256i low, __m256i high) { return _mm256_blend_epi16(high, low, 0x55); }
template <int kBits>
inline Bytes spread_low(Shorts a) {
    return {low_words(a.lo, _mm256_slli_epi32(a.lo, 16 - kBits)), low_words(a.hi, _mm256_slli_epi32(a.hi, 16 - kBits))};
}
template <int kBits>
inline Bytes spread_high(Shorts a) {
    return {low_words(_mm256_srli_epi32(a.lo, 16), _mm256_srli_epi32(a.lo, kBits)),
            low_words(_mm256_srli_epi32(a.hi, 16), _mm256_srli_epi32(a.hi, kBits))};
}
template <int kBase>
inline Bytes ternary_digit(Bytes a) {
    const auto digit = [](__m256i x) {
        const __m256i one = _mm256_set1_epi8(86), two = _mm256_set1_epi8(static_cast<char>(171));
        const __m256i above = _mm256_cmpeq_epi8(_mm256_max_epu8(x, one), x);
        const __m256i far = _mm256_cmpeq_epi8(_mm256_max_epu8(x, two), x);
        return _mm256_sub_epi8(_mm256_sub_epi8(_mm256_set1_epi8(kBase), above), far);
    };
    return {digit(a.lo), digit(a.hi)};
}
inline Bytes ternary_rest(Bytes a) {
    return {_mm256_add_epi8(a.lo, _mm256_add_epi8(a.lo, a.lo)), _mm256_add_epi8(a.hi, _mm256_add_epi8(a.hi, a.hi))};
}
inline Bytes look_up(Bytes a, const uint8_t* values) {
    const __m256i table = _mm256_broadcastsi128_si256(load_128(values));
    return {_mm256_shuffle_epi8(table, a.lo), _mm256_shuffle_epi8(table, a.hi)};
}
inline Shorts even_bytes(Bytes a) {
    const __m256i mask = _mm256_set1_epi32(0x00ff00ff);
    return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
inline Shorts load_shorts(const int16_t* p) { return {load_256(p), load_256(p + 16)}; }
inline Shorts odd_bytes(Bytes a) { return {_mm256_srli_epi16(a.lo, 8), _mm256_srli_epi16(a.hi, 8)}; }
template <int kIndex>
inline Vec byte_to_float(Bytes a) {
    const auto convert = [](__m256i v) {
        return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(v, 8 * kIndex), _mm256_set1_epi32(255)));
    };
    return {convert(a.lo), convert(a.hi)};
}
constexpr float kFloat8Unit = 256.0f;
inline Vec load_float8(const uint8_t* p) {
    // The sign comes into bits 15 and 14, of which the second is the exponent's.
    const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load_128(p)), 7);
    const __m256i half = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}
typedef Vec Table;
inline Table load_table(const float* p) { return load(p); }
template <int kIndex>
inline Vec byte_of_table(Bytes a, const Table& table) {
    const auto look = [&](__m256i x) {
        const __m256i number = _mm256_srli_epi32(x, 8 * kIndex);
        const __m256 low = _mm256_permutevar8x32_ps(table.lo, number), high = _mm256_permutevar8x32_ps(table.hi, number);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(number, 28)));
    };
    return {look(a.lo), look(a.hi)};
}
inline IVec dot(IVec sum, Shorts a, const int32_t* word) {
    const __m256i b = _mm256_set1_epi32(*word);
    return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(a.lo, b)), _mm256_add_epi32(sum.hi, _mm256_madd_epi16(a.hi, b))};
}
// vpmaddubsw adds two products in 16 bits, where those of full-range bytes would saturate.
template <bool kFullRange>
inline IVec dot(IVec sum, Bytes a, const int32_t* word) {
    const __m256i b = _mm256_set1_epi32(*word);
    if (kFullRange) {
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), odd = _mm256_srai_epi16(b, 8);
        const Shorts e = even_bytes(a), o = odd_bytes(a);
        const auto both = [&](__m256i x, __m256i y) {
            return _mm256_add_epi32(_mm256_madd_epi16(x, even), _mm256_madd_epi16(y, odd));
        };
        return {_mm256_add_epi32(sum.lo, both(e.lo, o.lo)), _mm256_add_epi32(sum.hi, both(e.hi, o.hi))};
    }
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(_mm256_maddubs_epi16(a.lo, b), ones)),
            _mm256_add_epi32(sum.hi, _mm256_madd_epi16(_mm256_maddubs_epi16(a.hi, b), ones))};
}

inline void transpose_pairs(const int16_t* in, int16_t* out, int64_t stride) {
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    for (int part = 0; part < 4; ++part) {  // eight positions of eight dimensions
        const int16_t* from = in + part / 2 * 128 + part % 2 * 16;
        int16_t* to = out + part % 2 * 4 * stride + part / 2 * 16;
        const __m256i a = load_256(from), b = load_256(from + 32), c = load_256(from + 64), d = load_256(from + 96);
        const __m256i ab = _mm256_unpacklo_epi64(a, b), cd = _mm256_unpacklo_epi64(c, d);
        const __m256i ab_odd = _mm256_unpackhi_epi64(a, b), cd_odd = _mm256_unpackhi_epi64(c, d);
        const auto write = [&](int pair, __m256i words) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + pair * stride), _mm256_shuffle_epi8(words, order));
        };
        write(0, _mm256_permute2x128_si256(ab, cd, 0x20));
        write(1, _mm256_permute2x128_si256(ab_odd, cd_odd, 0x20));
        write(2, _mm256_permute2x128_si256(ab, cd, 0x31));
        write(3, _mm256_permute2x128_si256(ab_odd, cd_odd, 0x31));
    }
}

}  // namespace
}  // namespace aph
