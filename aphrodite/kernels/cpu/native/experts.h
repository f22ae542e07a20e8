// Mixtures of experts (arXiv 1701.06538): which experts the tokens of a step go to, and their rows put together by
// expert, so that an expert's weights are read once for all of its tokens.
//
// Cost of choosing: an exponential and a comparison for each expert and token. The products cost what the chosen
// experts' weights cost; the others are not touched.
#pragma once
#include <cmath>
#include <vector>

#include "kernels.h"
#include "program.h"

namespace aph {

constexpr int kMostChoices = 64;  // experts a token

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// The tokens of one expert: rows [first, first + count) among those of all (token, choice) pairs, ordered by expert.
struct ExpertSegment {
    int32_t expert;
    int64_t first, count;
    int64_t first_group;  // groups of rows (`group_count`) in the segments before
};

// The choices of one layer's tokens. `choose` runs for any tokens at once, then `group` once.
class Routing {
public:
    // Room for `tokens` tokens and whatever the layers choose among.
    void prepare(const std::vector<RoutingDesc>& layers, int64_t tokens, int64_t workers);

    // The experts of a token, best first and of equal ones the first, and the weights of their results.
    void choose(const RoutingDesc& layer, const float* logits, const float* correction, int64_t token, int64_t worker);

    void group(const RoutingDesc& layer, int64_t tokens);

    // What follows holds after `group`.
    const std::vector<ExpertSegment>& segments() const { return segments_; }
    int64_t group_total() const { return group_total_; }
    const ExpertSegment& segment_of_group(int64_t group) const;
    int64_t token_of(int64_t row) const { return tokens_[row]; }
    int64_t row_of(int64_t pair) const { return rows_[pair]; }  // pair = token * choices + choice
    float weight_of(int64_t pair) const { return weights_[pair]; }

private:
    std::vector<int32_t> experts_;  // [tokens][choices]
    std::vector<float> weights_;    // the same
    std::vector<int32_t> rows_;     // the same
    std::vector<int32_t> tokens_;   // of each row
    std::vector<int64_t> starts_;   // [experts]
    std::vector<float> scratch_;    // [workers][2 * experts + groups]
    std::vector<ExpertSegment> segments_;
    int64_t scratch_stride_ = 0, group_total_ = 0;
};

// The rows of one expert out of the packed rows of all pairs.
inline PackedRows segment_rows(const PackedRows& all, int64_t first, int64_t count) {
    return {all.kind, all.columns, count, all.words + first * all.row_words(),
            all.meta == nullptr ? nullptr : all.meta + first * all.row_meta()};
}

}  // namespace aph
