// Measures the machine's limits with the kernels' own instructions.
#include <chrono>

#include "api.h"
#include "kernels.h"
#include "thread_pool.h"

namespace aph {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point began) { return std::chrono::duration<double>(Clock::now() - began).count(); }

template <class F>
double region_seconds(int threads, F body) {
    const Clock::time_point began = Clock::now();
    run_region(
        threads, [](void* context, Team&, int worker) { (*static_cast<F*>(context))(worker); }, &body);
    return seconds_since(began);
}

}  // namespace
}  // namespace aph

// Multiply-adds per second (two operations each) of 16-bit or 8-bit dot products on registers, all threads together.
APH_API double aph_measure_dots(const char* isa, int32_t threads, int32_t bits, int64_t iterations) {
    const aph::Kernels* kernels = aph::select_kernels(isa);
    if (kernels == nullptr) return 0;
    const double seconds = aph::region_seconds(threads, [=](int) {
        volatile int32_t sink = bits == 16 ? kernels->dot_shorts(iterations) : kernels->dot_bytes(iterations);
        (void)sink;
    });
    return static_cast<double>(iterations) * kernels->dot_chains * (bits == 16 ? 32 : 64) * threads / seconds;
}

// Bytes per second when all threads read their share of `data` once; bytes is a multiple of 256 * threads.
APH_API double aph_measure_read(const char* isa, int32_t threads, const uint8_t* data, int64_t bytes) {
    const aph::Kernels* kernels = aph::select_kernels(isa);
    if (kernels == nullptr) return 0;
    const int64_t share = bytes / threads / 256 * 256;
    const double seconds = aph::region_seconds(threads, [=](int worker) {
        volatile int32_t sink = kernels->read_all(data + worker * share, share);
        (void)sink;
    });
    return static_cast<double>(share * threads) / seconds;
}
