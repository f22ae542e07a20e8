#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
namespace aph {
namespace {
const Kernels kKernels = {"avx2"};
}
const Kernels* kernels_avx2() { return &kKernels; }
}  // namespace aph
#else
namespace aph {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace aph
#endif
