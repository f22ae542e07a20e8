// What a row's own history says about its next token: DRY penalties and n-gram bans.
//
// Both ask for how many tokens before each earlier position equal the history's last tokens. Nothing is kept between
// calls: a call reads the history once, and a row can go back or be preempted without a word to anybody.
#pragma once
#include <cstdint>

namespace aph {

// What interrupts a repetition. `aphrodite/kernels/cpu/history.py` has the same layout; sizes are compared at load.
//
// A breaker is a text. A token that contains it has the flag kBreaker. A token that ends with a beginning of it is a
// head, with the tokens that complete it as a tail; a head may have several tails.
struct DryBreakers {
    const uint8_t* flags;       // [vocab]
    const int32_t* heads;       // [head_count] ascending
    const int32_t* first_tail;  // [head_count + 1] into tail_start
    const int32_t* tail_start;  // [tails + 1] into tail_tokens
    const int32_t* tail_tokens;
    int32_t head_count;
};
constexpr uint8_t kBreaker = 1, kHead = 2;

// DRY parameters of a row (sampling/stages/dry.py).
struct DryRow {
    const DryBreakers* breakers;
    double multiplier;
    double base;
    int32_t max_exponent;
    int32_t allowed_length;
    int32_t window;  // the last tokens to look at
};

// The tokens to penalize and by how much; returns their count, at most min(length, vocab). `history` holds ids below
// `vocab`. Any thread may call it; cost: one read of the window, and of what repeats.
int32_t dry_penalties(const int32_t* history, int32_t length, int32_t vocab, const DryRow& row, int32_t* token_ids,
                      float* penalties);

// The tokens that would complete an n-gram of `size` >= 1 which the history holds already; returns their count, at
// most `length`. A token may come twice.
int32_t ngram_bans(const int32_t* history, int32_t length, int32_t size, int32_t* token_ids);

}  // namespace aph
