#include "kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__F16C__)
namespace aph {
namespace {
const Kernels kKernels = {"avx512"};
}
const Kernels* kernels_avx512() { return &kKernels; }
}  // namespace aph
#else
namespace aph {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace aph
#endif
