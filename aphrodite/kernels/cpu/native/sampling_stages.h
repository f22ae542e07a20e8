// Stages that shape and truncate the distribution: what each operation of a row's program does to its candidates
// (aphrodite/sampling/stages has the definitions, and the same stages as torch operations).
#pragma once
#include "sampling_history.h"
#include "sampling_selection.h"

namespace aph {
namespace {

constexpr float kLowestTemperature = 1e-5f;
constexpr double kFlat = 1e-9;       // stages/tfs.py
constexpr float kFarthest = -1e6f;   // stages/quadratic.py
constexpr double kLogSmallest = -85.19565;  // ln 1e-37, stages/skew.py
constexpr double kTailShare = 1e-2;   // of the mass that skew's tail holds at most, divided by |a - 1|
constexpr double kTailToken = 4e-6;   // and that a token of it holds
constexpr double kNoBend = 1e-7;      // relative change of a probability that skew leaves out
constexpr int kReaches = 4;
constexpr int32_t kTailBins = 2048;
constexpr float kBinsPerLogit = 64.0f;

// Shapes. The caller has measured the row, so its maximum is finite, except for `temperature`.

void temperature(Row& row, float divisor) {
    transform(row, [divisor](F32 x) { return x / divisor; });
}

// values: lowest, highest - lowest, exponent.
void dynamic_temperature(Row& row, const SamplerOp& op) {
    const int32_t left = count_survivors(row, row.x, {-kLargest, INT32_MAX}, -kLargest);
    const double share = moments_of(row).entropy / std::log(static_cast<double>(std::max(left, 2)));
    const double bent = std::pow(std::min(std::max(share, 0.0), 1.0), static_cast<double>(op.values[2]));
    temperature(row, std::max(static_cast<float>(op.values[0] + op.values[1] * bent), kLowestTemperature));
}

// values: k, s.
void quadratic(Row& row, const SamplerOp& op) {
    const float k = op.values[0], s = op.values[1], max = row.max;
    transform(row, [=](F32 x) {
        const F32 distance = larger(x - max, splat(kFarthest));
        const F32 smoothed = max + distance * distance * (s * distance - k);
        return select(x == -kInf, x, smoothed);
    });
}

// Logarithms of the steps of C^a along the sorted keys, into scratch.y at the indices that the keys came from; behind
// them is the mass `below`. Returns the whole row's. A small step is its slope in the middle, a * C^(a - 1) * p, to
// within (a * p / C)^2 / 24.
double skew_head(Row& row, int32_t count, double below, double a) {
    constexpr double kSmallStep = 2e-3;
    double* weights = reinterpret_cast<double*>(row.scratch.spare);
    double mass = below;
    for (int32_t i = 0; i < count; ++i)
        mass += weights[i] = std::exp(static_cast<double>(value_of(row.scratch.keys[i]) - row.max));
    const double scale = std::log(mass), slope = std::log(a) - scale;
    double cumulative = 0, logarithm = 0;  // of `cumulative` / mass, which is C
    for (int32_t i = 0; i < count; ++i) {
        const uint64_t key = row.scratch.keys[i];
        const double weight = weights[i], d = weight / cumulative;
        cumulative += weight;
        double step;
        if (d * (1 + a) < kSmallStep) {
            step = (value_of(key) - row.max) + slope + (a - 1) * (logarithm + d * (0.5 - d / 8));
            logarithm += d * (1 - d * (0.5 - d / 3));
        } else {
            logarithm = std::min(std::log(cumulative) - scale, 0.0);
            step = a * logarithm + std::log(-std::expm1(a * std::log1p(-weight / cumulative)));
        }
        row.scratch.y[index_of(key)] = static_cast<float>(std::max(step, kLogSmallest));
    }
    return mass;
}

// Sums of exp(logit - max) of the logits that are further than each reach below the maximum.
void masses_behind(const Row& row, const float reaches[kReaches], double sums[kReaches]) {
    std::fill(sums, sums + kReaches, 0.0);
    for (int32_t block = 0; block < row.blocks(); ++block) {
        F32 parts[kReaches] = {};
        each_vector(row, row.x, block, [&](F32 x, int32_t) {
            const F32 weight = select(x > -kInf, exp_negative(x - row.max), F32{});
#pragma GCC unroll 4
            for (int i = 0; i < kReaches; ++i) parts[i] += select(x < row.max - reaches[i], weight, F32{});
        });
        for (int i = 0; i < kReaches; ++i) sums[i] += total(parts[i]);
    }
}

// Where skew's sorted head ends, and the mass behind it. What is behind may neither be much altogether nor have a
// large single token, which the histogram does not resolve.
struct SkewTail {
    float top = -kInf;
    double below = 0;
};

SkewTail skew_tail(const Row& row, double a) {
    constexpr float reaches[kReaches] = {-1.0f, 12.0f, 16.0f, 20.0f};  // the first one's are all
    const double bend = std::fabs(a - 1);
    double behind[kReaches];
    masses_behind(row, reaches, behind);
    for (int i = 1; i < kReaches; ++i)
        if (bend * behind[i] <= kTailShare * behind[0] && bend * std::exp(-reaches[i]) <= kTailToken * behind[0])
            return {row.max - reaches[i], behind[i]};
    return {};
}

// In which bin of the histogram below `top` a logit is, and how far in it.
inline F32 place_in_tail(F32 x, float top) {
    const F32 place = (top - x) * kBinsPerLogit, last = splat(kTailBins - 1);
    return select(place < last, larger(place, F32{}), last);
}

// (a - 1) * ln C at the borders of the histogram's bins.
void bend_tail(const Row& row, const SkewTail& tail, double mass, double a, float bends[kTailBins + 1]) {
    double sums[kTailBins] = {};
    for (int32_t block = 0; block < row.blocks(); ++block) {
        if (row.scratch.maxima[block] < row.max - kNegligible) continue;
        each_vector(row, row.x, block, [&](F32 x, int32_t) {
            const I32 whole = __builtin_convertvector(place_in_tail(x, tail.top), I32);
            int32_t bins[kLanes];
            float weights[kLanes];
            std::memcpy(bins, &whole, sizeof whole);
            store(weights, select((x < tail.top) & (x > -kInf), exp_negative(x - row.max), F32{}));
            for (int lane = 0; lane < kLanes; ++lane) sums[bins[lane]] += weights[lane];
        });
    }
    double above = mass - tail.below;
    for (int32_t bin = 0; bin <= kTailBins; ++bin) {
        bends[bin] = static_cast<float>((a - 1) * std::log(std::min(above / mass, 1.0)));
        if (bin < kTailBins) above += sums[bin];
    }
}

// values: a. Only a head is sorted, behind which so little is left that C is known well enough from a histogram: in
// straight lines between the borders of its bins.
void skew(Row& row, const SamplerOp& op) {
    const double a = op.values[0];
    const SkewTail tail = skew_tail(row, a);
    const int32_t count = collect_keys(row, tail.top);
    sort_keys(row.scratch, count);
    std::fill(row.scratch.y, row.scratch.y + row.count, -kInf);
    const double mass = skew_head(row, count, tail.below, a);
    const bool bent = std::fabs(a - 1) * tail.below > kNoBend * mass;
    float bends[kTailBins + 1];
    if (bent) bend_tail(row, tail, mass, a, bends);
    const float shift = static_cast<float>(std::log(a) - std::log(mass)) - row.max;
    replace_all(row, [&](F32 x, int32_t index) {
        const F32 head = load(row.scratch.y + index);
        F32 skewed = x + shift;
        if (bent) {
            const F32 place = place_in_tail(x, tail.top);
            const I32 bin = __builtin_convertvector(place, I32);
            const F32 from = look_up(bends, bin), to = look_up(bends + 1, bin);
            skewed += from + (place - __builtin_convertvector(bin, F32)) * (to - from);
        }
        skewed = larger(skewed, splat(static_cast<float>(kLogSmallest)));
        return select(head > -kInf, head, select(x > -kInf, skewed, x));
    });
}

// Truncations.

void top_k(Row& row, const SamplerOp& op) {
    if (op.values[0] < row.count) keep(row, row.x, top_k_cut(row, static_cast<int32_t>(op.values[0])));
}

void top_p(Row& row, const SamplerOp& op) { keep(row, row.x, top_p_cut(row, op.values[0])); }

void min_p(Row& row, const SamplerOp& op) { keep_at_least(row, row.max + op.values[0]); }

// values: n.
void top_nsigma(Row& row, const SamplerOp& op) {
    const float max = row.max;
    double sum = 0, squares = 0;
    int64_t left = 0;
    for (int32_t block = 0; block < row.blocks(); ++block)
        each_vector(row, row.x, block, [&](F32 x, int32_t) {
            const I32 there = x > -kInf;
            sum += total(select(there, x - max, F32{}));
            left += __builtin_popcount(bits_of(there));
        });
    const float mean = static_cast<float>(sum / static_cast<double>(left));
    for (int32_t block = 0; block < row.blocks(); ++block) {
        F32 part = F32{};
        each_vector(row, row.x, block, [&](F32 x, int32_t) {
            const F32 off = (x - max) - mean;
            part += select(x > -kInf, off * off, F32{});
        });
        squares += total(part);
    }
    const double sigma = std::sqrt(squares / static_cast<double>(left));
    if (sigma <= kLargest) keep_at_least(row, max - static_cast<float>(op.values[0] * sigma));
}

// values: ln a.
void top_a(Row& row, const SamplerOp& op) {
    const double highest = -std::log(mass_of(row));
    keep_at_least(row, row.max + static_cast<float>(std::min(op.values[0] + highest, 0.0)));
}

// values: ln epsilon.
void epsilon_cutoff(Row& row, const SamplerOp& op) {
    const double normalizer = std::log(mass_of(row));
    keep_at_least(row, row.max + static_cast<float>(std::min(op.values[0] + normalizer, 0.0)));
}

// values: ln eta.
void eta_cutoff(Row& row, const SamplerOp& op) {
    const Moments moments = moments_of(row);
    const double lowest = std::min<double>(op.values[0], op.values[0] / 2.0 - moments.entropy);
    keep_at_least(row, row.max + static_cast<float>(std::min(lowest + std::log(moments.mass), 0.0)));
}

// How many of `count` sorted keys stay, and whether entries with at most the weight `rest` could change that.
struct TailCut {
    int32_t kept;
    bool certain;
};

TailCut tail_free_cut(const Row& row, int32_t count, double z, bool whole) {
    double* reached = reinterpret_cast<double*>(row.scratch.spare);
    const int32_t zeros = whole ? std::min(2, row.vocab - count) : 0, places = count + zeros - 2;
    if (places < 1) return {1, false};
    double first = 0, second = 0, total = 0;
    for (int32_t i = 0; i < count + zeros; ++i) {
        double p = 0;
        if (i < count) p = std::exp(static_cast<double>(value_of(row.scratch.keys[i]) - row.max));
        if (i >= 2) reached[i - 2] = total += std::fabs(p - 2 * second + first);
        first = second;
        second = p;
    }
    const double unknown = whole ? 0 : 2 * first;
    if (total <= kFlat) return {row.vocab, whole};
    const auto end = reached + places;
    const auto fewest = std::upper_bound(reached, end, z * total);
    const auto most = std::upper_bound(fewest, end, z * (total + unknown));
    return {static_cast<int32_t>(fewest - reached) + 1, whole || (fewest == most && most < end)};
}

// values: z.
void tail_free(Row& row, const SamplerOp& op) {
    if (row.vocab < 3) return;
    for (float reach : {8.0f, 14.0f, 20.0f, kInf}) {
        const int32_t count = collect_keys(row, row.max - reach);
        sort_keys(row.scratch, count);
        const TailCut cut = tail_free_cut(row, count, op.values[0], reach == kInf);
        if (!cut.certain && reach < kInf) continue;
        if (cut.kept < count) {
            const uint64_t last = row.scratch.keys[cut.kept - 1];
            keep(row, row.x, {value_of(last), index_of(last)});
        }
        return;
    }
}

// The entries with |-ln p - H| <= `reach` as a search by that, negated, which scratch.measure holds as well (-inf for
// some of the others); returns their weight. `offset` is H - ln(mass).
double gather_typical(const Row& row, Search& search, float offset, float reach) {
    double sum = 0;
    search.count = 0;
    for (int32_t block = 0; block < row.blocks(); ++block) {
        float* measure = row.scratch.measure;
        if ((row.scratch.maxima[block] - row.max) + offset < -reach) {
            std::fill(measure + block * kSampleBlock, measure + row.end(block), -kInf);
            continue;
        }
        F32 part = F32{};
        each_vector(row, row.x, block, [&](F32 x, int32_t first) {
            const F32 surprise = (x - row.max) + offset, typicality = select(surprise > 0.0f, -surprise, surprise);
            store(measure + first, typicality);
            const I32 chosen = (typicality >= -reach) & (x > -kInf);
            const uint32_t bits = bits_of(chosen);
            if (bits == 0) return;
            const F32 weight = exp_negative(x - row.max);
            part += select(chosen, weight, F32{});
            compress(search.y + search.count, typicality, bits);
            compress(search.w + search.count, weight, bits);
            compress(search.index + search.count, lane_numbers() + first, bits);
            search.count += __builtin_popcount(bits);
        });
        sum += total(part);
    }
    return sum;
}

// values: tau. Orders by |-ln p - H|, and stops where the mass reaches tau.
void typical_p(Row& row, const SamplerOp& op) {
    const Moments moments = moments_of(row);
    const float offset = static_cast<float>(moments.entropy - std::log(moments.mass));
    const double target = op.values[0] * moments.mass;
    Search search = new_search(row);
    for (float reach : {4.0f, 8.0f, kInf})
        if (gather_typical(row, search, offset, reach) >= target * (1 + kMassSlack)) break;
    keep(row, row.scratch.measure, prefix_cut(search, row.scratch, 0.0f, target));
}

// values: probability, ln threshold; ids: tokens that are never removed, ascending.
void xtc(Row& row, const SamplerOp& op, const Context& context) {
    Stream stream = context.stream;
    stream.use = kUseXtc;
    if (!(uniforms_at(stream, I32{})[0] < op.values[0])) return;
    const float below = op.values[1] + static_cast<float>(std::log(mass_of(row)));
    const int32_t count = below > 0 ? 0 : collect_keys(row, row.max + below);
    if (count < 2) return;
    const uint64_t* keys = row.scratch.keys;
    const uint64_t spared = *std::min_element(keys, keys + count);
    for (int32_t i = 0; i < count; ++i) {
        const int32_t index = index_of(keys[i]);
        if (keys[i] == spared || std::binary_search(op.ids, op.ids + op.count, row.token(index))) continue;
        row.x[index] = -kInf;
    }
    row.measured = false;
}

// Operations that need no maximum; false if it is none of them.
bool run_unmeasured(Row& row, const SamplerOp& op, const Context& context) {
    switch (op.code) {
        case SamplerOpCode::Mask: mask(row, op, context); return true;
        case SamplerOpCode::Allow: allow(row, op); return true;
        case SamplerOpCode::TokenMask: token_mask(row, op); return true;
        case SamplerOpCode::Force: force(row, op); return true;
        case SamplerOpCode::Bias: bias(row, op); return true;
        case SamplerOpCode::BadWords: bad_words(row, op, context); return true;
        case SamplerOpCode::Penalties: penalties(row, op, context); return true;
        case SamplerOpCode::RangedPenalties: ranged_penalties(row, op, context); return true;
        case SamplerOpCode::Dry: dry(row, op, context); return true;
        case SamplerOpCode::NoRepeatNgram: no_repeat_ngram(row, op, context); return true;
        case SamplerOpCode::Temperature: temperature(row, op.values[0]); return true;
        default: return false;
    }
}

// Runs one operation; false if the row is bad or nothing is left of it.
bool run(Row& row, const SamplerOp& op, const Context& context, Selection& selection) {
    if (run_unmeasured(row, op, context)) return true;
    if (!measure(row)) return false;
    switch (op.code) {
        case SamplerOpCode::DynamicTemperature: dynamic_temperature(row, op); break;
        case SamplerOpCode::TopNSigma: top_nsigma(row, op); break;
        case SamplerOpCode::TopK: top_k(row, op); break;
        case SamplerOpCode::TopP: top_p(row, op); break;
        case SamplerOpCode::TopA: top_a(row, op); break;
        case SamplerOpCode::MinP: min_p(row, op); break;
        case SamplerOpCode::TailFree: tail_free(row, op); break;
        case SamplerOpCode::EtaCutoff: eta_cutoff(row, op); break;
        case SamplerOpCode::EpsilonCutoff: epsilon_cutoff(row, op); break;
        case SamplerOpCode::TypicalP: typical_p(row, op); break;
        case SamplerOpCode::Quadratic: quadratic(row, op); break;
        case SamplerOpCode::Xtc: xtc(row, op, context); break;
        case SamplerOpCode::Skew: skew(row, op); break;
        case SamplerOpCode::Mirostat: mirostat(row, op, context, selection); break;
        case SamplerOpCode::AdaptiveP: adaptive_p(row, op, context, selection); break;
        default: break;
    }
    return true;
}

}  // namespace
}  // namespace aph
