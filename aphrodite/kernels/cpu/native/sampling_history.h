// Stages that change the logits of chosen tokens: bans and bias, and what follows from the row's own history.
#pragma once
#include "history.h"
#include "sampling_candidates.h"

namespace aph {
namespace {

constexpr float kLeastFactor = 0.01f;  // stages/ranged_penalties.py

// What stages may read beside their row.
struct Context {
    const int32_t* history;  // tokens before the one to be chosen
    int32_t length;
    int32_t num_prompt;
    Stream stream;
};

// Hard rules.

void mask_tokens(Row& row, const int32_t* ids, int32_t count) {
    for (int32_t i = 0; i < count; ++i) {
        const int32_t index = row.find(ids[i]);
        if (index < 0) continue;
        row.bad |= !(row.x[index] <= kLargest);
        row.x[index] = -kInf;
    }
    row.measured = false;
}

void mask(Row& row, const SamplerOp& op, const Context& context) {
    if (context.length >= op.values[0] && context.length < op.values[1]) mask_tokens(row, op.ids, op.count);
}

void bias(Row& row, const SamplerOp& op) {
    for (int32_t i = 0; i < op.count; ++i) {
        const int32_t index = row.find(op.ids[i]);
        if (index >= 0) row.x[index] += op.amounts[i];
    }
    row.measured = false;
}

// Keeps the tokens listed, in ascending order.
void allow(Row& row, const SamplerOp& op) {
    measure(row);  // a bad logit is one wherever it is
    int32_t kept = 0;
    for (int32_t i = 0; i < op.count; ++i) {
        const int32_t index = row.find(op.ids[i]);
        if (index < 0) continue;
        row.scratch.x[kept] = row.x[index];
        row.scratch.ids[kept++] = op.ids[i];
    }
    row.x = row.scratch.x;
    row.ids = row.scratch.ids;
    row.count = kept;
    row.measured = false;
}

// Keeps the tokens whose bit is set. data: [vocab / 32 + 1] words. It comes first in a program, on the whole vocabulary.
void token_mask(Row& row, const SamplerOp& op) {
    measure(row);  // a bad logit is one wherever it is
    const uint32_t* words = static_cast<const uint32_t*>(op.data);
    const auto bits_at = [&](int32_t first) {
        const int32_t left = row.count - first;
        return words[first >> 5] & (left < 32 ? (1u << left) - 1 : ~0u);
    };
    int32_t kept = 0;
    for (int32_t first = 0; first < row.count; first += 32) kept += __builtin_popcount(bits_at(first));
    if (kept > row.count / 8) {
        for (int32_t first = 0; first < row.count; first += 32) {
            const uint32_t bits = bits_at(first);
            if (bits == ~0u) continue;
            const int32_t end = std::min(32, row.count - first);
            for (int32_t i = 0; i < end; ++i) row.x[first + i] = bits >> i & 1 ? row.x[first + i] : -kInf;
        }
    } else {
        int32_t place = 0;
        for (int32_t first = 0; first < row.count; first += 32) {
            for (uint32_t bits = bits_at(first); bits != 0; bits &= bits - 1) {
                const int32_t token = first + __builtin_ctz(bits);
                row.scratch.ids[place] = token;
                row.scratch.x[place++] = row.x[token];
            }
        }
        row.x = row.scratch.x;
        row.ids = row.scratch.ids;
        row.count = kept;
    }
    row.measured = false;
}

// Keeps one token. data: [1], the token; -1: none is forced.
void force(Row& row, const SamplerOp& op) {
    const int32_t token = *static_cast<const int32_t*>(op.data);
    if (token < 0) return;
    measure(row);  // a bad logit is one wherever it is
    const int32_t index = row.find(token);
    row.count = 0;
    if (index >= 0) {
        row.scratch.x[0] = row.x[index];
        row.scratch.ids[0] = token;
        row.count = 1;
    }
    row.x = row.scratch.x;
    row.ids = row.scratch.ids;
    row.measured = false;
}

// Bars the last token of a word whose others end the answer. ids: each word's length, then its tokens.
void bad_words(Row& row, const SamplerOp& op, const Context& context) {
    for (const int32_t* word = op.ids; word < op.ids + op.count; word += 1 + *word) {
        const int32_t opening = *word - 1, first = context.length - opening;
        if (first < context.num_prompt || !std::equal(word + 1, word + 1 + opening, context.history + first)) continue;
        mask_tokens(row, word + *word, 1);
    }
}

// Calls f(logit, i) for every candidate among `tokens`, each of which may come once.
template <class F>
void each_listed(Row& row, const int32_t* tokens, int32_t count, F&& f) {
    if (row.ids == nullptr) {
        for (int32_t i = 0; i < count; ++i) f(row.x[tokens[i]], i);
        return;
    }
    int32_t* places = row.scratch.counts;
    for (int32_t i = 0; i < count; ++i) places[tokens[i]] = i + 1;
    for (int32_t i = 0; i < row.count; ++i)
        if (places[row.ids[i]] != 0) f(row.x[i], places[row.ids[i]] - 1);
    for (int32_t i = 0; i < count; ++i) places[tokens[i]] = 0;
}

// What a history asks of each token that it holds: `index` has the tokens.
struct Seen {
    int32_t* tokens;  // scratch.index
    float* factor;    // scratch.y: of the repetition penalty
    float* amount;    // scratch.w: to be subtracted
    int32_t count = 0;
};

void penalize(Row& row, const Seen& seen) {
    for (int32_t i = 0; i < seen.count; ++i) row.scratch.counts[seen.tokens[i]] = 0;
    each_listed(row, seen.tokens, seen.count, [&seen](float& x, int32_t i) {
        x = (x > 0.0f ? x / seen.factor[i] : x * seen.factor[i]) - seen.amount[i];
    });
    row.measured = false;
}

// The place of a token among those seen, with whether it is new there.
inline int32_t place_of(const Row& row, Seen& seen, int32_t token, bool& fresh) {
    int32_t& place = row.scratch.counts[token];
    fresh = place == 0;
    if (fresh) {
        seen.tokens[seen.count] = token;
        place = ++seen.count;
    }
    return place - 1;
}

// values: repetition, frequency, presence.
void penalties(Row& row, const SamplerOp& op, const Context& context) {
    Seen seen{row.scratch.index, row.scratch.y, row.scratch.w};
    for (int32_t i = 0; i < context.length; ++i) {
        bool fresh;
        const int32_t place = place_of(row, seen, context.history[i], fresh);
        if (fresh) seen.amount[place] = 0;  // counts the answer's, for now
        if (i >= context.num_prompt) seen.amount[place] += 1;
    }
    for (int32_t i = 0; i < seen.count; ++i) {
        seen.factor[i] = op.values[0];
        if (seen.amount[i] > 0) seen.amount[i] = seen.amount[i] * op.values[1] + op.values[2];
    }
    penalize(row, seen);
}

// values: repetition, frequency, presence, slope, range (0: all), decay. stages/ranged_penalties.py defines them.
void ranged_penalties(Row& row, const SamplerOp& op, const Context& context) {
    const int32_t wanted = static_cast<int32_t>(op.values[4]), length = context.length;
    const int32_t size = wanted == 0 ? length : std::min(wanted, length);
    const int32_t decay = wanted == 0 ? 0 : static_cast<int32_t>(op.values[5]);
    const int32_t span = static_cast<int32_t>(std::min<int64_t>(int64_t{size} + decay, length));
    Seen seen{row.scratch.index, row.scratch.y, row.scratch.w};
    for (int32_t distance = 0; distance < span; ++distance) {
        float weight = op.values[3];
        if (distance < size - size / 2) weight = 1;
        else if (distance >= size) weight *= 1 - static_cast<float>(distance - size) / static_cast<float>(decay);
        bool fresh;
        const int32_t place = place_of(row, seen, context.history[length - 1 - distance], fresh);
        const bool answer = distance < length - context.num_prompt;
        if (fresh) {
            seen.factor[place] = std::max(1 + (op.values[0] - 1) * weight, kLeastFactor);
            seen.amount[place] = answer ? op.values[2] * weight : 0;
        }
        if (answer) seen.amount[place] += op.values[1] * weight;
    }
    penalize(row, seen);
}

void dry(Row& row, const SamplerOp& op, const Context& context) {
    int32_t* tokens = row.scratch.index;
    float* amounts = row.scratch.y;
    const int32_t count = dry_penalties(context.history, context.length, row.vocab,
                                        *static_cast<const DryRow*>(op.data), tokens, amounts);
    each_listed(row, tokens, count, [amounts](float& logit, int32_t i) { logit -= amounts[i]; });
    if (count > 0) row.measured = false;
}

// Undone where it would leave nothing.
void no_repeat_ngram(Row& row, const SamplerOp& op, const Context& context) {
    int32_t* tokens = row.scratch.index;
    const int32_t found = ngram_bans(context.history, context.length, static_cast<int32_t>(op.values[0]), tokens);
    std::sort(tokens, tokens + found);
    const int32_t count = static_cast<int32_t>(std::unique(tokens, tokens + found) - tokens);
    if (count == 0 || !measure(row)) return;
    float* before = row.scratch.y;
    std::fill(before, before + count, -kInf);
    each_listed(row, tokens, count, [before](float& logit, int32_t i) {
        before[i] = logit;
        logit = -kInf;
    });
    row.measured = false;
    if (measure(row)) return;
    each_listed(row, tokens, count, [before](float& logit, int32_t i) { logit = before[i]; });
    row.measured = false;
}

}  // namespace
}  // namespace aph
