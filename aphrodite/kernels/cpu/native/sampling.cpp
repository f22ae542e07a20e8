// Sampling for a batch of rows. Parameters of all rows live in a table that Python fills when a request starts.
#include "sampling.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "api.h"
#include "thread_pool.h"

namespace aph {
namespace {

constexpr size_t kPadding = 64;  // entries past the vocabulary that a whole vector may write

// A worker's memory, kept between calls.
class Workspace {
public:
    const SamplerScratch& reserve(int32_t entries) {
        const size_t size = static_cast<size_t>(entries) + kPadding;
        if (keys_.size() < 2 * size) {
            floats_.resize(5 * size);
            ints_.resize(3 * size);
            keys_.resize(2 * size);
            maxima_.resize(2 * (size / kSampleBlock + 1));
            float* floats = floats_.data();
            int32_t* ints = ints_.data();
            scratch_ = {floats,
                        ints,
                        floats + size,
                        floats + 2 * size,
                        floats + 3 * size,
                        floats + 4 * size,
                        ints + size,
                        keys_.data(),
                        keys_.data() + size,
                        ints + 2 * size,
                        maxima_.data(),
                        maxima_.data() + maxima_.size() / 2};
        }
        return scratch_;
    }

private:
    std::vector<float> floats_, maxima_;
    std::vector<int32_t> ints_;
    std::vector<uint64_t> keys_;
    SamplerScratch scratch_{};
};

thread_local Workspace workspace;

constexpr int64_t kFewRows = 3;  // so many take less time than waking a helper that fell asleep

template <class F>
void each_row(int64_t count, F& f) {
    const auto run = [](void* context, int64_t entry, int) { (*static_cast<F*>(context))(entry); };
    if (count > kFewRows) {
        parallel_for(count, run, &f);
        return;
    }
    for (int64_t entry = 0; entry < count; ++entry) f(entry);
}

}  // namespace
}  // namespace aph

using aph::LogprobOut;
using aph::SamplerBatch;
using aph::SamplerKernels;

// The kernels of an instruction set as `aph_select_isa` names it; null if there are none.
APH_API const void* aph_sampler_kernels(const char* isa) {
    if (std::strcmp(isa, "avx512") == 0) return aph::sampler_kernels_avx512();
    if (std::strcmp(isa, "avx2") == 0) return aph::sampler_kernels_avx2();
    return aph::sampler_kernels_portable();
}

// Bytes of a row's parameters, of one operation and of a batch.
APH_API void aph_sampler_sizes(int32_t* sizes) {
    sizes[0] = sizeof(aph::SamplerRow);
    sizes[1] = sizeof(aph::SamplerOp);
    sizes[2] = sizeof(SamplerBatch);
}

// Writes token_ids[entry] (0 where it failed) and ok[entry] of every row, and its log-probabilities if it wants them.
APH_API void aph_sample(const void* kernels, const SamplerBatch* batch) {
    auto one = [&](int64_t i) {
        const int64_t entry = batch->entries[i], row = batch->rows[i];
        const LogprobOut out{batch->top, batch->logprobs + entry, batch->ranks + entry,
                             batch->top_ids + entry * batch->top, batch->top_logprobs + entry * batch->top};
        const int32_t token = static_cast<const SamplerKernels*>(kernels)->sample(
            batch->logits + entry * batch->stride, batch->vocab, batch->table[row],
            batch->history + row * batch->history_stride, batch->positions[i], out,
            aph::workspace.reserve(std::max(batch->vocab, batch->positions[i])));
        batch->token_ids[entry] = token < 0 ? 0 : token;
        batch->ok[entry] = token >= 0;
        batch->exhausted[entry] = token == aph::kNothingLeft;
    };
    aph::each_row(batch->count, one);
}

// For `count` rows of `logits`: log-probability and rank of token_ids[i], and the k most likely tokens.
APH_API void aph_logprobs(const void* kernels, float* logits, int64_t stride, int32_t vocab, int64_t count,
                          const int64_t* token_ids, int32_t k, float* logprobs, int32_t* ranks, int32_t* top_ids,
                          float* top_logprobs) {
    auto one = [&](int64_t i) {
        static_cast<const SamplerKernels*>(kernels)->logprobs(
            logits + i * stride, vocab, static_cast<int32_t>(token_ids[i]),
            {k, logprobs + i, ranks + i, top_ids + i * k, top_logprobs + i * k}, aph::workspace.reserve(vocab));
    };
    aph::each_row(count, one);
}

APH_API void aph_uniforms(const void* kernels, uint64_t seed, uint32_t position, uint32_t use, int32_t count,
                          float* out) {
    static_cast<const SamplerKernels*>(kernels)->uniforms(seed, position, use, count, out);
}
