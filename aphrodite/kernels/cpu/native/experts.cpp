#include "experts.h"

#include <algorithm>

namespace aph {
namespace {

constexpr float kTiny = 1e-20f;  // keeps sums of scores above 0, as DeepSeek-V3 does

// Indices of the `most` largest of `count` values, equal ones by their index.
void largest(const float* values, int count, int most, int32_t* out) {
    int found = 0;
    for (int i = 0; i < count; ++i) {
        if (found == most && !(values[i] > values[out[found - 1]])) continue;
        int place = found < most ? found++ : most - 1;
        for (; place > 0 && values[i] > values[out[place - 1]]; --place) out[place] = out[place - 1];
        out[place] = i;
    }
}

void softmax(float* values, int count) {
    float top = values[0];
    for (int i = 1; i < count; ++i) top = values[i] > top ? values[i] : top;
    float total = 0;
    for (int i = 0; i < count; ++i) total += values[i] = std::exp(values[i] - top);
    for (int i = 0; i < count; ++i) values[i] /= total;
}

// Bars the experts of all groups but the best.
void keep_best_groups(const RoutingDesc& layer, float* wanted, float* group_scores) {
    const int size = layer.experts / layer.groups;
    for (int group = 0; group < layer.groups; ++group) {
        int32_t best[2];
        largest(wanted + group * size, size, layer.pair_score ? 2 : 1, best);
        const float* own = wanted + group * size;
        group_scores[group] = layer.pair_score ? own[best[0]] + own[best[1]] : own[best[0]];
    }
    for (int kept = 0; kept < layer.groups; ++kept) {
        int before = 0;  // groups that are better, or as good and earlier
        for (int other = 0; other < layer.groups; ++other)
            before += group_scores[other] > group_scores[kept] ||
                      (group_scores[other] == group_scores[kept] && other < kept);
        if (before >= layer.best_groups) std::fill_n(wanted + kept * size, size, -INFINITY);
    }
}

}  // namespace

void Routing::prepare(const std::vector<RoutingDesc>& layers, int64_t tokens, int64_t workers) {
    int64_t experts = 0, choices = 0, groups = 0;
    for (const RoutingDesc& layer : layers) {
        experts = std::max<int64_t>(experts, layer.experts);
        choices = std::max<int64_t>(choices, layer.choices);
        groups = std::max<int64_t>(groups, layer.groups);
    }
    const size_t pairs = static_cast<size_t>(tokens * choices);
    if (experts_.size() < pairs) {
        experts_.resize(pairs);
        weights_.resize(pairs);
        rows_.resize(pairs);
        tokens_.resize(pairs);
    }
    starts_.resize(static_cast<size_t>(experts));
    segments_.reserve(static_cast<size_t>(experts));
    scratch_stride_ = (2 * experts + groups + 15) / 16 * 16;
    scratch_.resize(static_cast<size_t>(workers * scratch_stride_));
}

void Routing::choose(const RoutingDesc& layer, const float* logits, const float* correction, int64_t token,
                     int64_t worker) {
    float* scores = scratch_.data() + worker * scratch_stride_;
    float* wanted = scores + layer.experts;
    const Scoring scoring = static_cast<Scoring>(layer.scoring);
    std::copy_n(logits, layer.experts, scores);
    if (scoring == Scoring::Softmax) softmax(scores, layer.experts);
    if (scoring == Scoring::Sigmoid)
        for (int i = 0; i < layer.experts; ++i) scores[i] = sigmoid(scores[i]);
    for (int i = 0; i < layer.experts; ++i) wanted[i] = correction == nullptr ? scores[i] : scores[i] + correction[i];
    if (layer.best_groups < layer.groups) keep_best_groups(layer, wanted, wanted + layer.experts);
    int32_t* chosen = &experts_[token * layer.choices];
    float* weights = &weights_[token * layer.choices];
    largest(wanted, layer.experts, layer.choices, chosen);
    for (int i = 0; i < layer.choices; ++i) weights[i] = scores[chosen[i]];
    if (scoring == Scoring::SoftmaxOfChosen) softmax(weights, layer.choices);
    if (layer.normalize != 0) {
        float total = weights[0];
        for (int i = 1; i < layer.choices; ++i) total += weights[i];
        for (int i = 0; i < layer.choices; ++i) weights[i] /= total + kTiny;
    }
    for (int i = 0; i < layer.choices; ++i) weights[i] *= layer.scale;
}

void Routing::group(const RoutingDesc& layer, int64_t tokens) {
    const int64_t pairs = tokens * layer.choices;
    std::fill(starts_.begin(), starts_.end(), 0);
    for (int64_t pair = 0; pair < pairs; ++pair) ++starts_[experts_[pair]];
    segments_.clear();
    group_total_ = 0;
    int64_t first = 0;
    for (int32_t expert = 0; expert < layer.experts; ++expert) {
        const int64_t count = starts_[expert];
        starts_[expert] = first;
        if (count == 0) continue;
        segments_.push_back({expert, first, count, group_total_});
        group_total_ += group_count(count);
        first += count;
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
        const int64_t row = starts_[experts_[pair]]++;
        rows_[pair] = static_cast<int32_t>(row);
        tokens_[row] = static_cast<int32_t>(pair / layer.choices);
    }
}

const ExpertSegment& Routing::segment_of_group(int64_t group) const {
    const auto behind = std::upper_bound(segments_.begin(), segments_.end(), group,
                                         [](int64_t at, const ExpertSegment& s) { return at < s.first_group; });
    return *(behind - 1);
}

}  // namespace aph
