// IEEE binary16 and bfloat16 in plain C++, for code outside the vector kernels.
#pragma once
#include <cstdint>
#include <cstring>

namespace aph {

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Exact for every half, subnormals, infinities and NaN included; without branches, so loops over it vectorise.
inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
    // 2^112 moves the exponent bias from 15 to 127 and normalises subnormals in passing.
    const uint32_t scaled = float_to_bits(bits_to_float(magnitude) * bits_to_float(0x77800000));
    const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 | magnitude : scaled;
    return bits_to_float(sign | special);
}

// Rounds to nearest even, overflows to infinity, keeps NaN.
inline uint16_t float_to_half(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        // Adding 0.5 leaves the subnormal's bits, rounded by the addition itself, at the bottom of the word.
        const uint32_t shifted = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
        return static_cast<uint16_t>(sign | shifted);
    }
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

inline float bfloat_to_float(uint16_t value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }

// e4m3 of the OCP 8-bit floating point specification; NaN, which no weight is, becomes 480.
inline float float8_to_float(uint8_t value) {
    const uint32_t half = static_cast<uint32_t>(value & 0x80) << 8 | static_cast<uint32_t>(value & 0x7f) << 7;
    return half_to_float(static_cast<uint16_t>(half)) * 256.0f;
}

}  // namespace aph
