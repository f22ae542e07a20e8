// Stages that steer by what was drawn. They run last, and each keeps a number for every position of its row, made
// from the number and the token before it (op.data: float[], written here; sampling/stages/selection.py).
#pragma once
#include "sampling_history.h"
#include "sampling_search.h"

namespace aph {
namespace {

constexpr float kLn2 = 0.693147181f;
constexpr int32_t kEstimateFrom = 100;                          // stages/mirostat.py
constexpr float kPeak = 5.0f, kSharpness = 10.0f, kWidth = 0.3f;  // stages/adaptive_p.py

// The distribution that both speak of, and who wants to know what was drawn from it.
struct Selection {
    const float* x = nullptr;
    float normalizer = 0;
    const SamplerOp* mirostat = nullptr;
    const SamplerOp* adaptive = nullptr;
};

// The row's number at this position; `first` where its answer begins.
inline float number_of(const SamplerOp& op, const Context& context, float first) {
    return context.length == context.num_prompt ? first : static_cast<const float*>(op.data)[context.length];
}

// Version 1's number of tokens, from the Zipf exponent of the most likely ones (stages/mirostat.py).
double mirostat_rank(Row& row, float mu) {
    const int32_t wanted = std::min(kEstimateFrom, row.count);
    const int32_t found = collect_keys(row, wanted < row.count ? top_k_cut(row, wanted).value : -kInf);
    sort_keys(row.scratch, found);
    double products = 0, squares = 0;
    for (int32_t i = 0; i + 1 < std::min(found, wanted); ++i) {
        const double t = std::log((i + 2.0) / (i + 1.0));
        const double b = value_of(row.scratch.keys[i]) - static_cast<double>(value_of(row.scratch.keys[i + 1]));
        products += b * t;
        squares += t * t;
    }
    const double exponent = products / squares, excess = exponent - 1, size = std::log(static_cast<double>(row.vocab));
    const double mass = std::fabs(excess) < 1e-9 ? 1 / size : excess / -std::expm1(-excess * size);
    const double k = std::pow(mass * std::exp2(static_cast<double>(mu)), 1 / exponent);
    return std::isnan(k) ? 1 : std::nearbyint(std::min(std::max(k, 1.0), static_cast<double>(row.vocab)));
}

// values: version, tau, eta.
void mirostat(Row& row, const SamplerOp& op, const Context& context, Selection& selection) {
    const float mu = number_of(op, context, 2 * op.values[1]);
    if (op.values[0] == 2) {
        const float normalizer = static_cast<float>(std::log(mass_of(row)));
        keep_at_least(row, row.max + std::min(normalizer - mu * kLn2, 0.0f));
    } else {
        const double k = mirostat_rank(row, mu);
        if (k < row.count) keep(row, row.x, top_k_cut(row, static_cast<int32_t>(k)));
    }
    measure(row);
    selection.x = row.x;
    selection.normalizer = row.max + static_cast<float>(std::log(mass_of(row)));
    selection.mirostat = &op;
}

// values: target, decay.
void adaptive_p(Row& row, const SamplerOp& op, const Context& context, Selection& selection) {
    const float average = number_of(op, context, op.values[0]);
    const float target = std::min(std::max(2 * op.values[0] - average, 0.0f), 1.0f), max = row.max;
    const double mass = mass_of(row);
    std::memcpy(row.scratch.measure, row.x, row.count * sizeof(float));
    selection.x = row.scratch.measure;
    selection.normalizer = max + static_cast<float>(std::log(mass));
    selection.adaptive = &op;
    const float scale = static_cast<float>(1 / mass);
    transform(row, [=](F32 x) {
        const F32 apart = exp_negative(x - max) * scale - target;
        const F32 distance = select(apart > 0.0f, apart, -apart) / kWidth;
        return select(x == -kInf, x, kPeak - kSharpness * distance * distance / (1.0f + distance));
    });
}

// The numbers of the next position, now that the token is known.
void observe(const Row& row, const Context& context, const Selection& selection, int32_t token) {
    if (selection.x == nullptr) return;
    const float logprob = selection.x[row.find(token)] - selection.normalizer;
    if (const SamplerOp* op = selection.mirostat) {
        float* numbers = static_cast<float*>(op->data);
        const float mu = number_of(*op, context, 2 * op->values[1]);
        numbers[context.length + 1] = mu - op->values[2] * (logprob / -kLn2 - op->values[1]);
    }
    if (const SamplerOp* op = selection.adaptive) {
        float* numbers = static_cast<float*>(op->data);
        const float average = number_of(*op, context, op->values[0]), decay = op->values[1];
        numbers[context.length + 1] = decay * average + (1 - decay) * std::exp(logprob);
    }
}

}  // namespace
}  // namespace aph
