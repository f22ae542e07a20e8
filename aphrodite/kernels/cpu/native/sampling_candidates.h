// The tokens of a row that may still be chosen, and the passes over them that stages are made of.
//
// A row starts as all the vocabulary's logits. A stage that leaves few tokens gathers them with their ids, so that
// later stages and the draw cost next to nothing; one that leaves many masks the others with -inf. Entries are always
// in the order of their tokens, so that (logit descending, token ascending) is (logit descending, index ascending).
#pragma once
#include "sampling_vector.h"

namespace aph {
namespace {

constexpr int32_t kSortAtOnce = 384;  // so many keys are sorted faster by comparing
constexpr double kMassSlack = 1e-5;   // relative error that float32 sums stay well below

// Entries before a cut survive: those of a larger value, or of this value up to this index.
struct Cut {
    float value = -kInf;
    int32_t index = INT32_MAX;
};

struct Row {
    float* x;
    const int32_t* ids;  // of the entries; null: entry i is token i
    int32_t count;
    int32_t vocab;
    const SamplerScratch& scratch;
    float max = -kInf;
    bool measured = false;  // max and block maxima are those of x
    bool bad = false;       // a logit was NaN or +inf

    int32_t blocks() const { return (count + kSampleBlock - 1) / kSampleBlock; }
    int32_t end(int32_t block) const { return std::min(count, (block + 1) * kSampleBlock); }
    int32_t token(int32_t index) const { return ids == nullptr ? index : ids[index]; }
    // Where a token is, or -1.
    int32_t find(int32_t token) const {
        if (ids == nullptr) return token;
        const int32_t* place = std::lower_bound(ids, ids + count, token);
        return place < ids + count && *place == token ? static_cast<int32_t>(place - ids) : -1;
    }
};

// Calls f(vector, index of its first lane) for `values` of a block; missing lanes of the last one are -inf.
template <class F>
inline void each_vector(const Row& row, const float* values, int32_t block, F&& f) {
    const int32_t end = row.end(block);
    int32_t index = block * kSampleBlock;
    for (; index + kLanes <= end; index += kLanes) f(load(values + index), index);
    if (index < end) {
        float rest[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) rest[lane] = index + lane < end ? values[index + lane] : -kInf;
        f(load(rest), index);
    }
}

// Replaces every logit by f(logit, index of its vector's first lane). What f reads beside has a vector of padding.
template <class F>
void replace_all(Row& row, F&& f) {
    int32_t index = 0;
    for (; index + kLanes <= row.count; index += kLanes) store(row.x + index, f(load(row.x + index), index));
    if (index < row.count) {
        F32 x = splat(-kInf);
        const size_t bytes = (row.count - index) * sizeof(float);
        std::memcpy(&x, row.x + index, bytes);
        x = f(x, index);
        std::memcpy(row.x + index, &x, bytes);
    }
    row.measured = false;
}

// Replaces every logit by f(logit) and takes the maxima; logits that are NaN or +inf before it make the row bad.
template <class F>
void transform(Row& row, F&& f) {
    I32 bad = I32{};
    row.max = -kInf;
    for (int32_t block = 0; block < row.blocks(); ++block) {
        const int32_t end = row.end(block);
        F32 top = splat(-kInf);
        each_vector(row, row.x, block, [&](F32 x, int32_t index) {
            bad |= ~(x <= kLargest);
            x = f(x);
            if (index + kLanes <= end) store(row.x + index, x);
            else std::memcpy(row.x + index, &x, (end - index) * sizeof(float));
            top = larger(x, top);
        });
        row.scratch.maxima[block] = largest(top);
        row.max = std::max(row.max, row.scratch.maxima[block]);
    }
    row.bad |= bits_of(bad) != 0;
    row.measured = true;
}

// Takes the maxima if a stage changed the logits since; false if the row is bad or nothing is left of it.
bool measure(Row& row) {
    if (!row.measured) {
        I32 bad = I32{};
        row.max = -kInf;
        for (int32_t block = 0; block < row.blocks(); ++block) {
            F32 top = splat(-kInf);
            each_vector(row, row.x, block, [&](F32 x, int32_t) {
                bad |= ~(x <= kLargest);
                top = larger(x, top);
            });
            row.scratch.maxima[block] = largest(top);
            row.max = std::max(row.max, row.scratch.maxima[block]);
        }
        row.bad |= bits_of(bad) != 0;
        row.measured = true;
    }
    return !row.bad && std::fabs(row.max) <= kLargest;
}

// Sum of exp(logit - max).
double mass_of(const Row& row) {
    double sum = 0;
    for (int32_t block = 0; block < row.blocks(); ++block) {
        if (row.scratch.maxima[block] < row.max - kNegligible) continue;
        F32 part = F32{};
        each_vector(row, row.x, block, [&](F32 x, int32_t) { part += exp_negative(x - row.max); });
        sum += total(part);
    }
    return sum;
}

struct Moments {
    double mass;     // sum of exp(logit - max)
    double entropy;  // of the distribution, nats
};

Moments moments_of(const Row& row) {
    double mass = 0, weighted = 0;
    for (int32_t block = 0; block < row.blocks(); ++block) {
        if (row.scratch.maxima[block] < row.max - kNegligible) continue;
        F32 part = F32{}, product = F32{};
        each_vector(row, row.x, block, [&](F32 x, int32_t) {
            const F32 below = larger(x - row.max, splat(-87.0f)), weight = exp_negative(below);
            part += weight;
            product += weight * below;
        });
        mass += total(part);
        weighted += total(product);
    }
    return {mass, std::log(mass) - weighted / mass};
}

inline I32 survives(F32 value, int32_t first, const Cut& cut) {
    return (value > cut.value) | ((value == cut.value) & ((lane_numbers() + first) <= cut.index));
}

// Masks all that does not survive; `order` as in `keep`.
void mask_dropped(Row& row, const float* order, const Cut& cut) {
    if (order == row.x)
        replace_all(row, [&](F32 x, int32_t index) { return select(survives(x, index, cut), x, splat(-kInf)); });
    else
        replace_all(row, [&](F32 x, int32_t index) {
            return select(survives(load(order + index), index, cut), x, splat(-kInf));
        });
}

// Entries that survive, of which blocks below `floor` have none.
int32_t count_survivors(const Row& row, const float* order, const Cut& cut, float floor) {
    I32 kept = I32{};
    for (int32_t block = 0; block < row.blocks(); ++block) {
        if (row.scratch.maxima[block] < floor) continue;
        each_vector(row, order, block, [&](F32 value, int32_t first) { kept -= survives(value, first, cut); });
    }
    int32_t count = 0;
    for (int lane = 0; lane < kLanes; ++lane) count += kept[lane];
    return count;
}

// Drops what comes after the cut in (order descending, index ascending); `order` [count] may be the logits.
void keep(Row& row, const float* order, Cut cut) {
    cut.value = std::max(cut.value, -kLargest);
    const float floor = order == row.x ? cut.value : -kLargest;
    const int32_t survivors = count_survivors(row, order, cut, floor);
    if (row.ids == nullptr && survivors > row.count / 8) return mask_dropped(row, order, cut);
    int32_t kept = 0;
    for (int32_t block = 0; block < row.blocks(); ++block) {
        if (row.scratch.maxima[block] < floor) continue;
        each_vector(row, order, block, [&](F32 value, int32_t first) {
            const uint32_t bits = bits_of(survives(value, first, cut));  // the last vector's padding does not
            if (bits == 0) return;
            const int32_t inside = std::min(kLanes, row.count - first);
            F32 x = splat(-kInf);
            I32 ids = lane_numbers() + first;
            std::memcpy(&x, row.x + first, inside * sizeof(float));
            if (row.ids != nullptr) std::memcpy(&ids, row.ids + first, inside * sizeof(int32_t));
            compress(row.scratch.x + kept, x, bits);
            compress(row.scratch.ids + kept, ids, bits);
            kept += __builtin_popcount(bits);
        });
    }
    row.x = row.scratch.x;
    row.ids = row.scratch.ids;
    row.count = kept;
    row.measured = false;
}

void keep_at_least(Row& row, float threshold) {
    if (threshold > -kInf) keep(row, row.x, {threshold, INT32_MAX});
}

// Sorts `count` of scratch.keys, the earliest first.
void sort_keys(const SamplerScratch& scratch, int32_t count) {
    uint64_t* keys = scratch.keys;
    if (count <= kSortAtOnce) return std::sort(keys, keys + count, Earlier());
    // By the value's bits alone, 11 at a time, keeping the order of the indices that the keys come in.
    uint64_t* spare = scratch.spare;
    for (int shift = 32; shift < 64; shift += 11) {
        int32_t starts[2049] = {};
        for (int32_t i = 0; i < count; ++i) ++starts[1 + (~keys[i] >> shift & 2047)];
        for (int digit = 0; digit < 2048; ++digit) starts[digit + 1] += starts[digit];
        for (int32_t i = 0; i < count; ++i) spare[starts[~keys[i] >> shift & 2047]++] = keys[i];
        std::swap(keys, spare);
    }
    std::copy(keys, keys + count, scratch.keys);
}

// Keys of the logits at or above `threshold`, masked ones never, into scratch.keys in the order of their indices.
int32_t collect_keys(const Row& row, float threshold) {
    uint64_t* keys = row.scratch.keys;
    int32_t count = 0;
    threshold = std::max(threshold, -kLargest);
    for (int32_t block = 0; block < row.blocks(); ++block) {
        if (row.scratch.maxima[block] < threshold) continue;
        each_vector(row, row.x, block, [&](F32 x, int32_t first) {
            for (uint32_t bits = bits_of(x >= threshold); bits != 0; bits &= bits - 1) {
                const int32_t lane = __builtin_ctz(bits);
                keys[count++] = key_of(x[lane], first + lane);
            }
        });
    }
    return count;
}

}  // namespace
}  // namespace aph
