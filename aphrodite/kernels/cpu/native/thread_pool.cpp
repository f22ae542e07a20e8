#include "thread_pool.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace aph {
namespace {

// A helper is called again within microseconds while a step runs and within about half a millisecond between steps.
constexpr int kSpins = 2000;
constexpr auto kAwake = std::chrono::milliseconds(3);

thread_local bool in_region = false;

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

#if defined(__linux__)
std::vector<int> allowed_cores() {
    cpu_set_t set;
    std::vector<int> cores;
    if (sched_getaffinity(0, sizeof set, &set) == 0)
        for (int core = 0; core < CPU_SETSIZE; ++core)
            if (CPU_ISSET(core, &set)) cores.push_back(core);
    return cores;
}

void pin(pthread_t thread, int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(thread, sizeof set, &set);  // a refusal costs speed only
}
#endif

class Pool {
public:
    void run(int threads, RegionFn fn, void* context) {
        std::lock_guard<std::mutex> turn(turn_);
        grow(threads);
        place_helpers();
        team_.reset(threads);
        fn_ = fn;
        context_ = context;
        running_.store(threads - 1, std::memory_order_relaxed);
        const uint64_t number = (ticket_.load(std::memory_order_relaxed) >> 16) + 1;
        ticket_.store(number << 16 | static_cast<uint64_t>(threads), std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) {
            std::lock_guard<std::mutex> lock(sleep_);
            wake_.notify_all();
        }
        fn(context, team_, 0);
        for (int spin = 0; running_.load(std::memory_order_acquire) > 0; ++spin)
            if (spin < kSpins) pause();
            else std::this_thread::yield();
    }

private:
    void grow(int threads) {
        while (static_cast<int>(helpers_) < threads - 1) {
            const int worker = ++helpers_;
            const uint64_t seen = ticket_.load();
            std::thread helper([this, worker, seen] { loop(worker, seen); });
#if defined(__linux__)
            handles_.push_back(helper.native_handle());
#endif
            helper.detach();
        }
    }

    // Keeps helpers off the caller's core: a helper that wakes up there would wait for the caller, who waits for it.
    void place_helpers() {
#if defined(__linux__)
        const int caller = sched_getcpu();
        if (handles_.empty() || (caller == caller_core_ && placed_ == handles_.size())) return;
        if (cores_.empty()) cores_ = allowed_cores();
        caller_core_ = caller;
        placed_ = handles_.size();
        std::vector<int> others;
        for (int core : cores_)
            if (core != caller) others.push_back(core);
        if (others.empty()) return;
        for (size_t i = 0; i < handles_.size(); ++i) pin(handles_[i], others[i % others.size()]);
#endif
    }

    void loop(int worker, uint64_t seen) {
        in_region = true;
        for (;;) {
            wait_for_work(seen);
            seen = ticket_.load(std::memory_order_acquire);
            if (worker >= static_cast<int>(seen & 0xffff)) continue;
            fn_(context_, team_, worker);
            running_.fetch_sub(1, std::memory_order_release);
        }
    }

    void wait_for_work(uint64_t seen) {
        for (int spin = 0; spin < kSpins; ++spin) {
            if (ticket_.load(std::memory_order_acquire) != seen) return;
            pause();
        }
        const auto until = std::chrono::steady_clock::now() + kAwake;
        while (std::chrono::steady_clock::now() < until) {
            if (ticket_.load(std::memory_order_acquire) != seen) return;
            std::this_thread::yield();
        }
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return ticket_.load(std::memory_order_seq_cst) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
    }

    Team team_;
    RegionFn fn_ = nullptr;
    void* context_ = nullptr;
    // Number of the region and how many workers it has, in one word: read apart they could belong to two regions.
    alignas(kCacheLine) std::atomic<uint64_t> ticket_{0};
    alignas(kCacheLine) std::atomic<int> running_{0};
    alignas(kCacheLine) std::atomic<int> sleepers_{0};
    std::mutex turn_, sleep_;
    std::condition_variable wake_;
    int helpers_ = 0;
#if defined(__linux__)
    std::vector<pthread_t> handles_;
    std::vector<int> cores_;
    int caller_core_ = -1;
    size_t placed_ = 0;
#endif
};

// Never destroyed: helpers may outlive static destructors. A forked child has none of the threads, so it starts anew.
std::atomic<Pool*> pool{nullptr};
std::mutex pool_mutex;
std::atomic<int> threads_by_default{0};

Pool& get_pool() {
    if (Pool* existing = pool.load(std::memory_order_acquire)) return *existing;
    std::lock_guard<std::mutex> lock(pool_mutex);
    if (Pool* existing = pool.load()) return *existing;
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, [] {
        pool.store(nullptr);
        new (&pool_mutex) std::mutex;
        in_region = false;
    });
    (void)registered;
#endif
    Pool* created = new Pool;
    pool.store(created, std::memory_order_release);
    return *created;
}

}  // namespace

void Team::reset(int size) {
    size_ = size;
    for (int worker = 0; worker < size; ++worker) {
        counters_[0][worker].taken.store(0, std::memory_order_relaxed);
        counters_[1][worker].taken.store(0, std::memory_order_relaxed);
        parity_[worker].taken.store(0, std::memory_order_relaxed);
    }
}

void Team::barrier() {
    if (size_ == 1) return;
    const uint32_t generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
        arrived_.store(0, std::memory_order_relaxed);
        generation_.store(generation + 1, std::memory_order_release);
        return;
    }
    for (int spin = 0; generation_.load(std::memory_order_acquire) == generation; ++spin)
        if (spin < kSpins) pause();
        else std::this_thread::yield();
}

void run_region(int threads, RegionFn fn, void* context) {
    if (threads > kMaxThreads) threads = kMaxThreads;
    if (threads <= 1 || in_region) {
        static Team alone;  // a team of one has no state
        fn(context, alone, 0);
        return;
    }
    in_region = true;
    get_pool().run(threads, fn, context);
    in_region = false;
}

void parallel_for(int64_t chunks, ChunkFn fn, void* context) {
    struct Job {
        int64_t chunks;
        ChunkFn fn;
        void* context;
    } job{chunks, fn, context};
    const int64_t threads = chunks < default_threads() ? chunks : default_threads();
    run_region(
        static_cast<int>(threads),
        [](void* context, Team& team, int worker) {
            const Job& job = *static_cast<Job*>(context);
            team.phase(worker, job.chunks, [&](int64_t chunk) { job.fn(job.context, chunk, worker); });
        },
        &job);
}

int available_cores() {
#if defined(__linux__)
    const size_t cores = allowed_cores().size();
    if (cores > 0) return static_cast<int>(cores);
#endif
    const unsigned cores_known = std::thread::hardware_concurrency();
    return cores_known > 0 ? static_cast<int>(cores_known) : 1;
}

void set_default_threads(int threads) { threads_by_default.store(threads); }

int default_threads() {
    const int threads = threads_by_default.load(std::memory_order_relaxed);
    if (threads > 0) return threads;
    const int cores = available_cores();
    threads_by_default.store(cores);
    return cores;
}

}  // namespace aph
