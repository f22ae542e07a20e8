// Sampling of one row at a time: a row's plan is a program of stages in any order, which `sampling_row.h` runs. It is
// compiled once for each instruction set.
#pragma once
#include <cstdint>

namespace aph {

constexpr int kSampleBlock = 64;  // entries whose maximum is kept
constexpr int kOpValues = 8;
constexpr int32_t kBadLogits = -1;    // the model's logits hold NaN or +inf
constexpr int32_t kNothingLeft = -2;  // no token may be chosen

// `NativeOp` of aphrodite/kernels/cpu/sampling.py, which says what each reads.
enum class SamplerOpCode : int32_t {
    Mask = 1,
    Allow = 2,
    Bias = 3,
    Penalties = 4,
    Temperature = 5,
    TopK = 6,
    TopP = 7,
    MinP = 8,
    BadWords = 9,
    NoRepeatNgram = 10,
    Dry = 11,
    DynamicTemperature = 12,
    TopNSigma = 13,
    TopA = 14,
    TailFree = 15,
    EtaCutoff = 16,
    EpsilonCutoff = 17,
    TypicalP = 18,
    Quadratic = 19,
    Xtc = 20,
    Skew = 21,
    RangedPenalties = 22,
    Mirostat = 23,
    AdaptiveP = 24,
    TokenMask = 25,
    Force = 26,
};

// One stage of a row. aphrodite/kernels/cpu/sampling.py has the same layouts; sizes are compared at load.
struct SamplerOp {
    SamplerOpCode code;
    int32_t count;  // of ids and amounts
    const int32_t* ids;
    const float* amounts;
    void* data;  // a structure of the operation's own
    float values[kOpValues];
};

struct SamplerRow {
    uint64_t seed;
    const SamplerOp* ops;
    const int32_t* barred;  // tokens masked at this position alone
    int32_t op_count;
    int32_t barred_count;
    int32_t greedy;
    int32_t num_prompt;
    int32_t logprobs;   // most likely tokens to report beside the chosen one; -1: report nothing
    int32_t processed;  // report the distribution drawn from, not the model's
};

// What one call samples and where it writes; `entry` counts rows of logits.
struct SamplerBatch {
    float* logits;  // [entries, stride]
    int64_t stride;
    int32_t vocab;
    int32_t count;             // of rows to sample
    const int32_t* entries;    // [count]
    const int32_t* rows;       // [count], rows of the table and of the history
    const int32_t* positions;  // [count], tokens in the row's history
    const SamplerRow* table;
    const int32_t* history;  // [rows, history_stride]
    int64_t history_stride;
    int32_t* token_ids;  // [entries]
    uint8_t* ok;         // [entries]
    uint8_t* exhausted;  // [entries]: not ok, because no token may be chosen
    // Log-probabilities, [entries] and [entries, top]; may be null where no row wants them.
    int32_t top;
    float* logprobs;
    int32_t* ranks;
    int32_t* top_ids;
    float* top_logprobs;
};

// A worker's memory; arrays have room for the vocabulary or the history, whichever is longer, and a vector more.
struct SamplerScratch {
    float* x;         // logits of the candidates
    int32_t* ids;     // tokens of the candidates
    float* raw;       // a copy of the row, where its first state is needed at the end
    float* measure;   // by which a stage orders tokens
    float* y;         // a search's values, weights and indices
    float* w;
    int32_t* index;
    uint64_t* keys;   // a sort's input and output
    uint64_t* spare;  // a sort's
    int32_t* counts;  // of tokens in the history; zero between rows
    float* maxima;    // [blocks]
    float* selected;  // [blocks]
};

// Where one token's log-probabilities go; `top` entries each.
struct LogprobOut {
    int32_t top;
    float* logprob;
    int32_t* rank;
    int32_t* top_ids;
    float* top_logprobs;
};

struct SamplerKernels {
    // The chosen token of logits [vocab], which it overwrites, or kBadLogits or kNothingLeft.
    int32_t (*sample)(float* logits, int32_t vocab, const SamplerRow& row, const int32_t* history, int32_t position,
                      const LogprobOut& out, const SamplerScratch& scratch);
    // Log-probability and rank of `token`, and the out.top most likely tokens in order.
    void (*logprobs)(float* logits, int32_t vocab, int32_t token, const LogprobOut& out, const SamplerScratch& scratch);
    // Uniforms of indices 0 .. count - 1 (sampling/random.py defines them).
    void (*uniforms)(uint64_t seed, uint32_t position, uint32_t use, int32_t count, float* out);
};

// Null where the instruction set was not compiled in.
const SamplerKernels* sampler_kernels_avx512();
const SamplerKernels* sampler_kernels_avx2();
const SamplerKernels* sampler_kernels_portable();

}  // namespace aph
