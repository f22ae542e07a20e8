// Low-rank adapters (arXiv 2106.09685): what one adds to a row's product with a weight is scale * B (A x).
#pragma once
#include <cstdint>

namespace aph {

// An adapter's pair for one weight. Mirrored in aphrodite/kernels/cpu/program.py.
struct LowRank {
    const void* a;  // [rank][columns]
    const void* b;  // tiles of 16 rows of the weight: [tiles][rank][16], the last one padded; null: it adds nothing
    int64_t rank;
    int32_t type;   // Type of both: F32, F16 or BF16
    float scale;
};

constexpr int kAdapterRows = 4;

// Rows of a step that one adapter computes, in order.
struct AdapterBlock {
    int32_t slot, count;
    int64_t rows[kAdapterRows];
};

// What the adapters of a step add to the products with one weight.
struct AdapterRows {
    const LowRank* pairs;  // of slot s at pairs[s * stride]
    int64_t stride;
    const int32_t* slots;  // [rows], -1: none
    const float* low;      // [rows][width], scale * A x
    int64_t width;
};

}  // namespace aph
