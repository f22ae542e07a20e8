// Elementary functions over sixteen lanes; included after a simd_*.h.
#pragma once

namespace aph {
namespace {

// 2^x for x that is not minus infinity, relative error below 2e-7; 0 far below the smallest normal number; NaN stays
// NaN.
inline Vec exp2_of_finite(Vec x) {
    const Vec whole = round_to_whole(x);
    const Vec f = sub(x, whole);
    // The polynomial of the smallest relative error for 2^f on [-1/2, 1/2] that is exact at 0.
    Vec p = splat(1.3264727e-3f);
    p = fma(p, f, splat(9.6715127e-3f));
    p = fma(p, f, splat(5.5507337e-2f));
    p = fma(p, f, splat(2.4022242e-1f));
    p = fma(p, f, splat(6.9314698e-1f));
    return scale_by_power(fma(p, f, splat(1.0f)), whole);
}

constexpr float kLeastPower = -160.0f;  // 2^x is 0

inline Vec exp2(Vec x) { return exp2_of_finite(max(splat(kLeastPower), x)); }

constexpr float kLog2E = 1.4426950408889634f;

// x / (1 + exp(-y))
inline Vec times_sigmoid(Vec x, Vec y) { return div(x, add(splat(1.0f), exp2(mul(y, splat(-kLog2E))))); }

inline Vec silu(Vec x) { return times_sigmoid(x, x); }

// The tanh form of GELU (arXiv 1606.08415): 0.5 x (1 + tanh(z)) = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3).
inline Vec gelu_tanh(Vec x) {
    const Vec cubic = fma(mul(mul(x, x), splat(0.044715f)), x, x);
    return times_sigmoid(x, mul(cubic, splat(1.5957691216057308f)));
}

// GPT-OSS's gated activation (arXiv 2508.10925): gate * sigmoid(1.702 * gate) * (up + 1) of values bounded to 7, the
// gate from above only. A NaN passes the bounds.
inline Vec bounded_swiglu(Vec gate, Vec up) {
    constexpr float kSlope = 1.702f, kLimit = 7.0f;
    const Vec low = min(splat(kLimit), gate);
    const Vec shifted = add(max(splat(-kLimit), min(splat(kLimit), up)), splat(1.0f));
    return mul(times_sigmoid(low, mul(low, splat(kSlope))), shifted);
}

// bound * tanh(x / bound) = bound - 2 bound / (1 + exp(2 x / bound))
inline Vec soft_bound(Vec x, float bound) {
    const Vec grown = exp2(mul(x, splat(2.0f * kLog2E / bound)));
    return sub(splat(bound), div(splat(2.0f * bound), add(splat(1.0f), grown)));
}

}  // namespace
}  // namespace aph
