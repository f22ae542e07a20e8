// Sampling for a batch of rows. Parameters of all rows live in a table that Python fills when a request starts.
#include "sampling.h"

#include <cstring>
#include <vector>

#include "api.h"
#include "thread_pool.h"

namespace aph {
namespace {

// A worker's memory, kept between calls.
class Workspace {
public:
    SamplerScratch reserve(int32_t vocab) {
        const size_t size = static_cast<size_t>(vocab), blocks = (size + kSampleBlock - 1) / kSampleBlock;
        if (keys_.size() < size) {
            keys_.resize(size);
            weights_.resize(size);
            bins_.resize(size);
            maxima_.resize(blocks);
            selected_.resize(blocks);
            mass_.resize(kMassBins);
        }
        return {maxima_.data(), selected_.data(), keys_.data(), weights_.data(), bins_.data(), mass_.data()};
    }

private:
    std::vector<uint64_t> keys_;
    std::vector<float> weights_, maxima_, selected_;
    std::vector<uint16_t> bins_;
    std::vector<double> mass_;
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

using aph::SamplerKernels;
using aph::SamplerRow;

// The kernels of an instruction set as `aph_select_isa` names it; null if there are none.
APH_API const void* aph_sampler_kernels(const char* isa) {
    if (std::strcmp(isa, "avx512") == 0) return aph::sampler_kernels_avx512();
    if (std::strcmp(isa, "avx2") == 0) return aph::sampler_kernels_avx2();
    return aph::sampler_kernels_portable();
}

APH_API int32_t aph_sampler_row_bytes() { return sizeof(SamplerRow); }

// `count` rows of `logits`, `stride` floats apart; `entries` names the row of logits, `rows` the row of `table`, of each.
// Writes token_ids[entry] (0 where it failed) and ok[entry].
APH_API void aph_sample(const void* kernels, float* logits, int64_t stride, int32_t vocab, int64_t count,
                        const int32_t* entries, const int32_t* rows, const int32_t* positions, const SamplerRow* table,
                        const int32_t* counts, int32_t* token_ids, uint8_t* ok) {
    auto one = [&](int64_t i) {
        const SamplerRow& row = table[rows[i]];
        const int32_t entry = entries[i];
        const int32_t* history = row.counts_slot < 0 ? nullptr : counts + static_cast<int64_t>(row.counts_slot) * vocab;
        const int32_t token = static_cast<const SamplerKernels*>(kernels)->sample(
            logits + entry * stride, vocab, row, history, positions[i], aph::workspace.reserve(vocab));
        token_ids[entry] = token < 0 ? 0 : token;
        ok[entry] = token >= 0;
    };
    aph::each_row(count, one);
}

// For `count` rows of `logits`: log-probability and rank of token_ids[i], and the k most likely tokens.
APH_API void aph_logprobs(const void* kernels, const float* logits, int64_t stride, int32_t vocab, int64_t count,
                          const int64_t* token_ids, int32_t k, float* logprobs, int32_t* ranks, int32_t* top_ids,
                          float* top_logprobs) {
    auto one = [&](int64_t i) {
        static_cast<const SamplerKernels*>(kernels)->logprobs(
            logits + i * stride, vocab, static_cast<int32_t>(token_ids[i]), k, logprobs + i, ranks + i, top_ids + i * k,
            top_logprobs + i * k, aph::workspace.reserve(vocab));
    };
    aph::each_row(count, one);
}

APH_API void aph_uniforms(const void* kernels, uint64_t seed, uint32_t position, uint32_t use, int32_t count,
                          float* out) {
    static_cast<const SamplerKernels*>(kernels)->uniforms(seed, position, use, count, out);
}
