// Adapters in a step: which rows have one, and A x of them before the products that B adds to.
#include <algorithm>

#include "program_impl.h"

namespace aph {

// Rows of the step in blocks of one adapter each, and memory for what the widest operation needs of them.
void Program::plan_adapters() {
    adapter_blocks_.clear();
    if (step_.adapter_slots == nullptr) return;
    token_slots_.assign(step_.tokens, -1);
    for (int64_t r = 0; r < step_.sequences; ++r) {
        const int32_t slot = step_.adapter_slots[r];
        for (int64_t t = step_.query_start[r]; t < step_.query_start[r + 1]; ++t) {
            token_slots_[t] = slot;
            if (slot < 0) continue;
            const bool follows = !adapter_blocks_.empty() && adapter_blocks_.back().slot == slot &&
                                 adapter_blocks_.back().count < kAdapterRows;
            if (!follows) adapter_blocks_.push_back({slot, 0, {}});
            AdapterBlock& block = adapter_blocks_.back();
            block.rows[block.count++] = t;
        }
    }
    int64_t columns = 0;
    most_rank_ = 0;
    for (const WeightDesc& weight : weights_) columns = std::max(columns, weight.columns);
    for (int64_t i = 0; i < step_.adapter_count * static_cast<int64_t>(weights_.size()); ++i)
        if (step_.adapter_pairs[i].b != nullptr) most_rank_ = std::max(most_rank_, step_.adapter_pairs[i].rank);
    adapter_columns_ = columns;
    low_ = low_memory_.get<float>(kMostAdapted * step_.tokens * most_rank_);
    adapter_rows_ = adapter_memory_.get<float>(step_.threads * kAdapterRows * columns);
}

bool Program::adapts(const Op& op) const {
    if (adapter_blocks_.empty() || op.rows != static_cast<int32_t>(RowSet::Tokens)) return false;
    if (op.weight_count > kMostAdapted) return false;
    for (int64_t slot = 0; slot < step_.adapter_count; ++slot)
        for (int i = 0; i < op.weight_count; ++i)
            if (pair_of(slot, op.first_weight + i).b != nullptr) return true;
    return false;
}

AdapterRows Program::adapter_rows(const Op& op, int i) const {
    return {step_.adapter_pairs + op.first_weight + i, static_cast<int64_t>(weights_.size()), token_slots_.data(),
            low_ + i * step_.tokens * most_rank_, most_rank_};
}

// A x of every weight of an operation, for the rows that have an adapter.
void Program::shrink_adapters(const Op& op, Team& team, int worker) {
    constexpr int64_t kRanks = 16;  // of a chunk
    const int64_t parts = ceil_div(most_rank_, kRanks), weights = op.weight_count;
    float* scratch = adapter_rows_ + worker * kAdapterRows * adapter_columns_;
    team.phase(worker, static_cast<int64_t>(adapter_blocks_.size()) * weights * parts, [&](int64_t chunk) {
        const AdapterBlock& block = adapter_blocks_[chunk / (weights * parts)];
        const int i = static_cast<int>(chunk / parts % weights);
        const LowRank& pair = pair_of(block.slot, op.first_weight + i);
        const Range ranks{chunk % parts * kRanks, std::min(pair.rank, (chunk % parts + 1) * kRanks)};
        if (pair.b == nullptr || ranks.begin >= ranks.end) return;
        kernels_.shrink(pack_of(weights_[op.first_weight + i].pack, worker), pair, ranks, block, scratch,
                        low_ + i * step_.tokens * most_rank_, most_rank_);
    });
}

}  // namespace aph
