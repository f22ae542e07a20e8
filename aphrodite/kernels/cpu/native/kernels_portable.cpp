#include "kernels.h"

namespace aph {
namespace {
const Kernels kKernels = {"portable"};
}
const Kernels* kernels_portable() { return &kKernels; }
}  // namespace aph
