// Columns of activations in another order, for weights whose groups of inputs are scattered (GPTQ's act-order, arXiv
// 2210.17323). Their codes lie in the order of the groups, so that products see consecutive groups; what they multiply
// follows them.
//
// Cost: a load and a store for each column and row, beside a product's whole row of weights.
#pragma once
#include <cstdint>

namespace aph {

// Rows of floats, row r at data + r * stride.
struct FloatRows {
    const float* data;
    int64_t stride;
};

// out[r][c] = rows[r][order[c]].
inline void gather_columns(FloatRows rows, int count, const int32_t* order, int64_t columns, float* out) {
    for (int r = 0; r < count; ++r)
        for (int64_t c = 0; c < columns; ++c) out[r * columns + c] = rows.data[r * rows.stride + order[c]];
}

}  // namespace aph
