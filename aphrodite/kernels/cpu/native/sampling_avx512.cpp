#include "sampling.h"

#if defined(__AVX512F__)
#include "sampling_row.h"
const aph::SamplerKernels* aph::sampler_kernels_avx512() { return &kSamplerKernels; }
#else
const aph::SamplerKernels* aph::sampler_kernels_avx512() { return nullptr; }
#endif
