// DRY and no_repeat_ngram_size over a row's token ids. sampling/stages/dry.py defines what is computed here.
//
// Matching starts where the history's last token occurs, which a vector scan finds, and compares backwards from there.
// A history that repeats itself would make that quadratic: past a fixed amount of work per token the Z-algorithm over
// the reversed window (Gusfield, 1997) takes over, which is linear and gives the same lengths.
#include "history.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "api.h"
#include "thread_pool.h"

namespace aph {
namespace {

constexpr int kLanes = 16;
constexpr int64_t kWorkPerToken = 4;    // comparisons before the Z-algorithm is cheaper
constexpr double kMaxPenalty = 1e6;     // beyond any logit, and small enough for the stages that cube logits
constexpr int64_t kAloneTokens = 1 << 16;  // so much history takes less time than waking the helpers

typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));

// A worker's memory, kept between calls.
struct Workspace {
    std::vector<int32_t> lengths;  // of the Z-algorithm
    std::vector<int32_t> longest;  // [vocab], 0 between calls: longest match + 1
    std::vector<int32_t> token_ids;
    std::vector<float> penalties;
};
thread_local Workspace workspace;

// Calls f(position) for every position in [begin, end) that holds `token`.
template <class F>
inline void each_occurrence(const int32_t* history, int32_t begin, int32_t end, int32_t token, F&& f) {
    int32_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
        I32 values;
        std::memcpy(&values, history + i, sizeof values);
        const I32 equal = values == token;
        uint64_t words[kLanes / 2], any = 0;
        std::memcpy(words, &equal, sizeof words);
        for (uint64_t word : words) any |= word;
        if (!any) continue;
        for (int lane = 0; lane < kLanes; ++lane)
            if (equal[lane]) f(i + lane);
    }
    for (; i < end; ++i)
        if (history[i] == token) f(i);
}

// Z-algorithm over the n tokens before `end`, read backwards: lengths[k] is how many tokens agree when the end is
// moved back by k. lengths[0] is not set.
void reversed_z(const int32_t* end, int32_t n, std::vector<int32_t>& lengths) {
    if (lengths.size() < static_cast<size_t>(n)) lengths.resize(n);
    const int32_t* last = end - 1;
    int32_t left = 0, right = 0;  // the match [left, right) that reaches furthest
    for (int32_t k = 1; k < n; ++k) {
        int32_t length = k < right ? std::min(right - k, lengths[k - left]) : 0;
        while (k + length < n && last[-length] == last[-(k + length)]) ++length;
        lengths[k] = length;
        if (k + length > right) {
            left = k;
            right = k + length;
        }
    }
}

// Calls f(position, length) for the positions in [begin, end - 1) where the last `length` >= 1 tokens up to and
// including that position equal the last `length` tokens before `end`; `length` is the longest, but at most `limit`.
// Where the work runs out the Z-algorithm starts over, so f has to bear hearing of a position twice.
template <class F>
void each_match(const int32_t* history, int32_t begin, int32_t end, int32_t limit, F&& f) {
    const int32_t last = history[end - 1];
    int64_t work = kWorkPerToken * (end - begin);
    each_occurrence(history, begin, end - 1, last, [&](int32_t position) {
        if (work < 0) return;
        const int32_t most = std::min(limit, position - begin + 1);
        int32_t length = 1;
        while (length < most && history[position - length] == history[end - 1 - length]) ++length;
        work -= length;
        f(position, length);
    });
    if (work >= 0) return;
    const int32_t n = end - begin;
    std::vector<int32_t>& lengths = workspace.lengths;
    reversed_z(history + end, n, lengths);
    for (int32_t k = 1; k < n; ++k)
        if (lengths[k] > 0) f(end - 1 - k, std::min(lengths[k], limit));
}

// Length of the longest tail of history[position] that follows it within `end`; -1 if it completes no breaker.
int32_t longest_tail(const DryBreakers& breakers, const int32_t* history, int32_t position, int32_t end) {
    const uint8_t flags = breakers.flags[history[position]];
    int32_t longest = flags & kBreaker ? 0 : -1;
    if (!(flags & kHead)) return longest;
    const int32_t* heads_end = breakers.heads + breakers.head_count;
    const auto head = std::lower_bound(breakers.heads, heads_end, history[position]) - breakers.heads;
    for (int32_t tail = breakers.first_tail[head]; tail < breakers.first_tail[head + 1]; ++tail) {
        const int32_t* tokens = breakers.tail_tokens + breakers.tail_start[tail];
        const int32_t length = breakers.tail_start[tail + 1] - breakers.tail_start[tail];
        if (length > longest && length < end - position && std::equal(tokens, tokens + length, history + position + 1))
            longest = length;
    }
    return longest;
}

// Tokens since the last breaker in [begin, end), all of them if there is none.
int32_t unbroken_length(const DryBreakers& breakers, const int32_t* history, int32_t begin, int32_t end) {
    for (int32_t position = end - 1; position >= begin; --position) {
        if (!breakers.flags[history[position]]) continue;
        const int32_t tail = longest_tail(breakers, history, position, end);
        if (tail >= 0) return end - 1 - position - tail;
    }
    return end - begin;
}

}  // namespace

int32_t dry_penalties(const int32_t* history, int32_t length, int32_t vocab, const DryRow& row, int32_t* token_ids,
                      float* penalties) {
    const int32_t begin = length - std::min(length, row.window);
    if (length - begin <= row.allowed_length) return 0;
    const int32_t limit = unbroken_length(*row.breakers, history, begin, length);
    if (limit < row.allowed_length) return 0;
    std::vector<int32_t>& longest = workspace.longest;
    if (longest.size() < static_cast<size_t>(vocab)) longest.resize(vocab, 0);
    int32_t count = 0;
    const auto continues = [&](int32_t position, int32_t match) {
        const int32_t next = history[position + 1];
        if (match < row.allowed_length || row.breakers->flags[next] & kBreaker) return;
        if (longest[next] == 0) token_ids[count++] = next;
        longest[next] = std::max(longest[next], match + 1);
    };
    if (row.allowed_length == 0)
        for (int32_t position = begin; position + 1 < length; ++position) continues(position, 0);
    if (limit > 0) each_match(history, begin, length, limit, continues);
    for (int32_t i = 0; i < count; ++i) {
        const int32_t exponent = std::min(longest[token_ids[i]] - 1 - row.allowed_length, row.max_exponent);
        penalties[i] = static_cast<float>(std::min(row.multiplier * std::pow(row.base, exponent), kMaxPenalty));
        longest[token_ids[i]] = 0;
    }
    return count;
}

int32_t ngram_bans(const int32_t* history, int32_t length, int32_t size, int32_t* token_ids) {
    if (length < size) return 0;
    if (size == 1) {
        std::copy(history, history + length, token_ids);
        return length;
    }
    int32_t count = 0;
    std::vector<int32_t>& lengths = workspace.lengths;
    const int32_t needed = size - 1;
    int64_t work = kWorkPerToken * length;
    each_occurrence(history, needed - 1, length - 1, history[length - 1], [&](int32_t position) {
        if (work < 0) return;
        int32_t match = 1;
        while (match < needed && history[position - match] == history[length - 1 - match]) ++match;
        work -= match;
        if (match == needed) token_ids[count++] = history[position + 1];
    });
    if (work >= 0) return count;
    reversed_z(history + length, length, lengths);
    count = 0;
    for (int32_t k = 1; k < length; ++k)
        if (lengths[k] >= needed) token_ids[count++] = history[length - k];
    return count;
}

}  // namespace aph

using aph::DryBreakers;
using aph::DryRow;

APH_API int32_t aph_dry_row_bytes() { return sizeof(DryRow); }
APH_API int32_t aph_dry_breakers_bytes() { return sizeof(DryBreakers); }

namespace {

// Calls f(i) for `count` rows, by several threads where there is enough to read.
template <class F>
void each_row(int64_t count, const int32_t* lengths, F& f) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += lengths[i];
    if (total > aph::kAloneTokens) {
        aph::parallel_for(count, [](void* context, int64_t i, int) { (*static_cast<F*>(context))(i); }, &f);
        return;
    }
    for (int64_t i = 0; i < count; ++i) f(i);
}

// Room for what one row may bring.
aph::Workspace& reserve(int32_t length) {
    aph::Workspace& memory = aph::workspace;
    if (memory.token_ids.size() < static_cast<size_t>(length)) {
        memory.token_ids.resize(length);
        memory.penalties.resize(length);
    }
    return memory;
}

}  // namespace

// Subtracts the DRY penalties of `count` rows of `logits`, `stride` floats apart. Row i's history is the first
// lengths[i] ids at history + rows[i] * history_stride, its parameters are table[i].
APH_API void aph_dry_penalties(float* logits, int64_t stride, int32_t vocab, int64_t count, const int32_t* history,
                               int64_t history_stride, const int32_t* rows, const int32_t* lengths,
                               const DryRow* table) {
    auto one = [&](int64_t i) {
        aph::Workspace& memory = reserve(lengths[i]);
        int32_t* token_ids = memory.token_ids.data();
        float* penalties = memory.penalties.data();
        const int32_t found = aph::dry_penalties(history + rows[i] * history_stride, lengths[i], vocab, table[i],
                                                 token_ids, penalties);
        float* row = logits + i * stride;
        for (int32_t k = 0; k < found; ++k) row[token_ids[k]] -= penalties[k];
    };
    each_row(count, lengths, one);
}

// Masks the tokens of `count` rows of `logits` that would repeat an n-gram of sizes[i] tokens; the rest as above.
APH_API void aph_ngram_bans(float* logits, int64_t stride, int64_t count, const int32_t* history,
                            int64_t history_stride, const int32_t* rows, const int32_t* lengths,
                            const int32_t* sizes) {
    auto one = [&](int64_t i) {
        int32_t* token_ids = reserve(lengths[i]).token_ids.data();
        const int32_t found =
            aph::ngram_bans(history + rows[i] * history_stride, lengths[i], sizes[i], token_ids);
        float* row = logits + i * stride;
        for (int32_t k = 0; k < found; ++k) row[token_ids[k]] = -__builtin_inff();
    };
    each_row(count, lengths, one);
}
