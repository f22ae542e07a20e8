// Large, long-lived memory (weights, KV cache), on huge pages where the system has them.
#include <cstddef>
#include <cstdlib>

#include "api.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace aph {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

size_t round_up(int64_t bytes) { return (static_cast<size_t>(bytes) + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace
}  // namespace aph

// Zeroed memory, aligned to 2 MiB, or null; to be returned with aph_free and the same size. Pages are taken from the
// system when they are first written.
APH_API void* aph_allocate(int64_t bytes) {
#if defined(__linux__)
    const size_t size = aph::round_up(bytes) + aph::kHugePage;
    char* raw = static_cast<char*>(
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (raw == MAP_FAILED) return nullptr;
    const size_t offset = (aph::kHugePage - reinterpret_cast<size_t>(raw) % aph::kHugePage) % aph::kHugePage;
    if (offset > 0) munmap(raw, offset);
    if (offset < aph::kHugePage) munmap(raw + size - (aph::kHugePage - offset), aph::kHugePage - offset);
    madvise(raw + offset, size - aph::kHugePage, MADV_HUGEPAGE);  // a refusal costs speed only
    return raw + offset;
#else
    return std::calloc(aph::round_up(bytes), 1);
#endif
}

APH_API void aph_free(void* memory, int64_t bytes) {
    if (memory == nullptr) return;
#if defined(__linux__)
    munmap(memory, aph::round_up(bytes));
#else
    (void)bytes;
    std::free(memory);
#endif
}
