// Sampling of one row: aphrodite/sampling/stages in the default order, then the Gumbel-max draw.
//
// Included by one source file for each instruction set, everything in an unnamed namespace, so that no code compiled
// for one processor is linked into the path of another.
//
// Tokens are ordered by (logit descending, id ascending). Every truncation keeps a prefix of that order, so the
// survivors of all of them are those at or before one cut, and no sort of the vocabulary is needed:
//   pass 1  penalties, temperature, maximum of each block of 64 tokens              reads (and writes) vocab floats
//   top_k   the k-th largest block maximum bounds the candidates from below         reads the blocks above it
//   top_p   sum of exp over the row, histogram of the candidates' mass, sort of one bin
//   draw    Philox and two logarithms for the blocks that can still hold the winner
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "sampling.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace aph {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
static_assert(kSampleBlock % (4 * kLanes) == 0, "a block is a whole number of Philox groups");

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef uint64_t U64 __attribute__((vector_size(kLanes * 4)));

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kMaxGumbel = 16.64f;     // of the largest uniform, rounded up
constexpr float kNegligible = 30.0f;     // exp(-30) * 2^18 tokens is below float32's resolution of the mass
constexpr uint32_t kInPrompt = 1u << 30;  // sampling/stages/penalties.py

inline F32 load(const float* from) {
    F32 value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline void store(float* to, F32 value) { std::memcpy(to, &value, sizeof value); }
inline F32 splat(float value) { return F32{} + value; }
inline F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
inline F32 larger(F32 a, F32 b) { return a > b ? a : b; }
inline float largest(F32 value) {
    float result = value[0];
    for (int lane = 1; lane < kLanes; ++lane) result = value[lane] > result ? value[lane] : result;
    return result;
}
inline float total(F32 value) {
    float result = 0;
    for (int lane = 0; lane < kLanes; ++lane) result += value[lane];
    return result;
}
inline bool any(I32 mask) {
    int32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= mask[lane];
    return bits != 0;
}
inline I32 lane_numbers() {
    I32 numbers;
    for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
    return numbers;
}

// exp(x) for x <= 0, relative error 2e-7; 2^-126 or so for everything below -87.
inline F32 exp_negative(F32 x) {
    x = larger(x, splat(-87.0f));
    const F32 shifted = x * 1.44269504f + 12582912.0f;  // the sum's low mantissa bits are the rounded integer
    const F32 n = shifted - 12582912.0f;
    const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    F32 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const I32 bits = (I32)p + __builtin_convertvector(n, I32) * (1 << 23);
    return (F32)bits;
}

// ln(x) for positive normal x, relative error 2e-7 (also near 1, where it matters). Minimax polynomial of Cephes.
inline F32 log_positive(F32 x) {
    const U32 bits = (U32)x;
    I32 exponent = (I32)(bits >> 23) - 126;
    F32 m = (F32)((bits & 0x007fffffu) | 0x3f000000u);  // [0.5, 1)
    const I32 low = m < 0.707106781f;
    exponent += low;  // true is -1
    m = select(low, m + m, m) - 1.0f;
    F32 p = splat(7.0376836292e-2f);
    p = p * m - 1.1514610310e-1f;
    p = p * m + 1.1676998740e-1f;
    p = p * m - 1.2420140846e-1f;
    p = p * m + 1.4249322787e-1f;
    p = p * m - 1.6668057665e-1f;
    p = p * m + 2.0000714765e-1f;
    p = p * m - 2.4999993993e-1f;
    p = p * m + 3.3333331174e-1f;
    const F32 square = m * m, e = __builtin_convertvector(exponent, F32);
    return (m + (p * m * square + e * -2.12194440e-4f - square * 0.5f)) + e * 0.693359375f;
}

// High and low halves of the 32 x 32 -> 64 bit products of all lanes.
inline void multiply(uint32_t factor, U32 x, U32& high, U32& low) {
#if defined(__AVX512F__)
    // The masked form, because GCC 12 warns of its own header's plain one.
    const __m512i a = (__m512i)x, m = _mm512_set1_epi32(static_cast<int>(factor));
    const U64 even = (U64)_mm512_maskz_mul_epu32(0xff, a, m);
    const U64 odd = (U64)_mm512_maskz_mul_epu32(0xff, (__m512i)((U64)x >> 32), m);
#elif defined(__AVX2__)
    const __m256i a = (__m256i)x, m = _mm256_set1_epi32(static_cast<int>(factor));
    const U64 even = (U64)_mm256_mul_epu32(a, m), odd = (U64)_mm256_mul_epu32((__m256i)((U64)x >> 32), m);
#else
    const U64 even = ((U64)x & 0xffffffffu) * factor, odd = ((U64)x >> 32) * factor;
#endif
    high = (U32)((even >> 32) | (odd & ~uint64_t{0xffffffffu}));
    low = (U32)((even & 0xffffffffu) | (odd << 32));
}

// (a0 b0 a1 b1 ...) of the lower and the upper half of the lanes.
inline void interleave(U32 a, U32 b, U32& lower, U32& upper) {
#if defined(__clang__)
    for (int lane = 0; lane < kLanes; ++lane) {
        lower[lane] = lane % 2 ? b[lane / 2] : a[lane / 2];
        upper[lane] = lane % 2 ? b[(lane + kLanes) / 2] : a[(lane + kLanes) / 2];
    }
#else
    U32 pick;
    for (int lane = 0; lane < kLanes; ++lane) pick[lane] = lane / 2 + lane % 2 * kLanes;
    lower = __builtin_shuffle(a, b, pick);
    upper = __builtin_shuffle(a, b, pick + kLanes / 2);
#endif
}

struct Stream {
    uint32_t key0, key1, position, use;
};

// Philox4x32-10: uniforms of the 4 * kLanes indices from `first` (a multiple of 4 * kLanes) on, in order.
inline void uniforms(const Stream& stream, uint32_t first, F32 out[4]) {
    U32 c0 = U32{} + stream.position, c1 = U32{} + stream.use, c2 = (U32)lane_numbers() + first / 4, c3 = U32{};
    uint32_t k0 = stream.key0, k1 = stream.key1;
    for (int round = 0; round < 10; ++round) {
        U32 high0, low0, high1, low1;
        multiply(0xD2511F53u, c0, high0, low0);
        multiply(0xCD9E8D57u, c2, high1, low1);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    U32 even_lower, even_upper, odd_lower, odd_upper, words[4];
    interleave(c0, c2, even_lower, even_upper);
    interleave(c1, c3, odd_lower, odd_upper);
    interleave(even_lower, odd_lower, words[0], words[1]);
    interleave(even_upper, odd_upper, words[2], words[3]);
    for (int i = 0; i < 4; ++i)
        out[i] = (__builtin_convertvector((I32)(words[i] >> 9), F32) + 0.5f) * 0x1p-23f;
}

// A place in the order of tokens: larger is earlier. -0 and +0 are one logit.
inline uint64_t key_of(float logit, int32_t token) {
    uint32_t bits;
    const float plain = logit + 0.0f;
    std::memcpy(&bits, &plain, 4);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(~token);
}
inline float logit_of(uint64_t key) {
    uint32_t bits = static_cast<uint32_t>(key >> 32);
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    float logit;
    std::memcpy(&logit, &bits, 4);
    return logit;
}
inline int32_t token_of(uint64_t key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }

struct Earlier {
    bool operator()(uint64_t a, uint64_t b) const { return a > b; }
};

// One row and its block maxima.
struct Row {
    float* logits;
    int32_t vocab;
    const SamplerScratch& scratch;
    float max = -kInf;

    int32_t blocks() const { return (vocab + kSampleBlock - 1) / kSampleBlock; }
    int32_t end(int32_t block) const { return std::min(vocab, (block + 1) * kSampleBlock); }
};

// Calls f(vector, token of its first lane) for a block; missing lanes of the last one are -inf.
template <class F>
inline void each_vector(const Row& row, int32_t block, F&& f) {
    const int32_t first = block * kSampleBlock, end = row.end(block);
    int32_t token = first;
    for (; token + kLanes <= end; token += kLanes) f(load(row.logits + token), token);
    if (token < end) {
        float rest[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) rest[lane] = token + lane < end ? row.logits[token + lane] : -kInf;
        f(load(rest), token);
    }
}

inline F32 penalize(F32 x, U32 history, const SamplerRow& row) {
    const F32 count = __builtin_convertvector((I32)(history & (kInPrompt - 1)), F32);
    const F32 scaled = select(x > 0.0f, x / row.repetition, x * row.repetition);
    x = select(history != 0u, scaled, x);
    return (x - count * row.frequency) - select(count > 0.0f, splat(row.presence), F32{});
}

// Penalties and temperature in place, block maxima, and whether any logit was NaN or +inf.
template <bool kPenalties, bool kScale>
bool transform(Row& row, const SamplerRow& params, const int32_t* counts) {
    I32 bad = I32{};
    const float temperature = params.temperature;
    for (int32_t block = 0; block < row.blocks(); ++block) {
        const int32_t end = row.end(block);
        F32 top = splat(-kInf);
        each_vector(row, block, [&](F32 x, int32_t token) {
            bad |= ~(x <= kLargest);
            const bool whole = token + kLanes <= end;
            if (kPenalties) {
                U32 history = U32{};
                std::memcpy(&history, counts + token, whole ? sizeof history : (end - token) * sizeof(int32_t));
                x = penalize(x, history, params);
            }
            if (kScale) x = x / temperature;
            if (kPenalties || kScale) {
                if (whole) store(row.logits + token, x);
                else std::memcpy(row.logits + token, &x, (end - token) * sizeof(float));
            }
            top = larger(x, top);
        });
        const float block_max = largest(top);
        row.scratch.maxima[block] = block_max;
        row.max = block_max > row.max ? block_max : row.max;
    }
    return any(bad);
}

bool transform(Row& row, const SamplerRow& params, const int32_t* counts) {
    const bool scale = params.temperature != 0.0f && params.temperature != 1.0f;
    if (counts != nullptr)
        return scale ? transform<true, true>(row, params, counts) : transform<true, false>(row, params, counts);
    return scale ? transform<false, true>(row, params, counts) : transform<false, false>(row, params, counts);
}

// Keys of the tokens at or above `threshold`, masked ones never, into scratch.keys.
int32_t collect(const Row& row, float threshold) {
    uint64_t* keys = row.scratch.keys;
    int32_t count = 0;
    threshold = std::max(threshold, -kLargest);
    for (int32_t block = 0; block < row.blocks(); ++block) {
        if (row.scratch.maxima[block] < threshold) continue;
        for (int32_t token = block * kSampleBlock; token < row.end(block); ++token) {
            keys[count] = key_of(row.logits[token], token);
            count += row.logits[token] >= threshold;
        }
    }
    return count;
}

// Leaves the k first tokens in scratch.keys, in any order but the last of them at k - 1; returns how many there are.
int32_t collect_top_k(const Row& row, int32_t k) {
    float threshold = -kInf;
    const int32_t blocks = row.blocks();
    if (k <= blocks) {
        // k blocks have a maximum at or above the k-th largest one, so k tokens do.
        std::copy(row.scratch.maxima, row.scratch.maxima + blocks, row.scratch.selected);
        struct Larger {
            bool operator()(float a, float b) const { return a > b; }
        };
        std::nth_element(row.scratch.selected, row.scratch.selected + k - 1, row.scratch.selected + blocks, Larger());
        threshold = row.scratch.selected[k - 1];
    }
    const int32_t count = collect(row, threshold);
    uint64_t* keys = row.scratch.keys;
    if (count < k) return count;
    std::nth_element(keys, keys + k - 1, keys + count, Earlier());
    return k;
}

// exp(logit - max) of `count` keys into scratch.weights, their histogram bins into scratch.bins; returns the sum.
double weigh(const Row& row, int32_t count) {
    float* weights = row.scratch.weights;
    uint16_t* bins = row.scratch.bins;
    double sum = 0;
    F32 part = F32{};
    for (int32_t first = 0; first < count; first += kLanes) {
        F32 below = splat(-kInf);
        const int32_t size = std::min(kLanes, count - first);
        for (int32_t i = 0; i < size; ++i) below[i] = logit_of(row.scratch.keys[first + i]) - row.max;
        const F32 weight = exp_negative(below);
        // A bin is 1/128 of a logit; the last one holds everything from 32 on.
        const F32 place = larger(below, splat(-1024.0f)) * -128.0f;
        for (int32_t i = 0; i < size; ++i) {
            weights[first + i] = weight[i];
            bins[first + i] = static_cast<uint16_t>(std::min(static_cast<int32_t>(place[i]), kMassBins - 1));
        }
        // Missing lanes weigh nothing worth counting. Short float sums: fast and close to exact.
        part += weight;
        if (first % (16 * kLanes) != 0) continue;
        sum += total(part);
        part = F32{};
    }
    return sum + total(part);
}

// The last key of the shortest prefix of `count` weighed keys whose mass reaches `target`; 0 if they all are needed.
uint64_t mass_cut(const Row& row, int32_t count, double target) {
    double* mass = row.scratch.mass;
    std::fill(mass, mass + kMassBins, 0.0);
    for (int32_t i = 0; i < count; ++i) mass[row.scratch.bins[i]] += row.scratch.weights[i];
    double before = 0;
    int32_t bin = 0;
    while (bin < kMassBins && before + mass[bin] < target) before += mass[bin++];
    if (bin == kMassBins) return 0;
    uint64_t* keys = row.scratch.keys;
    int32_t size = 0;
    for (int32_t i = 0; i < count; ++i)
        if (row.scratch.bins[i] == bin) keys[size++] = keys[i];
    std::sort(keys, keys + size, Earlier());
    for (int32_t i = 0; i < size; ++i) {
        before += exp_negative(splat(logit_of(keys[i]) - row.max))[0];
        if (before >= target) return keys[i];
    }
    return size > 0 ? keys[size - 1] : 0;
}

// Sum of exp(logit - max) over the row.
double total_mass(const Row& row) {
    double sum = 0;
    for (int32_t block = 0; block < row.blocks(); ++block) {
        if (row.scratch.maxima[block] < row.max - kNegligible) continue;
        F32 part = F32{};
        each_vector(row, block, [&](F32 x, int32_t) { part += exp_negative(x - row.max); });
        sum += total(part);
    }
    return sum;
}

// top_p where top_k has not already gathered the candidates. `floor`: logits below it are dropped in any case.
uint64_t top_p_cut(const Row& row, float top_p, float floor) {
    const double target = top_p * total_mass(row);
    for (float reach : {8.0f, kNegligible, kInf}) {
        const float threshold = std::max(row.max - reach, floor);
        const int32_t count = collect(row, threshold);
        if (weigh(row, count) >= target) return mass_cut(row, count, target);
        if (threshold == floor) return 0;
    }
    return 0;
}

// The last surviving token's key.
uint64_t cut_of(const Row& row, const SamplerRow& params) {
    const float floor = row.max + params.log_min_p;
    // ~0 in the lower half: every token of this logit.
    uint64_t cut = floor > -kInf ? key_of(floor, -1) : 0;
    if (params.top_k > 0 && params.top_k < row.vocab) {
        const int32_t count = collect_top_k(row, params.top_k);
        if (count == params.top_k) cut = std::max(cut, row.scratch.keys[count - 1]);
        if (params.top_p < 1.0f) cut = std::max(cut, mass_cut(row, count, params.top_p * weigh(row, count)));
    } else if (params.top_p < 1.0f) {
        cut = std::max(cut, top_p_cut(row, params.top_p, floor));
    }
    return cut;
}

// Which lanes survive the cut at (logit, token).
inline I32 survives(F32 x, int32_t token, float cut_logit, uint32_t cut_token) {
    const U32 tokens = (U32)(lane_numbers() + token);
    return (x > cut_logit) | ((x == cut_logit) & (I32)(tokens <= cut_token));
}

struct Best {
    float score = -kInf;
    int32_t token = -1;
};

// Scores of a block's survivors under the noise; updates `best`. Ties go to the lower token.
void draw_block(const Row& row, int32_t block, const Stream& stream, uint64_t cut, Best& best) {
    const float cut_logit = cut != 0 ? logit_of(cut) : -kInf;
    const uint32_t cut_token = cut != 0 ? static_cast<uint32_t>(token_of(cut)) : 0;
    F32 scores[kSampleBlock / kLanes], noise[kSampleBlock / kLanes];
    for (auto& score : scores) score = splat(-kInf);
    for (int32_t group = 0; group < kSampleBlock / (4 * kLanes); ++group)
        uniforms(stream, static_cast<uint32_t>(block * kSampleBlock + group * 4 * kLanes), noise + 4 * group);
    F32 top = splat(-kInf);
    each_vector(row, block, [&](F32 x, int32_t token) {
        const int32_t place = token % kSampleBlock / kLanes;
        const F32 gumbel = -log_positive(-log_positive(noise[place]));
        scores[place] = select(survives(x, token, cut_logit, cut_token), (x - row.max) + gumbel, splat(-kInf));
        top = larger(scores[place], top);
    });
    const float score = largest(top);
    if (score < best.score || score == -kInf) return;
    for (int32_t i = 0; i < kSampleBlock; ++i) {
        if (scores[i / kLanes][i % kLanes] != score) continue;
        const int32_t token = block * kSampleBlock + i;
        if (score > best.score || token < best.token) best = {score, token};
        return;
    }
}

int32_t draw(const Row& row, const Stream& stream, uint64_t cut) {
    const float floor = cut != 0 ? logit_of(cut) : -kLargest;
    const float* maxima = row.scratch.maxima;
    const int32_t blocks = row.blocks();
    Best best;
    // The most likely block first: it tells what the others have to beat.
    const int32_t leader = static_cast<int32_t>(std::max_element(maxima, maxima + blocks) - maxima);
    draw_block(row, leader, stream, cut, best);
    for (int32_t block = 0; block < blocks; ++block) {
        if (block == leader || maxima[block] < floor) continue;
        if ((maxima[block] - row.max) + kMaxGumbel < best.score) continue;
        draw_block(row, block, stream, cut, best);
    }
    return best.token;
}

int32_t first_maximum(const Row& row) {
    for (int32_t block = 0; block < row.blocks(); ++block) {
        if (row.scratch.maxima[block] != row.max) continue;
        for (int32_t token = block * kSampleBlock; token < row.end(block); ++token)
            if (row.logits[token] == row.max) return token;
    }
    return -1;
}

void mask_dropped(const Row& row, uint64_t cut) {
    if (cut == 0) return;
    for (int32_t token = 0; token < row.vocab; ++token)
        if (key_of(row.logits[token], token) < cut) row.logits[token] = -kInf;
}

// Bias and the mask of ending tokens; returns whether a masked logit was NaN or +inf.
bool constrain(float* logits, const SamplerRow& params, int32_t position) {
    bool bad = false;
    for (int32_t i = 0; i < params.bias_count; ++i) logits[params.bias_ids[i]] += params.bias[i];
    if (position >= params.free_from) return bad;
    for (int32_t i = 0; i < params.ending_count; ++i) {
        float& logit = logits[params.ending_ids[i]];
        bad |= !(logit <= kLargest);
        logit = -kInf;
    }
    return bad;
}

int32_t sample(float* logits, int32_t vocab, const SamplerRow& params, const int32_t* counts, int32_t position,
               const SamplerScratch& scratch) {
    bool bad = constrain(logits, params, position);
    Row row{logits, vocab, scratch};
    bad |= transform(row, params, counts);
    if (bad || !(std::fabs(row.max) <= kLargest)) return -1;
    if (params.temperature == 0.0f) return first_maximum(row);
    const uint64_t cut = cut_of(row, params);
    const Stream stream{static_cast<uint32_t>(params.seed), static_cast<uint32_t>(params.seed >> 32),
                        static_cast<uint32_t>(position), 0};
    const int32_t token = draw(row, stream, cut);
    if (params.mask_dropped) mask_dropped(row, cut);
    return token;
}

void logprobs(const float* logits, int32_t vocab, int32_t token, int32_t k, float* logprob, int32_t* rank,
              int32_t* top_ids, float* top_logprobs, const SamplerScratch& scratch) {
    Row row{const_cast<float*>(logits), vocab, scratch};
    SamplerRow plain{};
    transform<false, false>(row, plain, nullptr);  // block maxima only: nothing is written
    const float normalizer = row.max + static_cast<float>(std::log(total_mass(row)));
    const float chosen = logits[token];
    *logprob = chosen - normalizer;
    I32 before = I32{};
    for (int32_t block = 0; block < row.blocks(); ++block) {
        if (scratch.maxima[block] < chosen) continue;
        each_vector(row, block, [&](F32 x, int32_t first) {
            before -= (x > chosen) | ((x == chosen) & (lane_numbers() + first < token));
        });
    }
    *rank = 1;
    for (int lane = 0; lane < kLanes; ++lane) *rank += before[lane];
    if (k == 0) return;
    const int32_t count = collect_top_k(row, k);
    std::sort(scratch.keys, scratch.keys + count, Earlier());
    for (int32_t i = 0; i < k; ++i) {
        top_ids[i] = i < count ? token_of(scratch.keys[i]) : 0;
        top_logprobs[i] = i < count ? logit_of(scratch.keys[i]) - normalizer : -kInf;
    }
}

void uniforms_out(uint64_t seed, uint32_t position, uint32_t use, int32_t count, float* out) {
    const Stream stream{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), position, use};
    for (int32_t first = 0; first < count; first += 4 * kLanes) {
        F32 values[4];
        uniforms(stream, static_cast<uint32_t>(first), values);
        std::memcpy(out + first, values, std::min(4 * kLanes, count - first) * sizeof(float));
    }
}

const SamplerKernels kSamplerKernels = {sample, logprobs, uniforms_out};

}  // namespace
}  // namespace aph
