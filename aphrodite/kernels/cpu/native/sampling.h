// Sampling of one row at a time. `sampling_row.h` has the algorithm, compiled once for each instruction set.
#pragma once
#include <cstdint>

namespace aph {

constexpr int kSampleBlock = 64;   // tokens whose maximum is kept
constexpr int kMassBins = 4096;  // of the top-p histogram

// A row's parameters. `aphrodite/kernels/cpu/sampling.py` has the same layout; sizes are compared at load.
struct SamplerRow {
    uint64_t seed;
    const int32_t* bias_ids;
    const float* bias;
    const int32_t* ending_ids;  // masked while position < free_from
    int32_t bias_count;
    int32_t ending_count;
    int32_t free_from;
    int32_t counts_slot;  // row of the table of token counts, or -1
    float repetition;
    float frequency;
    float presence;
    float temperature;  // 0: greedy
    int32_t top_k;      // 0: all
    float top_p;        // 1: all
    float log_min_p;    // -inf: all
    int32_t mask_dropped;  // write -inf over the logits of the tokens that do not survive
};

// What a worker needs for one row; sizes in elements.
struct SamplerScratch {
    float* maxima;    // [ceil(vocab / kSampleBlock)]
    float* selected;  // [ceil(vocab / kSampleBlock)]
    uint64_t* keys;   // [vocab]
    float* weights;   // [vocab]
    uint16_t* bins;   // [vocab]
    double* mass;     // [kMassBins]
};

struct SamplerKernels {
    // The chosen token, or -1 if the logits hold NaN or +inf or nothing that may be chosen. Overwrites `logits` [vocab].
    // `counts` [vocab] (see sampling/stages/penalties.py) or null.
    int32_t (*sample)(float* logits, int32_t vocab, const SamplerRow& row, const int32_t* counts, int32_t position,
                      const SamplerScratch& scratch);
    // Log-probability and rank of `token`, and the k most likely tokens in order.
    void (*logprobs)(const float* logits, int32_t vocab, int32_t token, int32_t k, float* logprob, int32_t* rank,
                     int32_t* top_ids, float* top_logprobs, const SamplerScratch& scratch);
    // Uniforms of indices 0 .. count - 1 (sampling/random.py defines them).
    void (*uniforms)(uint64_t seed, uint32_t position, uint32_t use, int32_t count, float* out);
};

// Null where the instruction set was not compiled in.
const SamplerKernels* sampler_kernels_avx512();
const SamplerKernels* sampler_kernels_avx2();
const SamplerKernels* sampler_kernels_portable();

}  // namespace aph
