// Two dot products by one instruction and two additions. Included after simd_avx512.h and linear.h.
//
//     (w0 + a1) (w1 + a0) = w0 a0 + w1 a1 + w0 w1 + a0 a1        (S. Winograd, doi:10.1109/TC.1968.227420)
//
// w0 w1 belongs to the tile and is summed up once for its rows, a0 a1 to the row and comes packed with it. All of it is
// exact modulo 2^32, so that the sums are those of ordinary dots.
//
// Cost: a processor with two units for products and two more that add, as AMD's Zen 4, does two dots in 1.5 times the
// time of one. With half of the dots paired its units are busy alike.
#pragma once
#include "linear.h"

namespace aph {
namespace {

// Whether integers are added beside dot instructions, on units of their own.
inline bool adds_beside_dots() {
    static const bool amd = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
    return amd;
}

// Adds the products of a pair of groups to `sums`, and what of them belongs to the tile alone to `own` as well.
template <Activation kKind, int kFirst, int kSecond, int kRows>
inline void dot_pair(const Bytes (&groups)[2], const int32_t* words, IVec& own, IVec (&sums)[kRows]) {
    constexpr int kWidth = kRows;
    if constexpr (kKind == Activation::Int16) {
        const Shorts even = even_bytes(groups[0]), odd = odd_bytes(groups[0]);
        own = dot(own, even, odd);
        const int32_t *even_words = words + 2 * kFirst * kWidth, *odd_words = even_words + kWidth;
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m)
            sums[m] = dot(sums[m], add_word(even, odd_words + m), add_word(odd, even_words + m));
        dot_group<kKind, false, kWidth, kRows>(groups[1], kSecond, words, sums);
    } else {
        // 0 to 15 and -120 to 120 become 0 to 255 and -128 to 127.
        const Bytes first = add_byte(groups[0], kLargestInt8), second = add_byte(groups[1], -8);
        own = dot(own, first, second);
        const int32_t *first_words = words + kFirst * kWidth, *second_words = words + kSecond * kWidth;
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m)
            sums[m] = dot(sums[m], add_word(first, second_words + m), add_word(second, first_words + m));
    }
}

}  // namespace
}  // namespace aph
