// Threshold searches: where the shortest prefix of an order ends that holds so many tokens or so much mass.
//
// Eight thresholds a pass narrow the place down to few entries, and only those are sorted.
#pragma once
#include "sampling_candidates.h"

namespace aph {
namespace {

// Entries of a search: values to order by, weights, indices into the row. In scratch.y, w and index.
struct Search {
    float* y;
    float* w;
    int32_t* index;
    int32_t count = 0;
};

constexpr int kThresholds = 8;

// Weights of the entries at or above each threshold, to within kMassSlack.
void mass_above(const Search& search, const float thresholds[kThresholds], double mass[kThresholds]) {
    F32 sums[kThresholds] = {};
    for (int32_t i = 0; i < search.count; i += kLanes) {
        const F32 y = load(search.y + i), w = load(search.w + i);
#pragma GCC unroll 8
        for (int t = 0; t < kThresholds; ++t) sums[t] += select(y >= thresholds[t], w, F32{});
    }
    for (int t = 0; t < kThresholds; ++t) mass[t] = total(sums[t]);
}

// Pads the last vector with entries that no threshold counts.
void pad(const Search& search) {
    for (int lane = 0; lane < kLanes; ++lane) {
        search.y[search.count + lane] = -kInf;
        search.w[search.count + lane] = 0;
    }
}

// Leaves the entries in [low, high); returns the weight of those at or above `high`.
double narrow(Search& search, float low, float high) {
    double before = 0;
    int32_t kept = 0;
    low = std::max(low, -kLargest);  // never the padding
    for (int32_t i = 0; i < search.count; i += kLanes) {
        const F32 y = load(search.y + i), w = load(search.w + i);
        I32 index;
        std::memcpy(&index, search.index + i, sizeof index);
        const I32 above = y >= high;
        if (bits_of(above) != 0) before += total(select(above, w, F32{}));
        const uint32_t bits = bits_of((y >= low) & ~above);
        if (bits == 0) continue;
        compress(search.y + kept, y, bits);
        compress(search.w + kept, w, bits);
        compress(search.index + kept, index, bits);
        kept += __builtin_popcount(bits);
    }
    search.count = kept;
    pad(search);
    return before;
}

// The cut that leaves the shortest prefix, by (y descending, index ascending), whose weight reaches `target`: all of
// the search's entries if they do not.
Cut finish(const Search& search, const SamplerScratch& scratch, double before, double target) {
    for (int32_t i = 0; i < search.count; ++i) scratch.keys[i] = key_of(search.y[i], i);
    sort_keys(scratch, search.count);
    Cut cut;
    for (int32_t i = 0; i < search.count; ++i) {
        const int32_t entry = index_of(scratch.keys[i]);
        cut = {search.y[entry], search.index[entry]};
        before += search.w[entry];
        if (before >= target) break;
    }
    return cut;
}

// As `finish`, for any number of entries; `top` is the largest y.
Cut prefix_cut(Search& search, const SamplerScratch& scratch, float top, double target) {
    pad(search);
    float low = -kInf, high = kInf, step = 0.25f;
    double before = 0;
    while (search.count > kSortAtOnce) {
        float thresholds[kThresholds];
        double mass[kThresholds];
        const float upper = std::min(high, top);
        for (int t = 0; t < kThresholds; ++t) {
            if (low == -kInf) {  // 1/4, 1/2, 1, ... 32 below the top, then further
                thresholds[t] = upper - step;
                step *= 2;
            } else {
                thresholds[t] = upper - (upper - low) * (t + 1) / (kThresholds + 1);
            }
        }
        mass_above(search, thresholds, mass);
        float next_low = low, next_high = high;
        for (int t = 0; t < kThresholds; ++t) {
            const double reached = before + mass[t];
            if (reached <= target * (1 - kMassSlack)) next_high = thresholds[t];
            else if (reached >= target * (1 + kMassSlack)) {
                next_low = thresholds[t];
                break;
            }
        }
        // Ties, or nothing to tell apart: what is left is sorted.
        if (next_low == low && next_high == high) break;
        low = next_low;
        high = next_high;
        before += narrow(search, low, high);
    }
    return finish(search, scratch, before, target);
}

// The row's entries at or above `threshold` as a search by logit, weighed by exp(logit - max) or 1 each.
double gather(const Row& row, Search& search, float threshold, bool weigh) {
    double sum = 0;
    search.count = 0;
    threshold = std::max(threshold, -kLargest);
    for (int32_t block = 0; block < row.blocks(); ++block) {
        if (row.scratch.maxima[block] < threshold) continue;
        F32 part = F32{};
        each_vector(row, row.x, block, [&](F32 x, int32_t first) {
            const I32 chosen = x >= threshold;
            const uint32_t bits = bits_of(chosen);
            if (bits == 0) return;
            const F32 weight = weigh ? exp_negative(x - row.max) : splat(1.0f);
            part += select(chosen, weight, F32{});
            compress(search.y + search.count, x, bits);
            compress(search.w + search.count, weight, bits);
            compress(search.index + search.count, lane_numbers() + first, bits);
            search.count += __builtin_popcount(bits);
        });
        sum += total(part);
    }
    return sum;
}

Search new_search(const Row& row) { return {row.scratch.y, row.scratch.w, row.scratch.index}; }

// The cut after the shortest prefix of probability `p`.
Cut top_p_cut(const Row& row, double p) {
    const double target = p * mass_of(row);
    Search search = new_search(row);
    for (float reach : {8.0f, kNegligible}) {
        if (gather(row, search, row.max - reach, true) >= target * (1 + kMassSlack))
            return prefix_cut(search, row.scratch, row.max, target);
    }
    gather(row, search, -kInf, true);
    return prefix_cut(search, row.scratch, row.max, target);
}

// The cut after the k first entries, k < row.count.
Cut top_k_cut(const Row& row, int32_t k) {
    float threshold = -kInf;
    const int32_t blocks = row.blocks();
    if (k <= blocks) {
        // k blocks have a maximum at or above the k-th largest one, so k entries do.
        float* selected = row.scratch.selected;
        std::copy(row.scratch.maxima, row.scratch.maxima + blocks, selected);
        std::nth_element(selected, selected + k - 1, selected + blocks, [](float a, float b) { return a > b; });
        threshold = selected[k - 1];
    }
    Search search = new_search(row);
    gather(row, search, threshold, false);
    if (search.count <= k) return {threshold, INT32_MAX};
    return prefix_cut(search, row.scratch, row.max, k);
}

}  // namespace
}  // namespace aph
