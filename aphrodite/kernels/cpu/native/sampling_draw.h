// The end of a row's program: the Gumbel-max draw or the argmax, and log-probabilities.
#pragma once
#include "sampling_search.h"

namespace aph {
namespace {

struct Best {
    float score = -kInf;
    int32_t token = -1;

    // The largest of `scores`, whose lanes are entries from `first` on. Equal scores: the first token seen, so blocks
    // that are not visited in order have to compare.
    void take(const Row& row, F32 scores, int32_t first) {
        const float top = largest(scores);
        if (top < score || top == -kInf) return;
        const int32_t candidate = row.token(first + __builtin_ctz(bits_of(scores == top)));
        if (top > score || candidate < token) *this = {top, candidate};
    }
};

// Scores of a block under the noise of its tokens.
void draw_block(const Row& row, int32_t block, const Stream& stream, Best& best) {
    if (row.ids != nullptr) {
        each_vector(row, row.x, block, [&](F32 x, int32_t first) {
            I32 ids = I32{};
            std::memcpy(&ids, row.ids + first, std::min(kLanes, row.count - first) * sizeof(int32_t));
            best.take(row, (x - row.max) + gumbel_of(uniforms_at(stream, ids)), first);
        });
        return;
    }
    F32 noise[kSampleBlock / kLanes];
    for (int32_t group = 0; group < kSampleBlock / (4 * kLanes); ++group)
        uniforms(stream, static_cast<uint32_t>(block * kSampleBlock + group * 4 * kLanes), noise + 4 * group);
    each_vector(row, row.x, block, [&](F32 x, int32_t first) {
        best.take(row, (x - row.max) + gumbel_of(noise[first % kSampleBlock / kLanes]), first);
    });
}

// The token with the largest sum of logit and noise, the lowest of equal ones.
int32_t draw(const Row& row, const Stream& stream) {
    const float* maxima = row.scratch.maxima;
    const int32_t blocks = row.blocks();
    Best best;
    // The most likely block first: it tells what the others have to beat.
    const int32_t leader = static_cast<int32_t>(std::max_element(maxima, maxima + blocks) - maxima);
    draw_block(row, leader, stream, best);
    for (int32_t block = 0; block < blocks; ++block)
        if (block != leader && (maxima[block] - row.max) + kMaxGumbel >= best.score && maxima[block] > -kInf)
            draw_block(row, block, stream, best);
    return best.token;
}

// The most likely token, the lowest of equal ones.
int32_t first_maximum(const Row& row) {
    for (int32_t block = 0; block < row.blocks(); ++block) {
        if (row.scratch.maxima[block] != row.max) continue;
        for (int32_t index = block * kSampleBlock; index < row.end(block); ++index)
            if (row.x[index] == row.max) return row.token(index);
    }
    return -1;
}

// Of `token`, which is among the candidates of a measured row, and of the most likely ones.
void report_logprobs(Row& row, int32_t token, const LogprobOut& out) {
    const float normalizer = row.max + static_cast<float>(std::log(mass_of(row)));
    const int32_t index = row.find(token);
    const float chosen = row.x[index];
    *out.logprob = chosen - normalizer;
    *out.rank = count_survivors(row, row.x, {chosen, index}, chosen);
    if (out.top == 0) return;
    const int32_t top = std::min(out.top, row.count);
    float threshold = -kInf;
    if (top < row.count) threshold = top_k_cut(row, top).value;
    const int32_t count = collect_keys(row, threshold);
    sort_keys(row.scratch, count);
    for (int32_t i = 0; i < out.top; ++i) {
        const bool there = i < count;
        out.top_ids[i] = there ? row.token(index_of(row.scratch.keys[i])) : 0;
        out.top_logprobs[i] = there ? value_of(row.scratch.keys[i]) - normalizer : -kInf;
    }
}

}  // namespace
}  // namespace aph
