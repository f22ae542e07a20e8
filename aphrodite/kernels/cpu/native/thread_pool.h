// A pool of threads for work measured in microseconds.
//
// Helpers spin between regions, then yield, then sleep. The calling thread is worker 0. Inside a region the workers
// run phases: a phase's chunks are first taken from the worker's own share and then stolen from the others', so a
// worker that the operating system took off its core delays the rest by one chunk at most.
#pragma once
#include <atomic>
#include <cstdint>

namespace aph {

constexpr int kMaxThreads = 256;
constexpr int kCacheLine = 64;

struct alignas(kCacheLine) Counter {
    std::atomic<int64_t> taken{0};
};

// The workers of one region.
class Team {
public:
    void reset(int size);
    int size() const { return size_; }

    // Runs f(chunk) for every chunk in [0, chunks), then waits for all workers. Every worker of the region must call
    // it with the same number of chunks, in the same order of phases.
    template <class F>
    void phase(int worker, int64_t chunks, F&& f) {
        if (size_ == 1) {
            for (int64_t chunk = 0; chunk < chunks; ++chunk) f(chunk);
            return;
        }
        const int set = parity_[worker].taken.load(std::memory_order_relaxed) & 1;
        parity_[worker].taken.store(set ^ 1, std::memory_order_relaxed);
        // The other set belongs to the phase that everybody has left; it is used again after the next barrier.
        counters_[set ^ 1][worker].taken.store(0, std::memory_order_relaxed);
        for (int step = 0; step < size_; ++step) {
            const int owner = worker + step < size_ ? worker + step : worker + step - size_;
            const int64_t begin = chunks * owner / size_, end = chunks * (owner + 1) / size_;
            std::atomic<int64_t>& taken = counters_[set][owner].taken;
            while (taken.load(std::memory_order_relaxed) < end - begin) {
                const int64_t chunk = begin + taken.fetch_add(1, std::memory_order_relaxed);
                if (chunk >= end) break;
                f(chunk);
            }
        }
        barrier();
    }

    // Waits for all workers of the region.
    void barrier();

private:
    int size_ = 1;
    Counter counters_[2][kMaxThreads];
    Counter parity_[kMaxThreads];
    alignas(kCacheLine) std::atomic<int> arrived_{0};
    alignas(kCacheLine) std::atomic<uint32_t> generation_{0};
};

using RegionFn = void (*)(void* context, Team& team, int worker);
using ChunkFn = void (*)(void* context, int64_t chunk, int worker);

// Runs fn once on each of `threads` workers (the caller included) and returns when all are done. Calls from several
// threads take turns; a call from inside a region runs alone on the calling worker.
void run_region(int threads, RegionFn fn, void* context);

// Runs fn for every chunk in [0, chunks) on the default number of workers; any order, any worker.
void parallel_for(int64_t chunks, ChunkFn fn, void* context);

// Workers that parallel_for uses; at first the number of cores this process may run on.
void set_default_threads(int threads);
int default_threads();
int available_cores();

}  // namespace aph
