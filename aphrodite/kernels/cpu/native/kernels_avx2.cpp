// The kernels for AVX2 with FMA and F16C.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "simd_avx2.h"
// after the lanes' definition
#include "kernel_table.h"

namespace aph {
const Kernels* kernels_avx2() {
    static const Kernels table = kernel_table("avx2");
    return &table;
}
}  // namespace aph
#else
namespace aph {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace aph
#endif
