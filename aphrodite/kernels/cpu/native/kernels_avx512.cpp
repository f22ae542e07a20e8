// The kernels for AVX-512 with VNNI.
#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "simd_avx512.h"
// after the lanes' definition
#include "kernel_table.h"
#include "pack_avx512.h"
#include "paired_dots.h"
#include "paired_attention.h"

namespace aph {
const Kernels* kernels_avx512() {
    static const Kernels table = kernel_table("avx512");
    return &table;
}
}  // namespace aph
#else
namespace aph {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace aph
#endif
