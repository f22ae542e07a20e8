#include "sampling.h"

#if defined(__AVX2__)
#include "sampling_row.h"
const aph::SamplerKernels* aph::sampler_kernels_avx2() { return &kSamplerKernels; }
#else
const aph::SamplerKernels* aph::sampler_kernels_avx2() { return nullptr; }
#endif
