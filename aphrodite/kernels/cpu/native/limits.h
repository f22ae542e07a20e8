// What this machine can do at most, for benchmarks. Included after a simd_*.h.
#pragma once
#include <cstdint>

namespace aph {
namespace {

constexpr int kChains = 12;

// Dot instructions on registers: `iterations` times kChains independent ones of 16 lanes. Returns a checksum.
template <bool kShorts>
int32_t dot_chains(int64_t iterations) {
    alignas(64) uint8_t source[64];
    for (int i = 0; i < 64; ++i) source[i] = static_cast<uint8_t>(i);
    const Bytes bytes = load_bytes(source);
    const Shorts shorts = even_bytes(bytes);
    const int32_t word = 0x01020304;
    // Chains that start alike would be merged into one.
    int32_t starts[kChains];
    for (int c = 0; c < kChains; ++c) starts[c] = c;
    IVec sums[kChains];
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = splat_shifted<0>(starts + c);
    for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) {
            if constexpr (kShorts) sums[c] = dot(sums[c], shorts, &word);
            else sums[c] = dot<false>(sums[c], bytes, &word);
        }
    }
    for (int c = 1; c < kChains; ++c) sums[0] = add(sums[0], sums[c]);
    return sum(sums[0]);
}

// Reads `bytes` (a multiple of 256) once, with software prefetch. Returns a checksum.
int32_t read_all(const uint8_t* data, int64_t bytes) {
    IVec total = izero();
    for (int64_t i = 0; i < bytes; i += 256)
        for (int line = 0; line < 256; line += 64) {
            __builtin_prefetch(data + i + line + 4096);
            total = dot<false>(total, load_bytes(data + i + line), reinterpret_cast<const int32_t*>(data));
        }
    return sum(total);
}

}  // namespace
}  // namespace aph
