// The kernels for plain C++.
#include "kernels.h"

#include "simd_portable.h"
// after the lanes' definition
#include "kernel_table.h"

namespace aph {
const Kernels* kernels_portable() {
    static const Kernels table = kernel_table("portable");
    return &table;
}
}  // namespace aph
