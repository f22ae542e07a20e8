// The kernels of one instruction set, and the choice between the sets.
#pragma once

namespace aph {

struct Kernels {
    const char* isa;
};

// Null where the compiler or the processor family lacks the instruction set.
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

// The best set that this processor runs, or the named one; null if the name is unknown or it cannot run here.
const Kernels* select_kernels(const char* name);

}  // namespace aph
