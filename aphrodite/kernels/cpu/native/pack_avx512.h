// Packs eight rows for matrix products with AVX-512, the sums of quants and what paired dots need among them. Included
// after simd_avx512.h and rows.h.
#pragma once
#include "rows.h"

namespace aph {
namespace {

// The larger magnitude of each pair, as integers: those order like floats, and NaN comes last.
inline __m512i larger_magnitude(const float* x) {
    const __m512i mask = _mm512_set1_epi32(0x7fffffff);
    return _mm512_max_epi32(_mm512_and_si512(_mm512_loadu_si512(x), mask),
                            _mm512_and_si512(_mm512_loadu_si512(x + 16), mask));
}

// Largest magnitude of 32 values of each of eight rows.
inline __m256 largest_of_eight(const float* x, int64_t stride) {
    __m512i rows[8];
#pragma GCC unroll 8
    for (int m = 0; m < 8; ++m) rows[m] = larger_magnitude(x + m * stride);
    __m512i quarters[4];  // of rows m and m + 4, each in four lanes of every half
#pragma GCC unroll 4
    for (int m = 0; m < 4; ++m)
        quarters[m] = _mm512_max_epi32(_mm512_shuffle_i64x2(rows[m], rows[m + 4], 0x44),
                                       _mm512_shuffle_i64x2(rows[m], rows[m + 4], 0xee));
    // Of rows 0 and 1, then 2 and 3: two lanes each of every 128 bits; then one lane each.
    const __m512i low = _mm512_max_epi32(_mm512_unpacklo_epi32(quarters[0], quarters[1]),
                                         _mm512_unpackhi_epi32(quarters[0], quarters[1]));
    const __m512i high = _mm512_max_epi32(_mm512_unpacklo_epi32(quarters[2], quarters[3]),
                                          _mm512_unpackhi_epi32(quarters[2], quarters[3]));
    const __m512i four = _mm512_max_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
    // Rows 0 to 3 lie in the first two 128 bits, rows 4 to 7 in the others.
    const __m512i swapped = _mm512_shuffle_i64x2(four, four, 0xb1);
    const __m512i most = _mm512_max_epi32(four, swapped);
    return _mm256_castsi256_ps(_mm512_castsi512_si256(_mm512_shuffle_i64x2(most, most, 0x88)));
}

// Quants of a row: 32 16-bit integers, in every 128 bits four of columns 0 to 15 and four of columns 16 to 31.
inline __m512i quants_of(const float* x, float inverse) {
    const __m512 factor = _mm512_set1_ps(inverse);
    return _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), factor)),
                              _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), factor)));
}

// Four rows' 128 bits each: out[i] holds piece i of every row.
inline void transpose_pieces(const __m512i (&rows)[4], __m512i (&out)[4]) {
    const __m512i a = _mm512_shuffle_i64x2(rows[0], rows[1], 0x44), b = _mm512_shuffle_i64x2(rows[2], rows[3], 0x44);
    const __m512i c = _mm512_shuffle_i64x2(rows[0], rows[1], 0xee), d = _mm512_shuffle_i64x2(rows[2], rows[3], 0xee);
    out[0] = _mm512_shuffle_i64x2(a, b, 0x88);
    out[1] = _mm512_shuffle_i64x2(a, b, 0xdd);
    out[2] = _mm512_shuffle_i64x2(c, d, 0x88);
    out[3] = _mm512_shuffle_i64x2(c, d, 0xdd);
}

constexpr int32_t kEvenThenOdd[16] = {0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15};

inline __m256i both_halves(__m512i a) {
    return _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
}

// Of eight rows: the sums of quants of columns 0 to 15 and of 16 to 31, and what paired dots add for a row alone.
struct EightSums {
    __m256i first, second, paired;
};

// words[16][8] of two columns.
inline EightSums store_words(const __m512i (&quants)[8], std::integral_constant<int, 16>, int32_t* words) {
    const __m512i ones = _mm512_set1_epi16(1);
    __m512i first = _mm512_setzero_si512(), second = first;
    __m256i paired = _mm256_setzero_si256();
    for (int half = 0; half < 2; ++half) {
        __m512i rows[4], pieces[4];
        for (int pair = 0; pair < 4; ++pair)
            rows[pair] = half == 0 ? _mm512_unpacklo_epi64(quants[2 * pair], quants[2 * pair + 1])
                                   : _mm512_unpackhi_epi64(quants[2 * pair], quants[2 * pair + 1]);
        transpose_pieces(rows, pieces);
        for (int i = 0; i < 4; ++i) {
            const __m512i two = _mm512_permutexvar_epi32(_mm512_loadu_si512(kEvenThenOdd), pieces[i]);
            _mm512_storeu_si512(words + (8 * half + 2 * i) * 8, two);
            if (half == 0) {
                first = _mm512_dpwssd_epi32(first, two, ones);
                paired = _mm256_dpwssd_epi32(paired, _mm512_castsi512_si256(two), _mm512_extracti64x4_epi64(two, 1));
            } else {
                second = _mm512_dpwssd_epi32(second, two, ones);
            }
        }
    }
    return {both_halves(first), both_halves(second), paired};
}

// words[8][8] of four columns in the order 0 2 1 3.
inline EightSums store_words(const __m512i (&quants)[8], std::integral_constant<int, 8>, int32_t* words) {
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
    __m512i rows[4], pieces[4];
    for (int pair = 0; pair < 4; ++pair)
        rows[pair] = _mm512_shuffle_epi8(_mm512_packs_epi16(quants[2 * pair], quants[2 * pair + 1]), order);
    transpose_pieces(rows, pieces);
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sums = _mm512_setzero_si512();  // of columns 0 to 15, then of 16 to 31
    __m256i paired = _mm256_setzero_si256();
    for (int i = 0; i < 4; ++i) {
        const __m512i two = _mm512_permutexvar_epi32(_mm512_loadu_si512(kEvenThenOdd), pieces[i]);
        const __m256i low = _mm512_castsi512_si256(two), high = _mm512_extracti64x4_epi64(two, 1);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i * 8), low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + (4 + i) * 8), high);
        sums = _mm512_dpbusd_epi32(sums, ones, two);
        if (i < kPairedBytes) {
            // (first + 120) (second) + 120 first - 8 second, all sums of quants
            const __m256i most = _mm256_set1_epi8(kLargestInt8);
            paired = _mm256_dpbusd_epi32(paired, _mm256_add_epi8(low, most), high);
            paired = _mm256_dpbusd_epi32(paired, most, low);
            const __m256i eight = _mm256_set1_epi8(8 + kLargestInt8);
            paired = _mm256_sub_epi32(paired, _mm256_dpbusd_epi32(_mm256_setzero_si256(), eight, high));
        }
    }
    return {_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1), paired};
}

template <int kBits>
void pack_eight(const float* x, int64_t stride, int32_t* words, float* meta) {
    const __m256 largest = largest_of_eight(x, stride);
    constexpr float kLargest = kBits == 16 ? kLargestInt16 : kLargestInt8;
    const __m256 inverse = _mm256_blendv_ps(_mm256_setzero_ps(), _mm256_div_ps(_mm256_set1_ps(kLargest), largest),
                                            _mm256_cmp_ps(largest, _mm256_setzero_ps(), _CMP_GT_OQ));
    alignas(32) float inverses[8];
    _mm256_store_ps(inverses, inverse);
    __m512i quants[8];
#pragma GCC unroll 8
    for (int m = 0; m < 8; ++m) quants[m] = quants_of(x + m * stride, inverses[m]);
    const EightSums sums = store_words(quants, std::integral_constant<int, kBits>(), words);
    const __m256i all = _mm256_add_epi32(sums.first, sums.second), none = _mm256_setzero_si256();
    const __m256 scale = _mm256_mul_ps(largest, _mm256_set1_ps(1.0f / kLargest));
    _mm256_storeu_ps(meta, scale);
    _mm256_storeu_ps(meta + 8, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(all)));
    __m256i* negative = reinterpret_cast<__m256i*>(meta + 16);
    _mm256_storeu_si256(negative, _mm256_sub_epi32(none, all));
    _mm256_storeu_si256(negative + 1, _mm256_sub_epi32(none, sums.first));
    _mm256_storeu_si256(negative + 2, _mm256_sub_epi32(none, sums.second));
    _mm256_storeu_si256(negative + 3, _mm256_sub_epi32(none, sums.paired));
}

}  // namespace
}  // namespace aph
