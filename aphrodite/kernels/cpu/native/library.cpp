// What the library says about itself, and the choice of an instruction set.
#include <cstring>
#include <initializer_list>

#include "api.h"
#include "kernels.h"
#include "thread_pool.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace aph {
namespace {

#if defined(__x86_64__)
// Asked of the processor itself: GCC before 11 and clang before 14 know no such name.
bool has_f16c() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & (1u << 29)) != 0;
}
#endif

bool runs_here(const Kernels* kernels) {
    if (kernels == nullptr) return false;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (std::strcmp(kernels->isa, "avx2") == 0) return avx2;
    if (std::strcmp(kernels->isa, "avx512") == 0)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return true;
}

}  // namespace

const Kernels* select_kernels(const char* name) {
    for (const Kernels* kernels : {kernels_avx512(), kernels_avx2(), kernels_portable()})
        if (runs_here(kernels) && (name == nullptr || *name == '\0' || std::strcmp(name, kernels->isa) == 0))
            return kernels;
    return nullptr;
}

}  // namespace aph

APH_API int32_t aph_abi_version() { return kAbiVersion; }

// Name of the instruction set that `name` selects (null or empty: the best one); null if it cannot run here.
APH_API const char* aph_select_isa(const char* name) {
    const aph::Kernels* kernels = aph::select_kernels(name);
    return kernels == nullptr ? nullptr : kernels->isa;
}

APH_API int32_t aph_available_cores() { return aph::available_cores(); }

// Workers for parallel work outside a model's step.
APH_API void aph_set_default_threads(int32_t threads) { aph::set_default_threads(threads); }
