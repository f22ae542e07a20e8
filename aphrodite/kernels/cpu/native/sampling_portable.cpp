#include "sampling_row.h"

const aph::SamplerKernels* aph::sampler_kernels_portable() { return &kSamplerKernels; }
